import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import RunFolderError
from utils.logs import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_log(folder, steps, value, resume_step=None):
    log = RunLog(folder, resume_step)
    for step in steps:
        log.scalars(step, {"train/mse": value})
    log.close()


def test_a_line_is_on_disk_as_soon_as_it_is_logged_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(10, {"train/PSNR": math.nan, "train/mse": np.float32(0.25)})
    assert lines(tmp_path) == [{"step": 10, "train/PSNR": None, "train/mse": 0.25}]
    log.close()


def test_a_new_log_starts_empty(tmp_path):
    write_log(tmp_path, [1, 2], 0.1)
    write_log(tmp_path, [1], 0.2)
    assert [line["train/mse"] for line in lines(tmp_path)] == [0.2]


def test_a_resumed_log_repeats_no_step_and_drops_a_torn_line(tmp_path):
    write_log(tmp_path, [10, 20, 30], 0.1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "train/m')
    write_log(tmp_path, [20, 30, 40], 0.2, resume_step=20)
    found = [(line["step"], line["train/mse"]) for line in lines(tmp_path)]
    assert found == [(10, 0.1), (20, 0.2), (30, 0.2), (40, 0.2)]


def test_tensorboard_shows_scalars_and_pictures_and_purges_what_is_logged_again(tmp_path):
    write_log(tmp_path, [10, 20, 30], 0.5)
    log = RunLog(tmp_path, resume_step=20)
    log.scalars(20, {"train/mse": 0.25})
    log.image(20, "test/view", np.full((6, 8, 3), 0.5, np.float32))
    log.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/mse")] == [(10, 0.5), (20, 0.25)]
    picture = board.Images("test/view")[0]
    assert (picture.height, picture.width) == (6, 8)


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        RunLog(tmp_path / "missing")
