"""TensorCP: the CANDECOMP/PARAFAC decomposition, section 4.1 of TensoRF (arXiv:2203.09517)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.field import Field, factor
from models.kernels.torch_lookups import LINE_AXES

_INITIAL_SCALE = 0.2


class TensorCP(Field):
    """C components, each the product of three lines [1, C, N, 1]; density and appearance apart."""

    def build_factors(self) -> None:
        self.density_line = self._random_lines(self.config.n_density[0])
        self.app_line = self._random_lines(self.config.n_appearance[0])

    def _random_lines(self, count: int) -> nn.ParameterList:
        return nn.ParameterList(factor(_INITIAL_SCALE * torch.randn(1, count, self.grid_size[w], 1)) for w in LINE_AXES)

    def density_feature(self, xyz: Tensor) -> Tensor:
        return self.kernels.lookups.cp_density(list(self.density_line), xyz)

    def appearance_feature(self, xyz: Tensor) -> Tensor:
        return self.kernels.lookups.cp_appearance(list(self.app_line), self.basis_mat.weight, xyz)

    def density_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], list(self.density_line)

    def appearance_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], list(self.app_line)

    def factor_slices(self, first: list[int], last: list[int]) -> dict[str, tuple[slice, ...]]:
        """For each factor, by parameter name, the part that holds the grid points first..last - 1 of each axis."""
        everything = slice(None)
        return {
            f"{kind}_line.{m}": (everything, everything, slice(first[w], last[w]), everything)
            for kind in ("density", "app")
            for m, w in enumerate(LINE_AXES)
        }

    def resize_factors(self, grid: tuple[int, int, int]) -> None:
        """Resample all factors to `grid` points an axis (linear, corners aligned)."""
        for lines in (self.density_line, self.app_line):
            for m, w in enumerate(LINE_AXES):
                line = lines[m].detach()
                lines[m] = factor(interpolate(line, size=(grid[w], 1), mode="bilinear", align_corners=True))
