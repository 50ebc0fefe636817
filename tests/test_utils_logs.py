import io
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ROOT
from utils.errors import RunFolderError
from utils.logs import RunLog, checked_position


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder, tag="train/mse"):
    """What a fresh TensorBoard shows."""
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def write_log(folder, steps, value, position=None, lost=()):
    """Log `steps`, and `lost` after the position that is returned."""
    log = RunLog(folder, position, next_step=min(steps))
    for step in steps:
        log.scalars(step, {"train/mse": value})
    end = log.position()
    for step in lost:
        log.scalars(step, {"train/mse": -1.0})
        log.image(step, "test/view", np.zeros((4, 5, 3)))
    log.close()
    return end


def test_a_point_is_on_disk_as_soon_as_it_is_logged_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(10, {"train/PSNR": math.nan, "train/mse": np.float32(0.25)})
    assert lines(tmp_path) == [{"step": 10, "train/PSNR": None, "train/mse": 0.25}]
    assert points(tmp_path) == [(10, 0.25)]
    log.close()


def test_a_new_log_starts_empty(tmp_path):
    write_log(tmp_path, [1, 2], 0.5)
    write_log(tmp_path, [1], 0.25)
    assert lines(tmp_path) == [{"step": 1, "train/mse": 0.25}]
    assert points(tmp_path) == [(1, 0.25)]


def test_what_was_logged_after_the_saved_state_is_logged_once_whatever_its_step(tmp_path):
    saved = write_log(tmp_path, [10, 20], 0.5, lost=[20, 30])
    later = write_log(tmp_path, [30, 40], 0.25, saved, lost=[40, 50])
    write_log(tmp_path, [50], 0.125, later)
    expected = [(10, 0.5), (20, 0.5), (30, 0.25), (40, 0.25), (50, 0.125)]
    assert [(line["step"], line["train/mse"]) for line in lines(tmp_path)] == expected
    assert points(tmp_path) == expected
    assert "test/view" not in EventAccumulator(str(tmp_path)).Reload().Tags()["images"]


def test_going_back_to_an_earlier_state_drops_the_segments_after_it(tmp_path):
    first = write_log(tmp_path, [10], 0.5)
    write_log(tmp_path, [20, 30], 0.25, first)
    write_log(tmp_path, [20], 0.125, first)
    assert points(tmp_path) == [(10, 0.5), (20, 0.125)]
    assert [line["train/mse"] for line in lines(tmp_path)] == [0.5, 0.125]


def test_segments_are_in_order_though_clocks_disagree(tmp_path, monkeypatch):
    position = None
    for step, clock in ((10, 2_000_000_000), (20, 1_900_000_000), (30, 1_900_000_000)):
        monkeypatch.setattr(time, "time", lambda clock=clock: float(clock))
        position = write_log(tmp_path, [step], 0.5, position)
    assert points(tmp_path) == [(10, 0.5), (20, 0.5), (30, 0.5)]


def test_a_watching_tensorboard_drops_what_is_logged_again(tmp_path):
    saved = write_log(tmp_path, [10], 0.5, lost=[20, 30])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert len(board.Scalars("train/mse")) == 3
    write_log(tmp_path, [20], 0.25, saved)
    assert [(event.step, event.value) for event in board.Reload().Scalars("train/mse")] == [(10, 0.5), (20, 0.25)]


@pytest.mark.parametrize("lost", [1, 20, 10**6])
def test_a_line_that_a_dying_machine_did_not_save_whole_is_dropped(tmp_path, lost):
    position = write_log(tmp_path, [10, 20, 30], 0.5)
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, max(path.stat().st_size - lost, 0))
    write_log(tmp_path, [40], 0.25, position)
    assert [line["step"] for line in lines(tmp_path)] == ([40] if lost == 10**6 else [10, 20, 40])


def test_tensorboard_shows_pictures_in_their_colours(tmp_path):
    log = RunLog(tmp_path)
    log.image(20, "test/view", np.full((6, 8, 3), 0.5, np.float32))
    log.close()
    picture = EventAccumulator(str(tmp_path)).Reload().Images("test/view")[0]
    assert (picture.step, picture.height, picture.width) == (20, 6, 8)

    assert np.array(Image.open(io.BytesIO(picture.encoded_image_string))).tolist() == np.full((6, 8, 3), 128).tolist()


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        RunLog(tmp_path / "missing")


@pytest.mark.parametrize("what", ["log.scalars(step, {'train/mse': 0.5})", "log.image(step, 'v', noise)"])
def test_a_disk_that_fills_up_stops_the_log_at_once_with_one_line(tmp_path, what):
    pytest.importorskip("resource")
    program = (
        "import resource, pathlib, numpy\n"
        "from utils.errors import RunFolderError\n"
        "from utils.logs import RunLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"log = RunLog(pathlib.Path({str(tmp_path)!r}))\n"
        "noise = numpy.random.default_rng(0).random((20, 20, 3))\n"
        "try:\n"
        "    for step in range(2000):\n"
        f"        {what}\n"
        "except RunFolderError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "metrics.jsonl (File too large): free some space" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("value", [None, ["x"], {"metrics.jsonl": "a"}, {"metrics.jsonl": -1}, {1: 1}, {"a": True}])
def test_a_position_that_is_none_is_refused(value):
    with pytest.raises(TypeError):
        checked_position(value)
    assert checked_position({"metrics.jsonl": 3}) == {"metrics.jsonl": 3}
