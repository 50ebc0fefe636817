"""Soft mining: walkers that climb the error by Langevin steps, and the correction for where they stand.

Letters: N walkers, p [N, 2] position (y, x) in [0, 1], H, W rows and columns, r exponent, c correction weight,
a, b sizes of drift and noise. Sections 3.2 and 3.3 of arXiv:2312.00075, with the constants of ES's code;
tests/golden/langevin.npz and losses.npz.
"""

import torch
from torch import Tensor

# Residuals below float16's resolution count as that; weights stay above SMALLEST_WEIGHT.
SMALLEST_RESIDUAL = torch.finfo(torch.float16).eps
SMALLEST_WEIGHT = 0.2
NO_DIVISION_BY_ZERO = torch.finfo(torch.float32).eps
# The share of walkers that die for the smallest error, and as many slots that start afresh anywhere.
DYING_SHARE = 0.1


def pixel_under(position: Tensor, height: int, width: int) -> Tensor:
    """(row, column) [N, 2] int64 of positions p: round(p * (H - 1, W - 1))."""
    y, x = position.unbind(-1)
    return torch.stack([torch.round(y * (height - 1)), torch.round(x * (width - 1))], -1).long()


def position_of(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Positions [N, 2] float32 of pixels, the inverse of `pixel_under`."""
    return torch.stack([row / max(height - 1, 1), column / max(width - 1, 1)], -1).float()


def correction(error: Tensor, step: int, alpha: float, warmup: int) -> Tensor:
    """Weight c [N] of rays with residual `error` [N, 3]: mean|error|^(-r), r = min(step/warmup, alpha).

    Between 0.2 and mean + standard deviation (unbiased) of the batch. warmup 0: r is alpha from the start.
    """
    r = min(step / warmup, alpha) if warmup else alpha
    # Powers of huge or vanishing residuals stay finite, and so does their spread.
    largest = torch.finfo(torch.float32).max ** 0.25
    weight = error.abs().mean(-1).clamp(SMALLEST_RESIDUAL, largest).pow(-r)
    spread = weight.std() if weight.shape[0] > 1 else weight.new_zeros(())
    return torch.minimum(weight.clamp_min(SMALLEST_WEIGHT), weight.mean() + spread)


def drift(gradient: Tensor, ray_loss: Tensor) -> Tensor:
    """Gradient of log loss [N, 2]: d mean loss / d pixel position over the ray's loss [N]."""
    return gradient / (ray_loss + NO_DIVISION_BY_ZERO)[:, None]


def langevin_move(position: Tensor, drift: Tensor, noise: Tensor, a: float, b: float) -> Tensor:
    """p + a*drift + b*noise [N, 2]; noise is standard normal."""
    return position + a * drift + b * noise


def dead_walkers(position: Tensor, ray_loss: Tensor) -> Tensor:
    """[N] bool: outside the picture, or with a loss [N] among the int(0.1 N) + 1 smallest; position: moved already."""
    inside = ((position >= 0) & (position <= 1)).all(-1)  # false for NaN too
    return ~inside | (ray_loss <= ray_loss.kthvalue(n_dying(len(ray_loss)) + 1).values)


def n_dying(n_walkers: int) -> int:
    """int(0.1 N)."""
    return int(DYING_SHARE * n_walkers)


def fresh_slots(n_walkers: int, offset: Tensor) -> Tensor:
    """[int(0.1 N)] int64: walkers that start afresh, spread evenly over all (and so over all images).

    offset: scalar int64, where they begin; the reference always takes the last ones, those of the last images.
    """
    count = n_dying(n_walkers)
    slots = torch.arange(count, device=offset.device) * n_walkers // max(count, 1)
    return (slots + offset) % n_walkers


def draw_index(cdf: Tensor, u: Tensor) -> Tensor:
    """[N] int64: i with cdf[i] <= u*total < cdf[i + 1], for cumulated weights cdf [N, n + 1] (0 first), u [N, 1]."""
    index = torch.searchsorted(cdf, u.to(cdf.dtype) * cdf[:, -1:], right=True)[:, 0] - 1
    return index.clamp(0, cdf.shape[1] - 2)


def draw_between(cdf: Tensor, first: Tensor, end: Tensor, u: Tensor) -> Tensor:
    """[N] int64: the same for one cdf [n + 1] of many distributions, each of which holds entries first..end - 1."""
    target = cdf[first] + u * (cdf[end] - cdf[first])
    index = torch.searchsorted(cdf, target, right=True) - 1
    return torch.minimum(torch.maximum(index, first), end - 1)


def cumulate(weight: Tensor) -> Tensor:
    """[..., n + 1] float64: sums of weight [..., n] before each entry, and the total."""
    return torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
