"""The alpha mask: which parts of space are worth sampling.

Letters: N points, (Nx, Ny, Nz) grid points an axis, volume [Nz, Ny, Nx] bool (z slowest, as in TensoRF's files).
"""

import torch
from torch import Tensor, nn


class AlphaMask(nn.Module):
    """Gates points by a trilinear lookup > 0 of a binary volume whose corner points lie on the box's corners.

    A trilinear value is positive exactly if a corner of the cell is set and has weight; so each cell stores its
    eight corners as the bits of one byte, and a query is one gather instead of eight. Corners outside the volume
    count as empty (zero padding). Equal to `grid_sample(volume, points) > 0` to the bit (tests/test_alpha_mask.py).
    """

    def __init__(self, volume: Tensor, aabb: Tensor) -> None:
        """volume: [Nz, Ny, Nx] bool; aabb: [2, 3], world units."""
        super().__init__()
        self.register_buffer("aabb", aabb.detach().clone())
        # [3]: world units to the box's [-1, 1].
        self.register_buffer("scale", 1.0 / (self.aabb[1] - self.aabb[0]) * 2, persistent=False)
        self.register_buffer("cells", _corner_bits(volume))
        self.register_buffer("allowed", _allowed_corners().to(volume.device))
        self.register_buffer("size", torch.tensor(self.grid_size, device=volume.device))

    @property
    def volume(self) -> Tensor:
        """[Nz, Ny, Nx] bool."""
        return (self.cells[1:, 1:, 1:] & 1).bool()

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """(Nx, Ny, Nz)."""
        z, y, x = (n - 1 for n in self.cells.shape)
        return x, y, z

    @torch.no_grad()
    def occupied(self, xyz: Tensor) -> Tensor:
        """[N] bool for world points xyz [N, 3]."""
        n = self.size
        normalised = (xyz - self.aabb[0]) * self.scale - 1
        # The same expression as torch's grid_sample with aligned corners, so that cell borders agree.
        position = ((normalised + 1) / 2) * (n - 1)
        lower = position.floor()
        off_grid = position > lower
        cell = lower.long() + 1
        inside = ((cell >= 0) & (cell <= n)).all(-1)
        cell = torch.minimum(cell.clamp_min(0), n)
        x, y, z = cell.unbind(-1)
        bits = self.cells.flatten()[(z * (n[1] + 1) + y) * (n[0] + 1) + x]
        which = off_grid[:, 0].long() + 2 * off_grid[:, 1] + 4 * off_grid[:, 2]
        return ((bits & self.allowed[which]) != 0) & inside


def _corner_bits(volume: Tensor) -> Tensor:
    """[Nz+1, Ny+1, Nx+1] uint8: bit dx + 2*dy + 4*dz of cell (z, y, x) is the corner (z+dz-1, y+dy-1, x+dx-1)."""
    padded = nn.functional.pad(volume.to(torch.uint8), (1, 1, 1, 1, 1, 1))
    nz, ny, nx = (n + 1 for n in volume.shape)
    cells = torch.zeros(nz, ny, nx, dtype=torch.uint8, device=volume.device)
    for bit in range(8):
        dx, dy, dz = bit & 1, bit >> 1 & 1, bit >> 2
        cells |= padded[dz : dz + nz, dy : dy + ny, dx : dx + nx] << bit
    return cells


def _allowed_corners() -> Tensor:
    """[8] uint8: which corners have weight for a point that lies between grid points along the axes in the index."""
    return torch.tensor([sum(1 << c for c in range(8) if c & ~axes == 0) for axes in range(8)], dtype=torch.uint8)
