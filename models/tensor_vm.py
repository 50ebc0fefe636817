"""TensorVMSplit: the vector-matrix decomposition, section 4.1 of TensoRF (arXiv:2203.09517)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.field import Field, factor
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

_INITIAL_SCALE = 0.1


class TensorVMSplit(Field):
    """For each mode m, C_m planes [1, C_m, N_v, N_u] times C_m lines [1, C_m, N_w, 1]; density and appearance apart."""

    def build_factors(self) -> None:
        self.density_plane, self.density_line = self._random_factors(self.config.n_density)
        self.app_plane, self.app_line = self._random_factors(self.config.n_appearance)

    def _random_factors(self, components: tuple[int, ...]) -> tuple[nn.ParameterList, nn.ParameterList]:
        planes, lines = nn.ParameterList(), nn.ParameterList()
        for count, (u, v), w in zip(components, PLANE_AXES, LINE_AXES, strict=True):
            size = self.grid_size
            planes.append(factor(_INITIAL_SCALE * torch.randn(1, count, size[v], size[u])))
            lines.append(factor(_INITIAL_SCALE * torch.randn(1, count, size[w], 1)))
        return planes, lines

    def density_feature(self, xyz: Tensor) -> Tensor:
        return self.kernels.lookups.vm_density(list(self.density_plane), list(self.density_line), xyz)

    def appearance_feature(self, xyz: Tensor) -> Tensor:
        return self.kernels.lookups.vm_appearance(list(self.app_plane), list(self.app_line), self.basis_mat.weight, xyz)

    def density_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.density_plane), list(self.density_line)

    def appearance_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.app_plane), list(self.app_line)

    def factor_slices(self, first: list[int], last: list[int]) -> dict[str, tuple[slice, ...]]:
        """For each factor, by parameter name, the part that holds the grid points first..last - 1 of each axis."""
        everything, slices = slice(None), {}
        for m, ((u, v), w) in enumerate(zip(PLANE_AXES, LINE_AXES, strict=True)):
            plane = (everything, everything, slice(first[v], last[v]), slice(first[u], last[u]))
            line = (everything, everything, slice(first[w], last[w]), everything)
            for kind in ("density", "app"):
                slices[f"{kind}_plane.{m}"], slices[f"{kind}_line.{m}"] = plane, line
        return slices

    def resize_factors(self, grid: tuple[int, int, int]) -> None:
        """Resample all factors to `grid` points an axis (bilinear, corners aligned)."""
        for planes, lines in ((self.density_plane, self.density_line), (self.app_plane, self.app_line)):
            for m, ((u, v), w) in enumerate(zip(PLANE_AXES, LINE_AXES, strict=True)):
                planes[m] = factor(_resample(planes[m], (grid[v], grid[u])))
                lines[m] = factor(_resample(lines[m], (grid[w], 1)))


def _resample(values: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(values.detach(), size=size, mode="bilinear", align_corners=True)
