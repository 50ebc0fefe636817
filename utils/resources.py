"""What the machine can hold: memory, and space and permission in a folder."""

import os
import shutil
from pathlib import Path

import psutil
import torch

GB = 2**30


def total_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that the device has in all; more than that can surely not be had."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def folder_fault(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which need not exist yet; None if it can."""
    existing = _existing_parent(folder)
    if not existing.is_dir():
        return f"{existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} does not permit it"
    return None


def free_space(folder: Path) -> int:
    """Bytes that can still be written below `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing_parent(folder)).free


def _existing_parent(folder: Path) -> Path:
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
