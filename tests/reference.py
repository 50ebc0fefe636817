"""The slow twin: TensoRF's renderer, dense and literal, as the reference computes it (float32, masks on [B, S]).

It shares no mathematics with the fast path: factors are looked up by grid_sample on its own, samples are [B, S, 3],
transmittance is a cumulative product over rows. Tests hold the packed path against it, and benchmarks/step.py uses
it as the stand-in for the reference's cost. It reads a `Field` only for its parameters and settings.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MAT_MODE = ((0, 1), (0, 2), (1, 2))
VEC_MODE = (2, 1, 0)


@dataclass
class DenseOutput:
    rgb: torch.Tensor
    depth: torch.Tensor
    opacity: torch.Tensor
    n_dense: int
    n_density: int
    n_colour: int


def sample_alpha(volume, mask_aabb, xyz):
    """Trilinear lookup [N] of a float volume [1, 1, z, y, x], zero outside."""
    normalised = (xyz - mask_aabb[0]) * (1.0 / (mask_aabb[1] - mask_aabb[0]) * 2) - 1
    return F.grid_sample(volume, normalised.view(1, -1, 1, 1, 3), align_corners=True).view(-1)


def plane_line_products(planes, lines, xyz):
    """Per mode, plane * line [C_m, N] at normalised points xyz [N, 3]."""
    products = []
    for m in range(3):
        line_xy = torch.stack((torch.zeros_like(xyz[..., VEC_MODE[m]]), xyz[..., VEC_MODE[m]]), dim=-1)
        line = F.grid_sample(lines[m], line_xy.view(1, -1, 1, 2), align_corners=True).view(-1, xyz.shape[0])
        if planes:
            plane_xy = torch.stack((xyz[..., MAT_MODE[m][0]], xyz[..., MAT_MODE[m][1]]), dim=-1)
            plane = F.grid_sample(planes[m], plane_xy.view(1, -1, 1, 2), align_corners=True)
            products.append(plane.view(-1, xyz.shape[0]) * line)
        else:
            products.append(line)
    return products


def density_feature(field, xyz):
    """[N] at normalised points."""
    planes, lines = field.density_factors()
    parts = plane_line_products(planes, lines, xyz)
    if planes:
        return sum(part.sum(0) for part in parts)
    return (parts[0] * parts[1] * parts[2]).sum(0)


def app_feature(field, xyz):
    """[N, n_features] at normalised points."""
    planes, lines = field.appearance_factors()
    parts = plane_line_products(planes, lines, xyz)
    joined = torch.cat(parts) if planes else parts[0] * parts[1] * parts[2]
    return field.basis_mat(joined.T)


def activation(field, feature):
    if field.config.density_activation == "softplus":
        return F.softplus(feature + field.config.density_shift)
    return F.relu(feature)


def sample_pinhole(field, origins, directions, n_samples, jitter):
    c, aabb = field.config, field.aabb
    vec = torch.where(directions == 0, torch.full_like(directions, 1e-6), directions)
    rate_a, rate_b = (aabb[1] - origins) / vec, (aabb[0] - origins) / vec
    t_min = torch.minimum(rate_a, rate_b).amax(-1).clamp(min=c.near, max=c.far)
    numbers = torch.arange(n_samples, device=origins.device)[None].to(origins.dtype)
    if jitter is not None:
        numbers = numbers.repeat(origins.shape[0], 1) + jitter
    t = t_min[..., None] + field.step * numbers
    points = origins[..., None, :] + directions[..., None, :] * t[..., None]
    inside = ~((aabb[0] > points) | (points > aabb[1])).any(-1)
    return points, t.expand(points.shape[:2]), inside


def sample_ndc(field, origins, directions, n_samples, jitter):
    c, aabb = field.config, field.aabb
    t = torch.linspace(c.near, c.far, n_samples, device=origins.device, dtype=origins.dtype)[None]
    if jitter is not None:
        t = t + jitter * ((c.far - c.near) / n_samples)
    points = origins[..., None, :] + directions[..., None, :] * t[..., None]
    inside = ~((aabb[0] > points) | (points > aabb[1])).any(-1)
    return points, t.expand(points.shape[:2]), inside


def dense_render(field, rays, background, jitter=None, n_samples=None, depth_background=None):
    """Render rays [B] with dense [B, S] tensors. depth_background [B]: None for `far`."""
    c = field.config
    origins, directions = rays.origins, rays.directions
    n_samples = n_samples or field.n_samples
    sample = sample_ndc if c.ndc else sample_pinhole
    points, t, valid = sample(field, origins, directions, n_samples, jitter)
    dists = torch.cat((t[:, 1:] - t[:, :-1], torch.zeros_like(t[:, :1])), dim=-1)
    view = directions
    if c.ndc:
        norm = torch.norm(directions, dim=-1, keepdim=True)
        dists, view = dists * norm, directions / norm
    view = view[:, None].expand(points.shape)

    valid = valid.clone()
    mask = field.alpha_mask
    if mask is not None:
        volume = mask.volume[None, None].to(points.dtype)
        alive = sample_alpha(volume, mask.aabb, points[valid]) > 0
        invalid = ~valid
        invalid[valid] |= ~alive
        valid = ~invalid

    sigma = torch.zeros(points.shape[:2], dtype=points.dtype, device=points.device)
    rgb = torch.zeros(points.shape, dtype=points.dtype, device=points.device)
    position = (points - field.aabb[0]) * (2.0 / (field.aabb[1] - field.aabb[0])) - 1
    if valid.any():
        sigma[valid] = activation(field, density_feature(field, position[valid]))
    alpha = 1.0 - torch.exp(-sigma * dists * c.distance_scale)
    ones = torch.ones(alpha.shape[0], 1, dtype=alpha.dtype, device=alpha.device)
    transmittance = torch.cumprod(torch.cat([ones, 1.0 - alpha + 1e-10], -1), -1)
    weight = alpha * transmittance[:, :-1]
    coloured = weight > c.weight_threshold
    if coloured.any():
        features = app_feature(field, position[coloured])
        rgb[coloured] = field.renderModule(features, view[coloured], position[coloured])
    opacity = weight.sum(-1)
    rgb_map = (weight[..., None] * rgb).sum(-2) + (1.0 - opacity[..., None]) * background
    with torch.no_grad():
        behind = c.far if depth_background is None else depth_background
        depth = (weight * t).sum(-1) + (1.0 - opacity) * behind
    counts = (valid.numel(), int(valid.sum()), int(coloured.sum()))
    return DenseOutput(rgb_map.clamp(0, 1), depth, opacity, *counts)


def dense_filter(field, rays, n_samples=256):
    """[B] bool: rays kept by TensoRF's mask filtering, literally."""
    points, _, _ = sample_pinhole(field, rays.origins, rays.directions, n_samples, None)
    volume = field.alpha_mask.volume[None, None].to(points.dtype)
    alive = sample_alpha(volume, field.alpha_mask.aabb, points.reshape(-1, 3)) > 0
    return alive.view(points.shape[:2]).any(-1)


def standard_frequencies(n, draws):
    """Slow reference of the standard sampler: how often each of n pixels comes up in `draws` draws of epochs."""
    counts = torch.full((n,), draws // n, dtype=torch.long)
    return counts, draws % n
