"""The radiance field: what VM and CP share - geometry, density, rendering of rays.

Letters: B rays, K live samples, Kc coloured samples, xyz world positions. How it grows is in models/growth.py.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from components.grids import evaluation_samples, step_length
from components.marching import Samples, normalise
from components.types import Capacity, Rays, RenderOutput
from models import kernels
from models.alpha_mask import AlphaMask
from models.chunks import in_chunks
from models.config import FieldConfig
from models.kernels import compiled_network
from models.shading import build_shading

# Samples whose colours are computed at once: few on a CPU, whose cache they should fit; launches cost more on CUDA.
_COLOUR_CHUNK, _OTHER_COLOUR_CHUNK = {"cpu": 1 << 10}, 1 << 17


def factor(values: Tensor) -> nn.Parameter:
    """A plane or line [1, C, H, W] as a parameter, stored channels-last: all components of a grid point together,
    so that a lookup reads one row of memory and not C of them."""
    return nn.Parameter(values.detach().contiguous(memory_format=torch.channels_last))


def first_places(chosen: Tensor, end: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(places [capacity] int64 of the first true entries before `end`, ascending, then the last place again and again;
    how many true entries there are before `end`, 0-dim): `nonzero` without waiting for the device.

    chosen: [K] bool, K >= 1; end: 0-dim int64.
    """
    number = (chosen & (torch.arange(len(chosen), device=chosen.device) < end)).cumsum(0)
    wanted = torch.arange(1, capacity + 1, device=chosen.device)
    return torch.searchsorted(number, wanted).clamp_(max=len(chosen) - 1), number[-1]


class Field(nn.Module):
    """A factorised radiance field in the box aabb [2, 3] with `grid_size` (x, y, z) points.

    Subclasses make the factors and offer `density_feature`, `appearance_feature`, `density_factors`,
    `appearance_factors`, `factor_slices` and `resize_factors`. Parameter names are TensoRF's.
    """

    def __init__(self, config: FieldConfig, aabb: Tensor, grid_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("aabb", aabb.detach().clone().float())
        self.alpha_mask: AlphaMask | None = None
        self.set_geometry(self.aabb, grid_size)
        self.build_factors()
        n_products = sum(config.n_appearance) if config.model_name == "TensorVMSplit" else config.n_appearance[0]
        self.basis_mat = nn.Linear(n_products, config.n_features, bias=False)
        self.renderModule = build_shading(
            config.shading,
            config.n_features,
            config.view_pe,
            config.fea_pe,
            config.pos_pe,
            config.hidden,
            config.mlp_dtype,
        )
        self.select_kernels()

    def select_kernels(self) -> None:
        """Choose the kernels that suit the device on which the parameters lie."""
        self.kernels = kernels.select(self.aabb.device)

    def set_mlp_dtype(self, name: str) -> None:
        """The colour network's matrix products in float32 or bfloat16; parameters stay as they are."""
        self.config = replace(self.config, mlp_dtype=name)
        self.renderModule.dtype = getattr(torch, name)

    def build_factors(self) -> None:
        """Create the factors for `self.grid_size`."""
        raise NotImplementedError

    def density_feature(self, xyz: Tensor) -> Tensor:
        """[K] from normalised positions [K, 3]."""
        raise NotImplementedError

    def appearance_feature(self, xyz: Tensor) -> Tensor:
        """[K, n_features] from normalised positions [K, 3]."""
        raise NotImplementedError

    def density_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(planes, lines) of the density; CP has no planes."""
        raise NotImplementedError

    def appearance_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(planes, lines) of the appearance; CP has no planes."""
        raise NotImplementedError

    def density_l1(self) -> Tensor:
        """The L1 norm of the density factors, a scalar; see components.regularisers.l1_norm."""
        return self.kernels.l1_norm(*self.density_factors())

    def factor_slices(self, first: list[int], last: list[int]) -> dict[str, tuple[slice, ...]]:
        """For each factor, by parameter name, the part that holds the grid points first..last - 1 of each axis."""
        raise NotImplementedError

    def resize_factors(self, grid: tuple[int, int, int]) -> None:
        """Resample all factors to `grid` points an axis."""
        raise NotImplementedError

    def set_geometry(self, aabb: Tensor, grid_size: tuple[int, int, int]) -> None:
        """Box, grid size and what follows from them: the step length (world units) and sample counts."""
        self.aabb = aabb
        self.grid_size = tuple(int(n) for n in grid_size)
        self.step = step_length(aabb, self.grid_size, self.config.step_ratio)
        self.n_samples = evaluation_samples(aabb, self.step)

    def normalise(self, xyz: Tensor) -> Tensor:
        """World positions [N, 3] to [-1, 1] in the box."""
        return normalise(xyz, self.aabb)

    def density(self, feature: Tensor) -> Tensor:
        """sigma [K], 1/length, of density features [K]."""
        if self.config.density_activation == "softplus":
            return softplus(feature + self.config.density_shift)
        return torch.relu(feature)

    def param_groups(self, lr_grids: float, lr_networks: float) -> list[dict]:
        """Adam's groups: factors learn at lr_grids; basis layer and shading at lr_networks."""
        networks = [*self.basis_mat.parameters(), *self.renderModule.parameters()]
        known = {id(p) for p in networks}
        factors = [p for p in self.parameters() if id(p) not in known]
        return [{"params": factors, "lr": lr_grids}, {"params": networks, "lr": lr_networks}]

    def march(self, rays: Rays, jitter: Tensor | None, n_samples: int, capacity: int | None = None) -> Samples:
        """Live samples of the rays: in the box and in the alpha mask. capacity: see `render`."""
        c, rendering = self.config, self.kernels.rendering
        ends = (n_samples, jitter, self.alpha_mask)
        room = {} if capacity is None else {"capacity": capacity}
        if c.ndc:
            return rendering.march_ndc(rays, self.aabb, c.near, c.far, *ends, **room)
        return rendering.march_box(rays, self.aabb, c.near, c.far, self.step, *ends, **room)

    def render(
        self,
        rays: Rays,
        background: Tensor | float,
        jitter: Tensor | None = None,
        n_samples: int | None = None,
        capacity: Capacity | None = None,
    ) -> RenderOutput:
        """Volume rendering of rays [B].

        background: colour behind the scene, scalar, [3] or [B, 3]. jitter: u [B, 1] (NDC: [B or 1, S]) in [0, 1);
        None for evaluation. n_samples: S, at most that many samples a ray; default: the test-time count.
        capacity: room for samples (`kernels.fixed_shapes`), so that all shapes are known beforehand and nothing
        waits for the device; samples for which there is no room are left out: compare n_live and n_colour with it.
        """
        c, rendering = self.config, self.kernels.rendering
        samples = self.march(rays, jitter, n_samples or self.n_samples, capacity and capacity.live)
        weights = self.weights(samples)
        coloured = weights > c.weight_threshold
        if capacity is None:
            # On CUDA a step waits for the device twice: in march_box for the number of live samples, and here.
            coloured = coloured.nonzero()[:, 0]
            n_live, n_colour = len(samples), coloured.shape[0]
        else:
            coloured, n_colour = first_places(coloured, samples.offsets[-1], capacity.coloured)
            n_live = samples.n_live
        view = rays.directions
        if c.ndc:
            view = view / torch.linalg.vector_norm(view, dim=-1, keepdim=True)
        position, ray = (x.index_select(0, coloured) for x in (samples.position, samples.ray))
        colour = self.colours(position, view, ray, None if capacity is None else n_colour)
        rgb, opacity, distance = rendering.composite(weights, samples, coloured, colour)
        rgb = (rgb + (1.0 - opacity[:, None]) * background).clamp(0.0, 1.0)
        depth = distance + (1.0 - opacity.detach()) * c.far
        return RenderOutput(rgb, opacity, depth, n_live, n_colour)

    def weights(self, samples: Samples) -> Tensor:
        """What each sample contributes to its ray's colour, [K]."""
        c, fused = self.config, self.kernels.weights_until_opaque
        activation = (c.density_activation, c.density_shift, c.distance_scale)
        if fused is not None and not torch.is_grad_enabled():
            return fused(*self.density_factors(), samples, *activation)
        return self.kernels.rendering.ray_weights(self.density_feature(samples.position), samples, *activation)

    def colours(self, position: Tensor, view: Tensor, ray: Tensor, count: Tensor | None = None) -> Tensor:
        """rgb [Kc, 3] at normalised positions [Kc, 3], seen along the unit directions view[ray]; view [B, 3].
        count: None, or how many of them are somebody's, 0-dim int64; the others' may be anything finite.

        A network's activations are a hundred times larger than what goes in and comes out: they are computed again
        in backward, a chunk of samples at a time, instead of being stored for all.
        """
        given = (*self.appearance_factors(), self.basis_mat.weight, position, view)
        if compiled_network.serves(self.renderModule, *given[0], *given[1], *given[2:]):
            return compiled_network.colours(self.renderModule, *given, ray)
        features, network = self.appearance_feature(position), self.kernels.network
        if network is not None and network.takes(self.renderModule, features, view):
            return network.colours(self.renderModule, features, view, ray, count)
        size = _COLOUR_CHUNK.get(position.device.type, _OTHER_COLOUR_CHUNK)
        return in_chunks(self.renderModule, size, features, view.index_select(0, ray), position)

    def draw_jitter(self, n_rays: int, n_samples: int, generator: torch.Generator) -> Tensor:
        """u for `render`: one number a ray; in NDC one a sample number, shared by the step's rays."""
        return torch.rand(self.jitter_shape(n_rays, n_samples), generator=generator, device=self.aabb.device)

    def jitter_shape(self, n_rays: int, n_samples: int) -> tuple[int, int]:
        """That of `draw_jitter`."""
        return (1, n_samples) if self.config.ndc else (n_rays, 1)
