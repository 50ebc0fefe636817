"""What a sweep shows while it goes on."""

import io
import json
import re
import sys

import pytest

import utils.overview
from utils.jobs import Job, Outcome, State
from utils.launchers import Event
from utils.overview import Overview, last_scalars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal() puts a terminal on stderr, which is looked at without a pause."""

    def begin() -> Terminal:  # in the test, because capturing puts a stderr of its own there before
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    monkeypatch.setattr(utils.overview, "REFRESH_SECONDS", 0.0)
    return begin


def job(tmp_path, name="syn/lego/full/seed1") -> Job:
    (tmp_path / name).mkdir(parents=True)
    return Job(name, tmp_path / name, {"n_iters": 100})


def log(one: Job, *records: dict, torn: str = "") -> None:
    with open(one.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records) + torn)


def test_a_terminal_shows_steps_psnr_and_time_left_of_every_run(tmp_path, terminal):
    screen = terminal()
    one, other = job(tmp_path), job(tmp_path, "syn/lego/egra/seed1")
    overview = Overview(2)
    for started in (one, other):
        overview.show(Event(started))
    log(one, {"step": 10, "train/PSNR": 20.0})
    overview.show(Event())
    log(one, {"step": 60, "train/PSNR": 27.123}, {"step": 60, "test/psnr": 26.0}, torn='{"step": 70, "tra')
    overview.show(Event())
    overview.close()
    shown = screen.getvalue()
    assert re.search(r"syn/lego/full/seed1: +60%.*60/100 \[\d\d:\d\d<\d\d:\d\d, .*psnr=27.12", shown)
    assert re.search(r"syn/lego/egra/seed1: +0%", shown)
    assert "failed=0, running=2" in shown


def test_what_an_earlier_start_logged_is_not_taken_for_progress(tmp_path, terminal):
    screen, one = terminal(), job(tmp_path)
    log(one, {"step": 90, "train/PSNR": 33.0})
    overview = Overview(1)
    overview.show(Event(one))
    overview.show(Event())
    assert "0/100" in screen.getvalue()
    assert "psnr=" not in screen.getvalue()
    overview.close()


def test_without_a_terminal_there_is_a_line_for_every_run_that_ends(tmp_path, capsys):
    jobs = [job(tmp_path, name) for name in ("a", "b", "c", "d")]
    (jobs[0].folder / "results.json").write_text('{"psnr": null, "psnr_5view": 29.456, "train_seconds": 125}')
    overview = Overview(4)
    for one, outcome in zip(
        jobs,
        [
            Outcome(State.FINISHED),
            Outcome(State.FAILED, "no images"),
            Outcome(State.STARTED, "goes on from ckpt_5.th"),
            Outcome(State.RUNNING, "process 3 on x"),
        ],
        strict=True,
    ):
        overview.show(Event(one))
        overview.show(Event(one, outcome))
    overview.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "1 of 4: a finished: PSNR 29.46 dB, 2 min 5 s of training",
        "2 of 4: b failed: no images",
        "3 of 4: c stopped: goes on from ckpt_5.th",
        "4 of 4: d running elsewhere: process 3 on x",
    ]


def test_bars_give_their_place_to_the_next_run(tmp_path, terminal):
    terminal()
    overview = Overview(3)
    jobs = [job(tmp_path, name) for name in ("a", "b", "c")]
    for one in jobs[:2]:
        overview.show(Event(one))
    overview.show(Event(jobs[0], Outcome(State.FINISHED)))
    overview.show(Event(jobs[2]))
    assert {name: bar.position for name, bar in overview._bars.items()} == {"b": 2, "c": 1}
    overview.close()


@pytest.mark.parametrize("text", ["", "\x00\xff", "[1]\n", '{"step": 3}\n', '{"step": 3, "train/PSNR": null}\n'])
def test_a_log_without_a_psnr_says_nothing(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    assert last_scalars(path) is None
    path.write_text(text, encoding="latin-1")
    assert last_scalars(path) is None


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/PSNR": 20.5, "filling": "x" * 100}) for step in range(1000)]
    path.write_text("\n".join(lines) + "\n")
    assert last_scalars(path)["step"] == 999
