"""Where the samples of a ray lie: packed marching through the box (pinhole) or through NDC.

Letters: B rays, S samples a ray at most, K0 candidates that may lie in the box, K live samples, o origin,
d direction, t ray parameter, k sample number, u jitter in [0, 1).

A dense renderer makes [B, S, 3] points and masks most of them away; here each ray contributes only as many
candidates as fit between its entry into the box and its exit. The candidates' t, position and inside test are the
same expressions in the same order as in the dense renderer, so both keep exactly the same samples.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from components.types import Rays

# Candidates tested at once, which bounds the memory of those that are thrown away again; on CUDA each part waits once.
_CANDIDATES, _OTHER_CANDIDATES = {"cpu": 1 << 15}, 1 << 24


class Mask(Protocol):
    """What marching needs of an alpha mask."""

    def occupied(self, xyz: Tensor) -> Tensor:
        """[N] bool for world points [N, 3]."""


@dataclass(frozen=True)
class Samples:
    """Live samples, ordered by ray, then by t.

    ray: [K] int64; t: [K] ray parameter; delta: [K] distance to the ray's next sample number (0 for the last
    one), in t; position: [K, 3], normalised to [-1, 1] in the box; offsets: [B + 1] int64, where each ray's samples
    begin, and where the last ray's end: at K.

    n_live: None; or, where K was fixed beforehand, the number of live samples, 0-dim int64. At most K - 1 of them have
    a place. What is left, the last sample at least, is nobody's: it lies behind offsets[-1], far outside the box.
    """

    ray: Tensor
    t: Tensor
    delta: Tensor
    position: Tensor
    offsets: Tensor
    n_live: Tensor | None = None

    @property
    def n_rays(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def __len__(self) -> int:
        return self.ray.shape[0]


def box_intersection(rays: Rays, aabb: Tensor) -> tuple[Tensor, Tensor]:
    """(t_enter, t_exit) [B] of rays and the box aabb [2, 3]; t_exit < t_enter where a ray misses it.

    The slab method; components of d that are zero count as 1e-6 (as TensoRF, so that rounding agrees).
    """
    d = torch.where(rays.directions == 0, torch.full_like(rays.directions, 1e-6), rays.directions)
    to_max, to_min = (aabb[1] - rays.origins) / d, (aabb[0] - rays.origins) / d
    return torch.minimum(to_max, to_min).amax(-1), torch.maximum(to_max, to_min).amin(-1)


def inside_box(xyz: Tensor, aabb: Tensor) -> Tensor:
    """[N] bool: aabb[0] <= xyz <= aabb[1] on all axes."""
    return ((xyz >= aabb[0]) & (xyz <= aabb[1])).all(-1)


def normalise(xyz: Tensor, aabb: Tensor) -> Tensor:
    """World positions [N, 3] to [-1, 1] in the box aabb [2, 3]."""
    return (xyz - aabb[0]) * (2.0 / (aabb[1] - aabb[0])) - 1


def candidate_counts(t_enter: Tensor, t_exit: Tensor, step: float, n_samples: int) -> Tensor:
    """[B] int64: how many sample numbers k = 0, 1, ... of each ray may lie before t_exit, at most n_samples.

    One more than exact arithmetic needs, so that rounding never loses a sample; the inside test removes it. None of a
    ray that is NaN.
    """
    return (torch.floor((t_exit - t_enter) / step) + 2).nan_to_num(0.0).clamp(0, n_samples).long()


def expand_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(ray [K0], k [K0]): ray r appears counts[r] times, with k = 0 .. counts[r] - 1."""
    ray = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return ray, torch.arange(ray.shape[0], device=counts.device) - first[ray]


def ray_offsets(ray: Tensor, n_rays: int) -> Tensor:
    """[B + 1] int64: where each ray's samples begin in the ordered `ray` [K]; the last entry is K."""
    return torch.searchsorted(ray, torch.arange(n_rays + 1, device=ray.device))


def march_box(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    step: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: Mask | None = None,
) -> Samples:
    """Samples at t_k = t_enter + step*(k + u) inside aabb [2, 3]; t_enter is clamped to [near, far].

    step: world units. jitter: u [B, 1] in [0, 1), one number a ray; None means 0. Positions are differentiable in the
    rays; which samples live is not.
    """
    t_enter, t_exit = box_intersection(rays, aabb)
    t_enter = t_enter.clamp(near, far)

    def place(ray: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        number = k if jitter is None else k + jitter[ray, 0]
        t = t_enter[ray] + step * number
        return t, rays.origins[ray] + rays.directions[ray] * t[:, None]

    with torch.no_grad():
        all_rays, all_k = expand_counts(candidate_counts(t_enter, t_exit, step, n_samples))
        kept, size = [], _CANDIDATES.get(all_k.device.type, _OTHER_CANDIDATES)
        for ray, k in zip(all_rays.split(size), all_k.split(size), strict=True):
            k = k.to(t_enter.dtype)
            t, xyz = place(ray, k)
            live = inside_box(xyz, aabb)
            if mask is not None:
                live &= mask.occupied(xyz)
            index = live.nonzero()[:, 0]
            kept.append((ray[index], k[index], t[index], xyz[index]))
        ray, k, t, xyz = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if not rays.detach_samples and (rays.origins.requires_grad or rays.directions.requires_grad):
        t, xyz = place(ray, k)
    following = k + 1 if jitter is None else k + 1 + jitter[ray, 0]
    delta = t_enter.detach()[ray] + step * following - t.detach()
    delta = torch.where(k < n_samples - 1, delta, torch.zeros_like(delta))
    return Samples(ray, t, delta, normalise(xyz, aabb), ray_offsets(ray, len(rays)))


@torch.no_grad()
def count_in_mask(rays: Rays, t_enter: Tensor, n_candidates: Tensor, step: float, mask: Mask) -> Tensor:
    """[B] int64: how many samples at t_enter + step*k, k < n_candidates, lie in the mask, in the box or not.

    t_enter [B]; n_candidates [B] int64; step: world units.
    """
    counts = torch.zeros_like(n_candidates)
    all_rays, all_k = expand_counts(n_candidates)
    size = _CANDIDATES.get(all_k.device.type, _OTHER_CANDIDATES)
    for ray, k in zip(all_rays.split(size), all_k.split(size), strict=True):
        t = t_enter[ray] + step * k.to(t_enter.dtype)
        hit = mask.occupied(rays.origins[ray] + rays.directions[ray] * t[:, None])
        counts.index_add_(0, ray, hit.long())
    return counts


def ndc_rows(rays: Rays, near: float, far: float, n_samples: int, jitter: Tensor | None) -> tuple[Tensor, Tensor]:
    """(t, distance to the next sample number or 0 for the last) [B or 1, S] of all sample numbers; see march_ndc."""
    t_row = torch.linspace(near, far, n_samples, device=rays.origins.device, dtype=rays.origins.dtype)[None]
    if jitter is not None:
        t_row = t_row + jitter * ((far - near) / n_samples)
    return t_row, torch.cat([t_row[:, 1:] - t_row[:, :-1], torch.zeros_like(t_row[:, :1])], dim=1)


def march_ndc(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: Mask | None = None,
) -> Samples:
    """Samples evenly spaced in [near, far] of NDC, those inside aabb [2, 3].

    jitter: u [B, S] or [1, S] in [0, 1), each sample moves by u*(far - near)/S; None means no jitter.
    delta carries the factor |d| that turns differences of t into lengths.
    """
    n_rays = len(rays)
    t_row, delta_row = ndc_rows(rays, near, far, n_samples, jitter)
    with torch.no_grad():
        rows = t_row.expand(n_rays, n_samples)
        # Axis by axis: a dense [B, S] bool is needed to choose, a dense [B, S, 3] float is not.
        live = torch.ones(n_rays, n_samples, dtype=torch.bool, device=t_row.device)
        for axis in range(3):
            x = rays.origins[:, axis, None] + rays.directions[:, axis, None] * rows
            live &= (x >= aabb[0, axis]) & (x <= aabb[1, axis])
        ray, k = live.nonzero().unbind(1)
        if mask is not None:
            t = rows[ray, k]
            kept = mask.occupied(rays.origins[ray] + rays.directions[ray] * t[:, None]).nonzero()[:, 0]
            ray, k = ray[kept], k[kept]
    t = t_row.expand(n_rays, n_samples)[ray, k]
    xyz = rays.origins[ray] + rays.directions[ray] * t[:, None]
    xyz = xyz.detach() if rays.detach_samples else xyz
    length = torch.linalg.vector_norm(rays.directions, dim=-1)
    delta = delta_row.expand(n_rays, n_samples)[ray, k] * length[ray]
    return Samples(ray, t, delta, normalise(xyz, aabb), ray_offsets(ray, n_rays))
