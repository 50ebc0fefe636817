"""Volume rendering of packed samples: opacities, transmittance along each ray, sums over each ray.

Letters: B rays, K samples (ordered by ray, then by t), alpha opacity of a sample, T transmittance before it,
w = alpha*T its weight. Eq. 1 of TensoRF (arXiv:2203.09517), discretised as in NeRF (arXiv:2003.08934), Eq. 3.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from components.marching import Samples

# Added to 1 - alpha, as in the reference: an opaque sample leaves a trace of light, and log stays finite.
_LIGHT_LEFT = 1e-10


def segment_sum(values: Tensor, ray: Tensor, n_rays: int) -> Tensor:
    """Sums of values [K] or [K, C] over each ray: [B] or [B, C]; ray [K] int64.

    Index-add over a flat view: on a CPU this is the sequential, hence deterministic, kernel.
    """
    if values.dim() == 1:
        return values.new_zeros(n_rays).index_add(0, ray, values)
    channels = values.shape[1]
    flat = (ray[:, None] * channels + torch.arange(channels, device=ray.device)).reshape(-1)
    return values.new_zeros(n_rays * channels).index_add(0, flat, values.reshape(-1)).view(n_rays, channels)


def alpha_from_density(sigma: Tensor, delta: Tensor) -> Tensor:
    """alpha = 1 - exp(-sigma*delta) [K]; sigma in 1/length, delta in the same length."""
    return 1.0 - torch.exp(-sigma * delta)


class _SegmentedWeights(torch.autograd.Function):
    """w_i = alpha_i * prod_{j<i, same ray} (1 - alpha_j + 1e-10).

    The product runs as a sum of logarithms in float64 over all samples at once; a ray's share is the difference to
    its first sample. Backward: dw_j/dalpha_i = -w_j / (1 - alpha_i + 1e-10) for j > i, so one suffix sum serves.
    """

    @staticmethod
    def forward(ctx, alpha: Tensor, ray: Tensor, n_rays: int) -> Tensor:
        every_ray = torch.arange(n_rays, device=ray.device)
        first, end = torch.searchsorted(ray, every_ray), torch.searchsorted(ray, every_ray, right=True)
        log_rest = torch.log(1.0 - alpha + _LIGHT_LEFT).double()
        before = log_rest.cumsum(0) - log_rest
        transmittance = torch.exp(before - before[first[ray]]).to(alpha.dtype)
        weights = alpha * transmittance
        ctx.save_for_backward(alpha, transmittance, ray, end)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, transmittance, ray, end = ctx.saved_tensors
        running = (grad * alpha * transmittance).double().cumsum(0)
        later = (running[end[ray] - 1] - running).to(alpha.dtype)
        return grad * transmittance - later / (1.0 - alpha + _LIGHT_LEFT), None, None


def segmented_weights(alpha: Tensor, ray: Tensor, n_rays: int) -> Tensor:
    """Weights w [K] of samples ordered by ray [K] int64: alpha times the transmittance before the sample."""
    if alpha.shape[0] == 0:
        return alpha
    return _SegmentedWeights.apply(alpha, ray, n_rays)


def ray_weights(feature: Tensor, samples: Samples, activation: str, shift: float, scale: float) -> Tensor:
    """Weights w [K] of samples from their density features [K].

    sigma = softplus(feature + shift), or relu(feature) where `activation` is not "softplus"; its unit is
    1/(samples.delta * scale).
    """
    sigma = softplus(feature + shift) if activation == "softplus" else torch.relu(feature)
    return segmented_weights(alpha_from_density(sigma, samples.delta * scale), samples.ray, samples.n_rays)


def composite(weights: Tensor, samples: Samples, coloured: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb [B, 3] in front of nothing, opacity [B], sum of w*t [B] without gradient) of samples' weights [K].

    coloured: [Kc] int64, ascending, the samples that have a colour; colour: [Kc, 3].
    """
    ray, n_rays = samples.ray, samples.n_rays
    opacity = segment_sum(weights, ray, n_rays)
    rgb = segment_sum(weights[coloured][:, None] * colour, ray[coloured], n_rays)
    distance = segment_sum(weights.detach() * samples.t.detach(), ray, n_rays)
    return rgb, opacity, distance
