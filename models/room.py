"""Whether a machine can hold what options ask for: told before the first step instead of in the middle of a night."""

import math
from argparse import Namespace
from pathlib import Path

import torch

from components.grids import voxel_schedule
from models.config import FieldConfig
from models.sizes import CHECKPOINT_BYTES, TRAINING_BYTES, n_parameters
from utils.resources import GB, folder_fault, free_space, total_memory

# The two kept and the one being written.
CHECKPOINTS = 3
# Of a ray at the very least: origin, direction, colours and their gradients.
BYTES_A_RAY = 64
# Of a pixel of a test view: rendering and depth as PNG, and the video.
BYTES_A_PIXEL = 4


def room_faults(
    options: Namespace, config: FieldConfig, image_bytes: int, test_pixels: int, folder: Path, device: torch.device
) -> tuple[list[str], list[str]]:
    """(faults: what surely cannot be met; notes: what may not be), each a line that names option and remedy.

    image_bytes: of the decoded pictures; test_pixels: of the views that are scored; folder: where the run will lie.
    """
    size = least_parameters(options, config)
    faults, notes = [], []
    for what, need, remedy in (
        ("the field", TRAINING_BYTES * size, f"lower --N_voxel_final ({options.N_voxel_final}) or the components"),
        ("the rays of a step", BYTES_A_RAY * options.batch_size, f"lower --batch_size ({options.batch_size})"),
    ):
        if need + image_bytes > total_memory(device):
            have = total_memory(device) / GB
            faults.append(f"{what} and the images need {(need + image_bytes) / GB:.3g} GB of {have:.3g} GB: {remedy}")
    fault = folder_fault(folder)
    if fault:
        return [*faults, f"cannot write {folder} ({fault}): choose a --save_dir that can be written"], notes
    checkpoint = CHECKPOINT_BYTES * size
    wanted, free = CHECKPOINTS * checkpoint + BYTES_A_PIXEL * test_pixels, free_space(folder)
    line = f"{folder}: about {wanted / GB:.2g} GB will be written, {free / GB:.2g} GB are free"
    # What an earlier run left there may make room.
    if free < checkpoint and not folder.exists():
        faults.append(f"{line}, less than one checkpoint: free some space or choose another --save_dir")
    elif free < wanted:
        notes.append(f"{line}: it may not suffice")
    return faults, notes


def least_parameters(options: Namespace, config: FieldConfig) -> int:
    """Numbers in the field at its largest, if its grid is a cube; any other box takes more."""
    voxels = voxel_schedule(options.N_voxel_init, options.N_voxel_final, len(options.upsamp_list))
    reached = [v for step, v in zip(options.upsamp_list, voxels, strict=True) if step < options.n_iters]
    side = max(math.floor(([options.N_voxel_init, *reached][-1]) ** (1 / 3)), 2)
    return n_parameters(config, (side, side, side))
