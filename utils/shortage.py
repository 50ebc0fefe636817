"""Memory that does not suffice, in one line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from utils.device import device_name
from utils.errors import MemoryShortage
from utils.memory import MemoryMeter

# How torch on a CPU, CUDA's libraries, C++ and OpenCV say it; torch's CUDA allocator and numpy have types of their own.
_SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc|bad allocation|Insufficient memory"
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on the device or in the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    foreign = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    return foreign and _SHORTAGE.search(str(error)) is not None


@contextmanager
def naming_shortage(device: torch.device, memory: MemoryMeter | None, settings: Mapping[str, object]) -> Iterator[None]:
    """Turn a lack of memory in the block into a MemoryShortage: one line with the peak so far, and `settings`, the
    options that lower it with their values. memory: training's; None where only a checkpoint is rendered."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        options = ", ".join(f"--{name} ({value})" for name, value in settings.items())
        if memory is None:
            raise MemoryShortage(f"out of memory on {device_name(device)}: lower {options}") from error
        raise MemoryShortage(
            f"out of memory on {device_name(device)}, of which training had used up to {memory.peak_mb():.0f} MB so "
            f"far: lower {options}, --es_ratio of strategy expansive, or for evaluations --eval_chunk (the last with "
            "the run as it is, others with --overwrite or a new --tag); the last checkpoint is whole"
        ) from error
