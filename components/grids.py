"""Sizes: grid resolutions, sample counts, and the schedule by which a field grows (TensoRF, section 4 and code).

Letters: aabb [2, 3] box, N (x, y, z) grid points an axis.
"""

import math

import torch
from torch import Tensor


def resolution_for(n_voxels: int, aabb: Tensor) -> tuple[int, int, int]:
    """Grid points an axis, floor(extent / voxel) with voxel = (volume / n_voxels)^(1/3); at least 2 an axis."""
    extent = (aabb[1] - aabb[0]).float()
    voxel = (extent.prod() / n_voxels).pow(1 / 3)
    return tuple(max(int(n), 2) for n in (extent / voxel).long().tolist())


def step_length(aabb: Tensor, grid: tuple[int, int, int], step_ratio: float) -> float:
    """Distance between samples, world units: mean over axes of extent/(N - 1), times step_ratio."""
    units = (aabb[1] - aabb[0]) / (torch.tensor(grid, device=aabb.device) - 1)
    return (units.mean() * step_ratio).item()


def training_samples(grid: tuple[int, int, int], step_ratio: float, limit: int) -> int:
    """Samples a ray while training: min(limit, floor(|N| / step_ratio))."""
    return min(int(limit), int(math.sqrt(sum(n * n for n in grid)) / step_ratio))


def evaluation_samples(aabb: Tensor, step: float) -> int:
    """Samples a ray at test time: floor(diagonal / step) + 1."""
    diagonal = (aabb[1] - aabb[0]).square().sum().sqrt()
    return int((diagonal / step).item()) + 1


def voxel_schedule(n_initial: int, n_final: int, n_upsamplings: int) -> list[int]:
    """Voxel counts after each upsampling: a geometric sequence from n_initial (left out) to n_final."""
    if n_upsamplings == 0:
        return []
    logs = torch.linspace(math.log(n_initial), math.log(n_final), n_upsamplings + 1)
    return torch.round(torch.exp(logs)).long().tolist()[1:]


def learning_rate_factor(target_ratio: float, decay_iters: int, n_iters: int) -> float:
    """Factor of every step's learning rates, target_ratio^(1/decay_iters); decay_iters -1 means n_iters."""
    return target_ratio ** (1.0 / (decay_iters if decay_iters > 0 else n_iters))


def grid_coordinates(aabb: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """World positions [Nx, Ny, Nz, 3] of the points of a grid whose corners are the box's."""
    axes = [torch.linspace(0, 1, n, device=aabb.device, dtype=aabb.dtype) for n in grid]
    s = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return aabb[0] * (1 - s) + aabb[1] * s
