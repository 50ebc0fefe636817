"""How a field grows: the alpha mask, shrinking to what it holds, upsampling (TensoRF, section 4.4 and code).

Letters: grid (Nx, Ny, Nz) points an axis; volumes are [Nz, Ny, Nx].
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from components.cameras import cast_rays
from components.grids import grid_coordinates
from components.marching import box_intersection, candidate_counts
from components.pixel_sets import pixel_batch
from components.types import Rays, Scene
from models.alpha_mask import AlphaMask
from models.chunks import run_all
from models.field import Field, factor
from models.kernels import threads
from utils.errors import EmptyMaskError

# Alpha masks keep the field's resolution below this many voxels; above it, the last such resolution.
MASK_VOXEL_LIMIT = 256**3
# Samples a ray that decide whether it meets the mask.
FILTER_SAMPLES = 256
# Rays that a thread filters at once; on CUDA, where launches cost more than rays.
FILTER_CHUNK, CUDA_FILTER_CHUNK = 1 << 12, 1 << 15


@torch.no_grad()
def dense_alpha(field: Field, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(alpha [Nx, Ny, Nz], positions [Nx, Ny, Nz, 3]) on the points of a grid over the field's box.

    alpha = 1 - exp(-sigma * step) with the field's step, without distance_scale; 0 outside an existing mask.
    """
    xyz = grid_coordinates(field.aabb, grid)
    alpha = torch.zeros(grid, device=xyz.device)
    with threads.taking_over():
        for layer, points in zip(alpha, xyz, strict=True):
            flat = points.reshape(-1, 3)
            if field.alpha_mask is None:
                index = torch.arange(flat.shape[0], device=flat.device)
            else:
                index = field.alpha_mask.occupied(flat).nonzero()[:, 0]
            sigma = field.density(field.density_feature(field.normalise(flat[index])))
            layer.view(-1)[index] = 1.0 - torch.exp(-sigma * field.step)
    return alpha, xyz


@torch.no_grad()
def update_alpha_mask(field: Field, grid: tuple[int, int, int]) -> Tensor:
    """Give the field a new mask on `grid` and return the box [2, 3] of the grid points that pass.

    Raises EmptyMaskError if none passes; the field then keeps its old mask.
    """
    alpha, xyz = dense_alpha(field, grid)
    pooled = max_pool3d(alpha.clamp(0, 1).permute(2, 1, 0)[None, None], kernel_size=3, padding=1, stride=1)[0, 0]
    volume = pooled >= field.config.alpha_threshold
    passing = xyz.permute(2, 1, 0, 3)[volume]
    if passing.shape[0] == 0:
        if not alpha.isfinite().all():
            raise EmptyMaskError(
                "the alpha mask is empty, for the densities have become NaN: lower --lr_init or --lr_basis and start "
                "this run again with --overwrite"
            )
        raise EmptyMaskError(
            f"the alpha mask is empty: no grid point reaches alpha {field.config.alpha_threshold:g} "
            f"(largest {alpha.max().item():.2e}); check that the scene lies in the box (--scene_bbox) and between "
            "near and far, raise --density_shift, lower --alpha_mask_thre, or update the mask later "
            "(--update_AlphaMask_list); then start this run again with --overwrite"
        )
    field.alpha_mask = AlphaMask(volume, field.aabb)
    return torch.stack([passing.amin(0), passing.amax(0)])


@torch.no_grad()
def shrink(field: Field, box: Tensor) -> dict[str, tuple[slice, ...]]:
    """Crop the field to `box` [2, 3], rounded to its grid lines; returns the kept part of each factor by name.

    Where the mask's grid is not the field's, the new box follows the kept grid lines, else it is `box`.
    """
    size = torch.tensor(field.grid_size, device=box.device)
    units = (field.aabb[1] - field.aabb[0]) / (size - 1)
    first = torch.round((box[0] - field.aabb[0]) / units).long()
    last = torch.minimum(torch.round((box[1] - field.aabb[0]) / units).long() + 1, size)
    # A factor needs two points an axis to interpolate between.
    first = torch.minimum(first, last - 2).clamp_min(0)
    last = torch.maximum(last, first + 2)
    slices = field.factor_slices(first.tolist(), last.tolist())
    for name, kept in slices.items():
        owner, _, position = name.partition(".")
        factors = getattr(field, owner)
        factors[int(position)] = factor(factors[int(position)].detach()[kept])
    if field.alpha_mask is None or field.alpha_mask.grid_size != field.grid_size:
        low, high = first / (size - 1), (last - 1) / (size - 1)
        box = torch.stack([(1 - s) * field.aabb[0] + s * field.aabb[1] for s in (low, high)])
    field.set_geometry(box, tuple((last - first).tolist()))
    return slices


@torch.no_grad()
def upsample(field: Field, grid: tuple[int, int, int]) -> None:
    """Resample the factors to `grid` points an axis; all parameters of the factors are new afterwards."""
    field.resize_factors(grid)
    field.set_geometry(field.aabb, grid)


@torch.no_grad()
def rays_meet_mask(field: Field, rays: Rays) -> Tensor:
    """[B] bool: one of the first 256 samples of a ray lies in the alpha mask (TensoRF's ray filtering).

    As there, samples are not confined to the box: a mask fades over one cell beyond its border.
    """
    c, mask = field.config, field.alpha_mask
    if mask is None:
        raise ValueError("rays_meet_mask needs an alpha mask")
    cell = (mask.aabb[1] - mask.aabb[0]) / (torch.tensor(mask.grid_size, device=mask.aabb.device) - 1)
    t_enter, _ = box_intersection(rays, field.aabb)
    _, t_exit = box_intersection(rays, torch.stack([mask.aabb[0] - cell, mask.aabb[1] + cell]))
    t_enter = t_enter.clamp(c.near, c.far)
    n_candidates = candidate_counts(t_enter, t_exit, field.step, FILTER_SAMPLES)
    return field.kernels.rendering.count_in_mask(rays, t_enter, n_candidates, field.step, mask) > 0


@torch.no_grad()
def rays_meet_box(field: Field, rays: Rays) -> Tensor:
    """[B] bool: the ray crosses the field's box."""
    t_enter, t_exit = box_intersection(rays, field.aabb)
    return t_exit > t_enter


@torch.no_grad()
def kept_pixels(field: Field, scene: Scene, by_mask: bool, kept: Tensor | None = None, chunk: int = 0) -> Tensor:
    """[M*H*W] bool: the scene's pixels whose rays meet the mask (or the box); a subset of `kept` if given.

    chunk: rays at once, 0: FILTER_CHUNK or CUDA_FILTER_CHUNK; one looked up in the mask takes up to some 10 kB where
    torch alone serves."""
    result = torch.zeros(scene.n_pixels, dtype=torch.bool, device=scene.device)
    chunk = chunk or (CUDA_FILTER_CHUNK if scene.device.type == "cuda" else FILTER_CHUNK)

    def keep(start: int) -> None:
        index = torch.arange(start, min(start + chunk, scene.n_pixels), device=scene.device)
        if kept is not None:
            index = index[kept[index]]
        rays = cast_rays(scene, pixel_batch(index, scene.height, scene.width))
        result[index] = rays_meet_mask(field, rays) if by_mask else rays_meet_box(field, rays)

    run_all([partial(keep, start) for start in range(0, scene.n_pixels, chunk)], scene.device)
    return result
