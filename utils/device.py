"""What the computer is called, for tables that say where a figure was measured."""

import platform
from pathlib import Path

import torch


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
