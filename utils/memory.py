"""Peak memory while training. One unit everywhere: 1 MB here is 2**20 bytes.

On CUDA the figure is the allocator's peak (`torch.cuda.max_memory_allocated`), whatever the process cached or the
driver holds. On a CPU it is the growth of resident memory since `start`: Linux counts the peak itself (VmHWM, which
writing 5 to /proc/self/clear_refs resets, see proc(5)); elsewhere a thread looks every few milliseconds. There, what a
step takes is counted from the memory at rest, which besides what stays holds libraries that were loaded since.
"""

import ctypes
import gc
import importlib
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

MB = 2**20
POLL_SECONDS = 0.02
# A kernel that ignores the reset leaves a peak far above the present; counters of one process differ by less.
RESET_SLACK_BYTES = 4 * MB


def tensors_mb(tensors: Iterable[Tensor]) -> float:
    """Memory of tensors in MB (2**20 bytes); tensors that share storage are counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()) / MB


class MemoryMeter:
    """Peak memory of the device while training, in MB (2**20 bytes), counted in segments of training steps.

    Call `start` before the scene is loaded, `begin_segment` and `close_segment` round stretches of steps. The peak of
    a resumed run is the largest of its segments'.
    """

    def __init__(self, device: torch.device | str):
        device = torch.device(device)
        self._counter = _CudaPeak(device) if device.type == "cuda" else _resident_peak()
        self._peak_bytes = self._step_bytes = self._rest_bytes = 0
        self._counting = False
        # What the steps of a segment need and the counter does not see: CUDA graphs are replayed in memory that the
        # allocator counts as free.
        self.unseen_mb = 0.0

    def start(self) -> None:
        """Begin to measure; on a CPU the resident memory of this moment becomes the zero."""
        self._counter.set_baseline()
        self.begin_segment()

    def begin_segment(self, static_mb: float | None = None) -> None:
        """Count from here: what came since `start` or `close_segment` (loading, an evaluation) is left out.

        static_mb: what stays allocated, if nothing else is needed at this moment; None: count all above the baseline.
        """
        self._rest_bytes = 0 if static_mb is None else max(self._counter.at_rest() - static_mb * MB, 0)
        self._counter.reset()
        self._counting = True

    def close_segment(self, static_mb: float) -> float:
        """End a stretch of training steps in which static_mb (pixels, parameters, optimiser) stayed allocated.

        Returns what these steps took beyond that, MB (2**20 bytes); 0 if no stretch is open.
        """
        if not self._counting:
            return 0.0
        step_bytes = max(self._peak_now() - static_mb * MB - self._rest_bytes, 0)
        self._step_bytes = max(self._step_bytes, step_bytes)
        self._take_peak()
        self._counting = False
        return step_bytes / MB

    def peak_mb(self) -> float:
        """Largest memory so far, MB (2**20 bytes)."""
        self._take_peak()
        return self._peak_bytes / MB

    def step_mb(self) -> float:
        """Largest memory that steps took beyond what was static in their segment, MB (2**20 bytes)."""
        return self._step_bytes / MB

    def allocated_mb(self) -> float:
        """Memory at this moment, MB (2**20 bytes): allocated on the device, or the growth of resident memory."""
        return max(self._counter.now(), 0) / MB

    def state_dict(self) -> dict:
        """The peaks so far, plain numbers."""
        self._take_peak()
        return {"peak_bytes": int(self._peak_bytes), "step_bytes": int(self._step_bytes)}

    def load_state_dict(self, state: Mapping) -> None:
        """Take over the peaks of earlier segments; the larger ones count."""
        self._peak_bytes = max(self._peak_bytes, int(state["peak_bytes"]))
        self._step_bytes = max(self._step_bytes, int(state["step_bytes"]))

    def _take_peak(self) -> None:
        if self._counting:
            self._peak_bytes = max(self._peak_bytes, self._peak_now())

    def _peak_now(self) -> int:
        return self._counter.peak() + round(self.unseen_mb * MB)


class _CudaPeak:
    """Bytes of torch's CUDA allocator."""

    def __init__(self, device: torch.device):
        torch.cuda.init()  # the allocator counts only from then on
        self._device = device

    def set_baseline(self) -> None:
        """The allocator counts from zero already."""

    def at_rest(self) -> int:
        """The allocator counts tensors alone."""
        return 0

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)


class _ResidentPeak:
    """Bytes of resident memory above a baseline, the peak counted by the Linux kernel."""

    def __init__(self):
        self._baseline = _resident_bytes()

    def set_baseline(self) -> None:
        # The first optimiser, or whatever else comes first, loads it: 140 MB that are no run's.
        importlib.import_module("torch._dynamo")
        _return_freed_memory()
        self._baseline = _resident_bytes()

    def at_rest(self) -> int:
        """Resident bytes above the baseline when what was freed is given back."""
        _return_freed_memory()
        return self.now()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status_bytes("VmHWM") - self._baseline

    def now(self) -> int:
        return _resident_bytes() - self._baseline


class _PolledPeak(_ResidentPeak):
    """The same, where no counter can be reset: a thread looks at the resident memory again and again."""

    def __init__(self):
        super().__init__()
        self._highest = self._baseline
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self._highest = _resident_bytes()
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, daemon=True, name="memory-meter")
            self._thread.start()

    def peak(self) -> int:
        self._highest = max(self._highest, _resident_bytes())
        return self._highest - self._baseline

    def _poll(self) -> None:
        pause = threading.Event()
        while not pause.wait(POLL_SECONDS):
            self._highest = max(self._highest, _resident_bytes())


def _resident_peak() -> _ResidentPeak:
    """The kernel's counter where it can be reset, else polling."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        counter_works = _status_bytes("VmHWM") <= _resident_bytes() + RESET_SLACK_BYTES
    except OSError:
        counter_works = False
    return _ResidentPeak() if counter_works else _PolledPeak()


def _return_freed_memory() -> None:
    """Give what malloc holds back to the system, where its C library can (glibc): memory that was freed before the
    baseline and is used again after it would else not be seen to grow."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _status_bytes(key: str) -> int:
    """A size of /proc/self/status, such as VmHWM, in bytes; OSError where it is not told."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, up to blocks of 32 MB, for the next step (glibc; elsewhere nothing happens).

    Otherwise every step gives its tensors' memory back to the system and gets it again a page at a time: a tenth of
    the time of a short step on a CPU.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc, another system
        return
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def objects_set_aside() -> Iterator[None]:
    """Within, Python's garbage collector leaves alone all objects that are there now.

    Imports leave half a million; looking through them again and again took 5 % of a step's time on a CPU.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
