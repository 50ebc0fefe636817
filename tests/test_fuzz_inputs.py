"""A small, always equal part of the fuzzing (`make fuzz` runs it whole), and that the harness finds what it should."""

import os
import sys
import time
import warnings

import numpy as np
import pytest

from tests import fuzz_inputs, fuzz_targets

COUNT, SEED = 300, 20211202


def test_damaged_inputs_of_all_kinds_are_accepted_or_refused_in_words():
    tasks = fuzz_inputs.inputs(COUNT, SEED)
    done = fuzz_inputs.run_all(tasks, n_workers=1)
    assert [entry for entry in done if entry[2] not in fuzz_inputs.GOOD] == []
    counts = fuzz_inputs.table(done)
    assert set(counts) == {*fuzz_targets.TARGETS, "all"}
    # Damage that is always refused, or never, would try nothing.
    assert min(counts["all"].values()) > COUNT / 20


def hang(r, place):
    time.sleep(60)


def spin(r, place):
    while True:
        pass


def crash(r, place):
    os._exit(9)


def raise_something(r, place):
    raise KeyError("frames")


def warn(r, place):
    warnings.warn("odd", RuntimeWarning, stacklevel=1)


def write(r, place):
    os.write(2, b"Traceback")


def grow(r, place):
    assert np.ones(fuzz_inputs.MEGABYTES * 2**18).sum()


@pytest.mark.parametrize(
    ("target", "outcome"), [(raise_something, "exception"), (warn, "warning"), (write, "output"), (grow, "memory")]
)
def test_the_harness_tells_what_is_wrong_with_an_input(monkeypatch, target, outcome):
    monkeypatch.setitem(fuzz_targets.TARGETS, "test", (target, 1))
    assert fuzz_inputs.attempt("test", 1)[0] == outcome


def work_on_bad_inputs(pipe):
    """As fuzz_inputs.work, with inputs that only end their process or never end."""
    fuzz_targets.TARGETS.update(
        {"hang": (hang, 1), "spin": (spin, 1), "crash": (crash, 1), "good": (lambda r, place: None, 1)}
    )
    pipe.send(None)
    while True:
        kind, seed = pipe.recv()
        pipe.send(fuzz_inputs.attempt(kind, seed))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts a process's time as Linux does")
def test_inputs_that_hang_or_kill_their_process_are_named_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(fuzz_inputs, "work", work_on_bad_inputs)
    monkeypatch.setattr(fuzz_inputs, "START_METHOD", "fork")  # quicker than importing torch anew each time
    monkeypatch.setattr(fuzz_inputs, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz_inputs, "CLOCK_SECONDS", 1.0)
    kinds = ("good", "hang", "spin", "crash", "good")
    done = fuzz_inputs.run_all([(kind, number) for number, kind in enumerate(kinds)], n_workers=1)
    assert [(entry[0], entry[2]) for entry in done] == [
        *(("good", "accepted"), ("hang", "timeout"), ("spin", "timeout"), ("crash", "crash"), ("good", "accepted"))
    ]


def test_an_input_is_the_same_every_time():
    assert fuzz_inputs.inputs(50, 3) == fuzz_inputs.inputs(50, 3)
    assert fuzz_inputs.inputs(50, 3) != fuzz_inputs.inputs(50, 4)
