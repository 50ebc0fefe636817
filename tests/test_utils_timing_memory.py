import gc
import mmap
import time

import numpy as np
import pytest
import torch

from utils import memory
from utils.memory import MB, MemoryMeter, objects_set_aside, tensors_mb
from utils.timing import PHASES, PhaseTimer, eta_text

SIZE_MB = 64


@pytest.fixture(params=["kernel counter", "polling"])
def meter(request, monkeypatch):
    counter = memory._resident_peak if request.param == "kernel counter" else memory._PolledPeak
    monkeypatch.setattr(memory, "_resident_peak", counter)
    return MemoryMeter("cpu")


def touch(mb: int) -> np.ndarray:
    """Resident memory of `mb` MB, in place long enough to be seen by a poller.

    Not from malloc: keep_freed_memory, in a training before this test, makes it keep what is freed.
    """
    block = np.frombuffer(mmap.mmap(-1, mb * MB), np.uint8)
    block[:] = 1
    time.sleep(5 * memory.POLL_SECONDS)
    return block


def test_phases_accumulate_and_are_spread_over_all_steps():
    timer = PhaseTimer("cpu")
    for step in range(4):
        with timer.phase("forward"):
            time.sleep(0.002)
        if step == 0:
            with timer.phase("grow"):
                time.sleep(0.008)
    per_step = timer.ms_per_step()
    assert set(per_step) == set(PHASES)
    assert per_step["backward"] == 0.0
    assert 2.0 <= per_step["forward"] < 20.0
    assert per_step["grow"] == pytest.approx(timer.seconds["grow"] * 1000 / 4)
    assert timer.ms_per_step(8)["forward"] == pytest.approx(per_step["forward"] / 2)


def test_an_unknown_phase_is_refused():
    with pytest.raises(KeyError, match="lunch"), PhaseTimer("cpu").phase("lunch"):
        pass


def test_totals_of_the_timer_survive_a_resume():
    first = PhaseTimer("cpu")
    with first.phase("sampler"):
        time.sleep(0.003)
    second = PhaseTimer("cpu")
    second.load_state_dict(first.state_dict())
    with second.phase("sampler"):
        time.sleep(0.003)
    assert second.seconds["sampler"] > first.seconds["sampler"] >= 0.003
    assert second.ms_per_step()["sampler"] == pytest.approx(second.seconds["sampler"] * 500)


class FakeEvent:
    """A CUDA event whose clock the test turns; counts how often anybody waited."""

    clock, waits, made = 0.0, 0, 0

    def __init__(self, enable_timing):
        FakeEvent.made += 1

    def record(self):
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return end.at - self.at

    def synchronize(self):
        FakeEvent.waits += 1


def test_cuda_phases_wait_for_the_device_only_in_collect_and_reuse_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = PhaseTimer("cuda")
    for _ in range(3):
        for _ in range(10):
            with timer.phase("backward"):
                FakeEvent.clock += 5.0
        assert timer.seconds["backward"] * 1000 == pytest.approx(FakeEvent.clock - 50.0)
        timer.collect()
        assert timer.seconds["backward"] * 1000 == pytest.approx(FakeEvent.clock)
    assert FakeEvent.waits == 3
    assert FakeEvent.made == 20
    assert timer.ms_per_step()["backward"] == pytest.approx(5.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_time_covers_the_work_and_cuda_peak_covers_the_tensor():
    meter, timer = MemoryMeter("cuda"), PhaseTimer("cuda")
    meter.start()
    with timer.phase("forward"):
        block = torch.ones(SIZE_MB * MB, dtype=torch.uint8, device="cuda")
    assert timer.ms_per_step()["forward"] > 0.0
    assert meter.allocated_mb() >= SIZE_MB
    del block
    assert meter.peak_mb() >= SIZE_MB


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (310, "5 min 10 s"),
        (4320, "1 h 12 min"),
        (86399, "1 d 0 h"),
        (183600, "2 d 3 h"),
        (-3, "0 s"),
    ],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, text):
    assert eta_text(seconds) == text


def test_the_peak_remembers_memory_that_was_freed(meter):
    meter.start()
    block = touch(SIZE_MB)
    held = meter.allocated_mb()
    del block
    assert held > 0.8 * SIZE_MB
    assert meter.peak_mb() > 0.8 * SIZE_MB
    assert meter.allocated_mb() < 0.5 * SIZE_MB


def test_memory_of_before_the_start_and_between_segments_is_left_out(meter):
    before = touch(SIZE_MB)
    meter.start()
    meter.close_segment(0.0)
    block = touch(4 * SIZE_MB)
    del block
    assert meter.peak_mb() < SIZE_MB
    meter.begin_segment()
    assert meter.peak_mb() < SIZE_MB
    del before


def test_the_step_part_of_the_peak_is_what_exceeds_the_static_part(meter):
    meter.start()
    block = touch(2 * SIZE_MB)
    meter.close_segment(0.5 * SIZE_MB)
    del block
    assert 1.2 * SIZE_MB < meter.step_mb() < 2 * SIZE_MB
    assert meter.step_mb() < meter.peak_mb()


def test_the_peak_of_a_resumed_run_is_the_largest_of_its_segments(meter):
    meter.start()
    meter.load_state_dict({"peak_bytes": 5000 * MB, "step_bytes": 900 * MB})
    assert meter.peak_mb() == 5000
    assert meter.step_mb() == 900
    meter.load_state_dict({"peak_bytes": 10 * MB, "step_bytes": 10 * MB})
    assert meter.state_dict() == {"peak_bytes": 5000 * MB, "step_bytes": 900 * MB}


def test_tensors_that_share_storage_are_counted_once():
    base = torch.zeros(MB, dtype=torch.float32)
    assert tensors_mb([base, base[:10], base.view(2, -1)]) == 4.0
    assert tensors_mb([base, base.clone()]) == 8.0


def test_objects_set_aside_are_looked_at_again_afterwards():
    with objects_set_aside():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_memory_that_no_counter_sees_counts_in_the_peak_and_in_its_own_segments_step():
    meter = MemoryMeter("cpu")
    meter.start()
    meter.begin_segment(0.0)
    before = meter.close_segment(0.0)
    meter.unseen_mb = 5000.0
    meter.begin_segment(0.0)
    assert meter.close_segment(0.0) == pytest.approx(before + 5000.0, abs=500.0)
    meter.unseen_mb = 0.0
    meter.begin_segment(0.0)
    assert meter.close_segment(0.0) < 1000.0
    assert meter.peak_mb() >= 5000.0
    assert meter.step_mb() >= 5000.0
