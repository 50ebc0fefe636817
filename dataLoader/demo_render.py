"""Ground truth of the demo scene: colour, alpha and depth by exact ray tracing, anti-aliased where it is needed."""

from functools import lru_cache

import torch
from torch import Tensor

from components.cameras import rays_of
from dataLoader.demo_scene import demo_solids
from dataLoader.demo_shading import LAMP, shade
from dataLoader.demo_shapes import local_points, normals, trace

CONTRAST = 0.16
# Eight rays in a pixel, no two in the same eighth of its width or height (a rooks pattern).
SUBPIXELS = torch.stack([torch.arange(8), torch.arange(8) * 3 % 8], -1) / 8 - 7 / 16
# Below this width thin rods slip between pixel centres, so that every pixel is supersampled.
MIN_ADAPTIVE_WIDTH = 100


def render_ground_truth(c2w: Tensor, intrinsics: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """What a pinhole camera sees: (rgba [H, W, 4] in [0, 1], depth [H, W]).

    c2w [3, 4] (OpenCV axes), intrinsics [4] (fx, fy, cx, cy) in pixels. Alpha is straight (colour not multiplied by
    it), 0 in empty pixels. depth: distance along the unit ray through the pixel's centre, inf where that is empty.
    Pixels on edges are averaged over 8 rays.
    """
    order = _z_order(width, height)
    centres = torch.stack([order % width, order // width], -1) + 0.5
    image, depth, index = torch.empty(height * width, 4), torch.empty(height * width), torch.empty_like(order)
    image[order], depth[order], index[order] = _trace_pixels(centres, c2w, intrinsics)
    if width < MIN_ADAPTIVE_WIDTH:
        rough = torch.ones_like(order, dtype=torch.bool)
    else:
        rough = _edges(image.view(height, width, 4), index.view(height, width)).flatten()[order]
    image[order[rough]] = _supersample(centres[rough], c2w, intrinsics)
    return image.view(height, width, 4), depth.view(height, width)


@lru_cache(maxsize=8)
def _z_order(width: int, height: int) -> Tensor:
    """Pixel numbers [H*W] along a Z-shaped curve (Morton 1966), so that any stretch of it is a compact patch."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    code = torch.zeros(height, width, dtype=torch.int64)
    for bit in range(max(width, height).bit_length()):
        code |= ((x >> bit & 1) << 2 * bit) | ((y >> bit & 1) << 2 * bit + 1)
    return code.flatten().argsort()


def trace_colours(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Single rays [N, 3], unit directions: (rgba [N, 4], alpha 0 or 1; distance [N], inf where empty; solid [N])."""
    solids = demo_solids()
    depth, index = trace(solids, origins, directions)
    rgba = torch.zeros(len(origins), 4)
    hit = (index >= 0).nonzero().squeeze(-1)
    if len(hit):
        solid = index[hit]
        points = origins[hit] + depth[hit, None] * directions[hit]
        normal = normals(solids, points, solid)
        facing = (normal @ LAMP > 0).nonzero().squeeze(-1)
        lit = torch.zeros(len(hit))
        start = points[facing] + 1e-3 * normal[facing]
        lit[facing] = (trace(solids, start, LAMP.expand_as(start))[1] < 0).float()
        local = local_points(solids, points, solid)
        rgba[hit, :3] = shade(solids.material[solid], local, normal, -directions[hit], lit, points)
        rgba[hit, 3] = 1.0
    return rgba, depth, index


def _trace_pixels(xy: Tensor, c2w: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rays = rays_of(xy, c2w, intrinsics, 0, 0, ndc=False)
    return trace_colours(rays.origins, rays.directions)


def _edges(image: Tensor, index: Tensor) -> Tensor:
    """Pixels [H, W] that differ from a neighbour above, below, left or right in solid or, visibly, in colour."""
    edge = torch.zeros(index.shape, dtype=torch.bool)
    for axis in (0, 1):
        before, after = index.narrow(axis, 0, index.shape[axis] - 1), index.narrow(axis, 1, index.shape[axis] - 1)
        step = (before != after) | (image.diff(dim=axis).abs().amax(-1) > CONTRAST)
        edge.narrow(axis, 0, step.shape[axis]).logical_or_(step)
        edge.narrow(axis, 1, step.shape[axis]).logical_or_(step)
    return edge


def _supersample(centres: Tensor, c2w: Tensor, intrinsics: Tensor) -> Tensor:
    """Straight-alpha rgba [K, 4] of pixels, averaged over the rays in each."""
    xy = (centres[:, None] + SUBPIXELS).reshape(-1, 2)
    rgba = _trace_pixels(xy, c2w, intrinsics)[0].reshape(-1, len(SUBPIXELS), 4)
    alpha = rgba[..., 3:].mean(1)
    colour = (rgba[..., :3] * rgba[..., 3:]).mean(1) / alpha.clamp_min(1e-6)
    return torch.cat([colour, alpha], -1)
