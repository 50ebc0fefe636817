"""Pixels to rays: the pinhole camera and the NDC warp, differentiable in pixel position.

Letters: B rays, (x, y) pixel position, (fx, fy, cx, cy) intrinsics in pixels, o origin, d direction, n near plane.
"""

from dataclasses import replace

import torch
from torch import Tensor

from components.types import PixelBatch, Rays, Scene

NDC_NEAR_PLANE = 1.0


def pinhole_directions(xy: Tensor, intrinsics: Tensor) -> Tensor:
    """Camera-space directions [B, 3] (OpenCV axes, z = 1) of pixel positions xy [B, 2].

    intrinsics: [B, 4] or [4], (fx, fy, cx, cy) in pixels.
    """
    plane = (xy - intrinsics[..., 2:]) / intrinsics[..., :2]
    return torch.cat([plane, torch.ones_like(plane[..., :1])], dim=-1)


def to_ndc(origins: Tensor, directions: Tensor, width: int, height: int, focal: Tensor, near: float) -> Rays:
    """Warp world rays [B, 3] that look along -z into normalised device coordinates.

    Appendix C of NeRF (arXiv:2003.08934): origins move to the plane z = -near, then the frustum becomes the cube
    [-1, 1]^3 with t = 1 at infinity. focal: [B] or scalar, pixels; the x focal serves both axes (as TensoRF).
    """
    t = -(near + origins[..., 2:]) / directions[..., 2:]
    origins = origins + t * directions
    o_x, o_y, o_z = origins.unbind(-1)
    d_x, d_y, d_z = directions.unbind(-1)
    scale_x = -1.0 / (width / (2.0 * focal))
    scale_y = -1.0 / (height / (2.0 * focal))
    warped_o = torch.stack([scale_x * o_x / o_z, scale_y * o_y / o_z, 1.0 + 2.0 * near / o_z], -1)
    warped_d = torch.stack(
        [scale_x * (d_x / d_z - o_x / o_z), scale_y * (d_y / d_z - o_y / o_z), -2.0 * near / o_z], -1
    )
    return Rays(warped_o, warped_d)


def rays_of(xy: Tensor, c2w: Tensor, intrinsics: Tensor, width: int, height: int, ndc: bool) -> Rays:
    """Rays [B] through pixel positions xy [B, 2] of cameras c2w [B, 3, 4] or [3, 4], intrinsics [B, 4] or [4].

    Pinhole directions have unit length; NDC directions keep the length that the warp gives them.
    """
    camera = pinhole_directions(xy, intrinsics)
    if not ndc:
        camera = camera / torch.linalg.vector_norm(camera, dim=-1, keepdim=True)
    # Not a matrix product: on CUDA that may be in TF32, whose rounding moves a ray by up to half a pixel.
    directions = (c2w[..., :3] * camera[..., None, :]).sum(-1)
    origins = c2w[..., 3].expand_as(directions)
    if ndc:
        return to_ndc(origins, directions, width, height, intrinsics[..., 0], NDC_NEAR_PLANE)
    return Rays(origins, directions)


def cast_rays(scene: Scene, pixels: PixelBatch) -> Rays:
    """Rays [B] of a sampler's pixels; a gradient flows back to `pixels.xy` if it requires one."""
    c2w, intrinsics = (x.index_select(0, pixels.image_id) for x in (scene.c2w, scene.intrinsics))
    rays = rays_of(pixels.xy, c2w, intrinsics, scene.width, scene.height, scene.ndc)
    return replace(rays, detach_samples=pixels.detach_samples)


def image_rays(scene: Scene, c2w: Tensor, intrinsics: Tensor) -> Rays:
    """Rays [H*W], row-major, through all pixel centres of one camera: c2w [3, 4], intrinsics [4]."""
    rows = torch.arange(scene.height, device=c2w.device, dtype=torch.float32) + 0.5
    columns = torch.arange(scene.width, device=c2w.device, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    xy = torch.stack([x, y], -1).reshape(-1, 2)
    return rays_of(xy, c2w, intrinsics, scene.width, scene.height, scene.ndc)
