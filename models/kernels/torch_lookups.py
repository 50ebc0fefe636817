"""Lookups in the factors with torch's own grid_sample: the definition that every other backend must equal.

Letters: K points xyz [K, 3] normalised to [-1, 1] in the box; for mode m: plane [1, C_m, N_v, N_u] over the axes
PLANE_AXES[m] = (u, v), line [1, C_m, N_w, 1] along LINE_AXES[m] = w. Corners are aligned, texels outside are zero.
Eqs. 3-5 and 9 of TensoRF (arXiv:2203.09517).
"""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

PLANE_AXES = ((0, 1), (0, 2), (1, 2))
LINE_AXES = (2, 1, 0)


def _plane_lookup(plane: Tensor, xyz: Tensor, axes: tuple[int, int]) -> Tensor:
    """[C, K] bilinear."""
    grid = torch.stack([xyz[:, axes[0]], xyz[:, axes[1]]], dim=-1).view(1, -1, 1, 2)
    return grid_sample(plane, grid, align_corners=True).view(plane.shape[1], -1)


def _line_lookup(line: Tensor, xyz: Tensor, axis: int) -> Tensor:
    """[C, K] linear."""
    w = xyz[:, axis]
    grid = torch.stack([torch.zeros_like(w), w], dim=-1).view(1, -1, 1, 2)
    return grid_sample(line, grid, align_corners=True).view(line.shape[1], -1)


def vm_density(planes: list[Tensor], lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]: sum over modes and components of plane * line."""
    total = xyz.new_zeros(xyz.shape[0])
    for plane, line, axes, axis in zip(planes, lines, PLANE_AXES, LINE_AXES, strict=True):
        total = total + (_plane_lookup(plane, xyz, axes) * _line_lookup(line, xyz, axis)).sum(0)
    return total


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]: products plane * line of all modes [K, sum C_m] times basis [F, sum C_m]."""
    products = [
        _plane_lookup(plane, xyz, axes) * _line_lookup(line, xyz, axis)
        for plane, line, axes, axis in zip(planes, lines, PLANE_AXES, LINE_AXES, strict=True)
    ]
    return torch.cat(products).T @ basis.T


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]: sum over components of the product of three lines."""
    return _line_products(lines, xyz).sum(0)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]: products of three lines [K, C] times basis [F, C]."""
    return _line_products(lines, xyz).T @ basis.T


def _line_products(lines: list[Tensor], xyz: Tensor) -> Tensor:
    first, second, third = (_line_lookup(line, xyz, axis) for line, axis in zip(lines, LINE_AXES, strict=True))
    return first * second * third
