"""The device of a run, and what the computer is called, for tables that say where a figure was measured."""

import functools
import platform
from pathlib import Path

import torch

from utils.console import say
from utils.errors import OptionError


def choose_device(name: str) -> torch.device:
    """The device of `--device`; auto takes CUDA when there is one. Raises OptionError if it is not there."""
    if name == "auto":
        if not torch.cuda.is_available():
            _tell_cpu()
            return torch.device("cpu")
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device auto"
        )
    if device.type == "cuda":
        # Tensors name their device with its index; so do we, to compare. Timing events go to the current device.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = False  # convolutions are those of SSIM, LPIPS and edges
    return device


@functools.cache
def _tell_cpu() -> None:
    """Once a process, which may look at many runs."""
    say("no CUDA device found: using the CPU")


def device_name(device: torch.device) -> str:
    """For example "NVIDIA H200", or "AMD EPYC (CPU, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} (CPU, {torch.get_num_threads()} threads)"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
