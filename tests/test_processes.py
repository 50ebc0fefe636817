"""Runs in processes of their own: how their end is understood, and how many there are at a time."""

import errno
import itertools
import json
import os
import signal
import sys
import time

import pytest

from utils.errors import RunFolderError, RunsFailed, RunsLeft, UserError
from utils.jobs import Job, Outcome, Planned, State, read_failure, record_failure
from utils.launchers import LocalLauncher
from utils.processes import RunProcess, start_run
from utils.run_lock import LOCK_NAME, run_lock
from utils.signals import Preempted
from utils.sweep import carry_out

PATIENCE_SECONDS = 30


def job(folder, name="a", **options) -> Job:
    return Job(name, folder / name, {"overwrite": False, "render_only": 0, **options})


def python(code: str) -> list[str]:
    """A program that stands for training; it gets the job's name as an argument."""
    return [sys.executable, "-S", "-c", code]


def end_of(process: RunProcess) -> Outcome:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (outcome := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return outcome


@pytest.mark.parametrize(
    ("code", "state", "says"),
    [
        ("", State.FINISHED, ""),
        ("import sys; sys.exit(75)", State.NEW, "before it began"),
        ("import os; os.kill(os.getpid(), 15)", State.NEW, "before it began"),
        ("import os; os.kill(os.getpid(), 9)", State.FAILED, "killed by signal 9 (the machine may be out of memory)"),
        ("import sys; sys.exit(3)", State.FAILED, "ended with exit code 3; see"),
    ],
)
def test_the_end_of_a_process_tells_how_its_run_stands(tmp_path, code, state, says):
    one = job(tmp_path)
    outcome = end_of(start_run(python(code), one, {}))
    assert outcome.state is state
    assert says in outcome.reason
    assert read_failure(one.folder) == (outcome.reason if state is State.FAILED else "")


def test_the_error_that_a_run_left_is_its_outcome_and_the_next_start_removes_it(tmp_path):
    one = job(tmp_path)
    code = "import os, sys; open(sys.argv[1] + '/failed.json', 'w').write('{\"error\": \"no images\"}'); sys.exit(2)"
    process = start_run(python(code.replace("sys.argv[1]", repr(str(one.folder)))), one, {})
    assert end_of(process) == Outcome(State.FAILED, "no images")
    assert start_run(python(""), one, {}) == Outcome(State.FAILED, "no images")
    again = Job(one.name, one.folder, one.options, retry=True)
    assert end_of(start_run(python(""), again, {})).state is State.FINISHED
    assert not (one.folder / "failed.json").exists()


def test_a_run_that_finished_as_the_signal_came_is_finished(tmp_path):
    one = job(tmp_path)
    written = f"open({str(one.folder / 'results.json')!r}, 'w').write('{{}}')"
    process = start_run(python(f"{written}; raise SystemExit(75)"), one, {})
    assert end_of(process) == Outcome(State.FINISHED)


def test_a_run_that_another_process_finished_meanwhile_is_not_started(tmp_path):
    one = job(tmp_path)
    one.folder.mkdir()
    (one.folder / "results.json").write_text("{}")
    assert start_run(python("raise SystemExit(1)"), one, {}) == Outcome(State.FINISHED)
    assert not (one.folder / "run.log").exists()


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "a").write_text("a file")
    outcome = start_run(python(""), job(tmp_path), {})
    assert outcome.state is State.FAILED
    assert "cannot write" in outcome.reason


def test_output_is_appended_to_the_log_and_overwriting_starts_a_new_one(tmp_path):
    for _ in range(2):
        end_of(start_run(python("import sys; print('out'); print('err', file=sys.stderr)"), job(tmp_path), {}))
    assert sorted((tmp_path / "a/run.log").read_text().split()) == ["err", "err", "out", "out"]
    end_of(start_run(python("print('anew')"), job(tmp_path, overwrite=True), {}))
    assert (tmp_path / "a/run.log").read_text() == "anew\n"


def test_the_job_comes_as_a_line_and_the_stream_stays_open(tmp_path):
    code = "import json, os, select, sys; print(json.loads(sys.stdin.readline())['name'], sys.argv[1], "
    code += "os.environ['SLOT'], select.select([0], [], [], 0.3)[0])"
    end_of(start_run(python(code), job(tmp_path), {"SLOT": "s"}))
    assert (tmp_path / "a/run.log").read_text() == "a a s []\n"


RECORDING = """
import json, os, sys, time
begin = time.monotonic()
time.sleep(0.3)
with open(sys.argv[1], "w") as file:
    json.dump([os.environ["CUDA_VISIBLE_DEVICES"], begin, time.monotonic()], file)
"""


def test_there_is_one_run_at_a_time_on_every_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [job(tmp_path / "runs", f"j{number}") for number in range(6)]
    launcher = LocalLauncher(python(RECORDING), [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7")])
    events = list(launcher.run(jobs))
    assert [e.job.name for e in events if e.job and not e.outcome] == [j.name for j in jobs]
    assert {e.outcome for e in events if e.outcome} == {Outcome(State.FINISHED)}
    records = [json.loads((tmp_path / j.name).read_text()) for j in jobs]
    for gpu in ("4", "7"):
        times = sorted((begin, end) for device, begin, end in records if device == gpu)
        assert len(times) == 3
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))


def test_a_stopped_launcher_passes_the_signal_on_and_starts_no_more(tmp_path):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    code += "print('ready', flush=True); signal.pause()"
    jobs = [job(tmp_path, name) for name in ("a", "b", "c")]
    launcher = LocalLauncher(python(code), [{}, {}])
    ended = {}
    for event in launcher.run(jobs):
        logs = [j.folder / "run.log" for j in jobs[:2]]
        if all(log.exists() and log.read_text() for log in logs) and not ended:
            launcher.stop(signal.SIGTERM)
        if event.outcome:
            ended[event.job.name] = event.outcome.state
    assert ended == {"a": State.NEW, "b": State.NEW}
    assert not jobs[2].folder.exists()


def test_runs_are_told_to_end_when_nobody_listens_to_their_launcher_any_more(tmp_path):
    one = job(tmp_path)
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('asked'))); "
    events = LocalLauncher(python(code + "print('ready', flush=True); signal.pause()"), [{}]).run([one])
    while not (one.folder / "run.log").exists() or not (one.folder / "run.log").read_text():
        next(events)
    events.close()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "asked" not in (one.folder / "run.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_on_a_full_disk_is_still_told(tmp_path, monkeypatch):
    import utils.processes

    def full(*arguments):
        raise RunFolderError("cannot write: no space")

    monkeypatch.setattr(utils.processes, "record_failure", full)
    outcome = end_of(start_run(python("raise SystemExit(3)"), job(tmp_path), {}))
    assert outcome.reason.startswith("its process ended with exit code 3")
    assert record_failure is not full


def test_a_process_that_cannot_be_started_is_a_failure_of_its_run(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("utils.processes.subprocess.Popen", refuse)
    outcome = start_run(python(""), job(tmp_path), {})
    assert outcome == Outcome(State.FAILED, "its process cannot be started (Cannot allocate memory)")


def test_a_process_that_left_no_word_on_a_full_disk_is_explained_by_the_disk(tmp_path, monkeypatch):
    one = job(tmp_path)
    process = start_run(python("raise SystemExit(1)"), one, {})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = end_of(process)
    assert outcome.state is State.FAILED
    assert f"ended with exit code 1; see {one.folder / 'run.log'}; cannot write " in outcome.reason
    assert f"failed.json ({os.strerror(errno.ENOSPC)}): free some space or choose a --save_dir" in outcome.reason
    assert [path.name for path in one.folder.iterdir()] == ["run.log"]


def test_a_run_with_a_damaged_result_is_not_taken_for_finished(tmp_path):
    one = job(tmp_path)
    one.folder.mkdir()
    (one.folder / "results.json").write_text("{")
    outcome = start_run(python(""), one, {})
    assert outcome.state is State.REFUSED
    assert "results.json is damaged" in outcome.reason


def test_a_folder_that_cannot_be_seen_when_its_run_ended_is_a_failure_of_the_run(tmp_path, monkeypatch):
    process = start_run(python("raise SystemExit(75)"), job(tmp_path), {})

    def away(folder):
        raise RunFolderError("stale file handle")

    monkeypatch.setattr("utils.processes.folder_state", away)
    assert end_of(process) == Outcome(State.FAILED, "stale file handle")


@pytest.mark.parametrize("error", [OSError("no space"), UserError("no space")])
def test_tables_that_cannot_be_written_do_not_stop_a_sweep(tmp_path, capsys, error):
    def after_run(one):
        raise error

    jobs = [job(tmp_path, name, n_iters=1) for name in ("a", "b")]
    plan = [Planned(one, State.NEW, "", starts=True) for one in jobs]
    carry_out(plan, LocalLauncher(python(""), [{}]), after_run)
    assert capsys.readouterr().err.splitlines() == ["error: a: no space", "error: b: no space"]


def plan_of(folder, *names: str) -> list[Planned]:
    return [Planned(job(folder, name, n_iters=1), State.NEW, "", starts=True) for name in names]


def test_runs_that_were_stopped_before_they_began_count_as_new(tmp_path, capsys):
    with pytest.raises(Preempted, match="stopped with 2 of 2 runs to go"):
        carry_out(plan_of(tmp_path, "a", "b"), LocalLauncher(python("raise SystemExit(75)"), [{}]), lambda one: None)
    out = capsys.readouterr().out.splitlines()
    assert out == ["1 of 2: a stopped: before it began", "2 of 2: b stopped: before it began", "2 runs: 2 new"]


def test_runs_that_failed_alike_share_one_line_with_the_reason(tmp_path, capsys):
    code = "import sys; raise SystemExit(4 if sys.argv[1] == 'b' else 3)"
    with pytest.raises(RunsFailed) as caught:
        carry_out(plan_of(tmp_path, "a", "b", "c"), LocalLauncher(python(code), [{}]), lambda one: None)
    assert str(caught.value).splitlines() == [
        "3 of 3 runs failed:",
        "2 runs: its process ended with exit code 3; see (its folder)/run.log",
        "  a",
        "  c",
        f"b: its process ended with exit code 4; see {tmp_path / 'b/run.log'}",
    ]


@pytest.mark.parametrize("owner", ["here", "elsewhere", "finished"])
def test_a_run_left_to_another_machine_is_told_and_its_sweep_does_not_count_as_done(tmp_path, capsys, owner):
    one = job(tmp_path, n_iters=1)
    plan = [Planned(one, State.RUNNING, "process 7 on elsewhere", starts=False)]
    with run_lock(one.folder):
        if owner == "elsewhere":
            lock = one.folder / LOCK_NAME
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "elsewhere"}))
        if owner == "finished":
            (one.folder / "results.json").write_text("{}")
        if owner == "elsewhere":
            with pytest.raises(RunsLeft, match="not seen to be alive: the processes of a;"):
                carry_out(plan, LocalLauncher(python(""), [{}]), lambda job: None)
        else:
            carry_out(plan, LocalLauncher(python(""), [{}]), lambda job: None)
    assert capsys.readouterr().out.endswith("left to other processes: a\n")
