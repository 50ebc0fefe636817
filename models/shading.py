"""From appearance features and view directions to colours: the five shadings of TensoRF.

Letters: K points, F = data_dim_color features, C hidden units. Every module maps
(features [K, F], view directions [K, 3] unit, position [K, 3] normalised to [-1, 1]) -> rgb [K, 3].
The networks keep TensoRF's parameter names (`mlp.0`, `mlp.2`, `mlp.4`), so that its checkpoints fit.
"""

import torch
from torch import Tensor, nn

from components.encodings import positional_encoding, spherical_harmonics
from models.rounded_products import rounded_mlp


class _NetworkShading(nn.Module):
    """Two hidden layers with ReLU and a sigmoid on what `inputs` puts together."""

    def __init__(self, n_inputs: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(n_inputs, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 3),
        )
        nn.init.zeros_(self.mlp[4].bias)
        self.dtype = torch.float32  # of the matrix products; parameters and results are float32

    def inputs(self, features: Tensor, view: Tensor, position: Tensor) -> list[Tensor]:
        """The parts of the network's input, each [K, *]."""
        raise NotImplementedError

    def forward(self, features: Tensor, view: Tensor, position: Tensor) -> Tensor:
        x = torch.cat(self.inputs(features, view, position), dim=-1)
        if self.dtype == torch.float32:
            return torch.sigmoid(self.mlp(x))
        if x.device.type == "cpu":
            return torch.sigmoid(rounded_mlp(self.mlp, x))
        # Without the cache of casts, which threads would share.
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            out = self.mlp(x)
        return torch.sigmoid(out.float())


class FeatureNetwork(_NetworkShading):
    """`MLP_Fea`: features, view, their encodings."""

    def __init__(self, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int) -> None:
        super().__init__(n_features * (1 + 2 * fea_pe) + 3 * (1 + 2 * view_pe), hidden)
        self.view_pe, self.fea_pe = view_pe, fea_pe

    def inputs(self, features: Tensor, view: Tensor, position: Tensor) -> list[Tensor]:
        encoded = [positional_encoding(features, self.fea_pe), positional_encoding(view, self.view_pe)]
        return [features, view, *encoded]


class ViewNetwork(_NetworkShading):
    """`MLP`: features, view, encoding of the view."""

    def __init__(self, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int) -> None:
        super().__init__(n_features + 3 * (1 + 2 * view_pe), hidden)
        self.view_pe = view_pe

    def inputs(self, features: Tensor, view: Tensor, position: Tensor) -> list[Tensor]:
        return [features, view, positional_encoding(view, self.view_pe)]


class PositionNetwork(_NetworkShading):
    """`MLP_PE`: features, view, position, encodings of position and view."""

    def __init__(self, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int) -> None:
        super().__init__(n_features + 3 * (1 + 2 * view_pe) + 3 * (1 + 2 * pos_pe), hidden)
        self.view_pe, self.pos_pe = view_pe, pos_pe

    def inputs(self, features: Tensor, view: Tensor, position: Tensor) -> list[Tensor]:
        encoded = [positional_encoding(position, self.pos_pe), positional_encoding(view, self.view_pe)]
        return [features, view, position, *encoded]


class SphericalHarmonicsShading(nn.Module):
    """`SH`: features are [3 channels, 9] coefficients of degree 2; rgb = relu(sum + 0.5)."""

    def __init__(self, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int) -> None:
        super().__init__()
        if n_features != 27:
            raise ValueError(f"SH shading needs 27 features (3 channels x 9 coefficients), not {n_features}")

    def forward(self, features: Tensor, view: Tensor, position: Tensor) -> Tensor:
        bases = spherical_harmonics(view)[:, None]
        return torch.relu((bases * features.view(-1, 3, 9)).sum(-1) + 0.5)


class RGBShading(nn.Module):
    """`RGB`: the features are the colour."""

    def __init__(self, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int) -> None:
        super().__init__()
        if n_features != 3:
            raise ValueError(f"RGB shading needs 3 features, not {n_features}")

    def forward(self, features: Tensor, view: Tensor, position: Tensor) -> Tensor:
        return features


SHADINGS: dict[str, type[nn.Module]] = {
    "MLP_Fea": FeatureNetwork,
    "MLP": ViewNetwork,
    "MLP_PE": PositionNetwork,
    "SH": SphericalHarmonicsShading,
    "RGB": RGBShading,
}


def build_shading(
    mode: str, n_features: int, view_pe: int, fea_pe: int, pos_pe: int, hidden: int, dtype: str = "float32"
) -> nn.Module:
    """The shading called `mode`; pe are numbers of frequencies, hidden the units of a layer, dtype that of a network's
    matrix products."""
    shading = SHADINGS[mode](n_features, view_pe, fea_pe, pos_pe, hidden)
    shading.dtype = getattr(torch, dtype)
    return shading
