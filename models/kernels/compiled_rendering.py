"""Marching, weights and compositing on a CPU, by rendering.cpp and this machine's threads.

Marching keeps exactly the samples of components/marching.py; the rest equals components/compositing.py up to rounding.
All in single precision; anything else takes the way of torch_rendering. Results do not depend on the number of threads.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.marching import Samples, box_intersection, candidate_counts, normalise
from components.types import Rays
from models.alpha_mask import AlphaMask
from models.kernels import threads, torch_rendering
from models.kernels.compiled import libraries


class _Rays(ctypes.Structure):
    _fields_ = (
        ("origins", ctypes.c_void_p),
        ("directions", ctypes.c_void_p),
        ("t_enter", ctypes.c_void_p),
        ("jitter", ctypes.c_void_p),
        ("step", ctypes.c_float),
        ("low", ctypes.c_float * 3),
        ("high", ctypes.c_float * 3),
        ("scale", ctypes.c_float * 3),
    )


class _Mask(ctypes.Structure):
    _fields_ = (
        ("cells", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 3),
        ("low", ctypes.c_float * 3),
        ("scale", ctypes.c_float * 3),
        ("allowed", ctypes.c_uint8 * 8),
    )


def _library() -> ctypes.CDLL:
    return libraries()["rendering"]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _prefix(counts: Tensor) -> Tensor:
    """[B + 1]: 0 and the running sums of counts [B]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def march_box(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    step: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: AlphaMask | None = None,
) -> Samples:
    """See components.marching.march_box."""
    floats = (rays.origins, rays.directions, aabb, jitter)
    # A mask of another kind knows no cells; those of a mask are numbered with 32 bits.
    foreign = mask is not None and not (isinstance(mask, AlphaMask) and mask.cells.numel() < 2**31)
    if foreign or any(x is not None and x.dtype != torch.float32 for x in floats):
        return torch_rendering.march_box(rays, aabb, near, far, step, n_samples, jitter, mask)
    t_enter, t_exit = box_intersection(rays, aabb)
    t_enter = t_enter.clamp(near, far)
    with torch.no_grad():
        origins, directions, enter = (x.contiguous() for x in (rays.origins, rays.directions, t_enter))
        jitters = None if jitter is None else jitter[:, 0].contiguous()
        candidates = _prefix(candidate_counts(enter, t_exit, step, n_samples))
        ours = _Rays(
            *(x.data_ptr() for x in (origins, directions, enter)), None if jitters is None else jitters.data_ptr(), step
        )
        ours.low[:], ours.high[:] = aabb.tolist()
        ours.scale[:] = (2.0 / (aabb[1] - aabb[0])).tolist()
        cells = _mask(mask)
        live = torch.empty(int(candidates[-1]), dtype=torch.uint8)
        counts = torch.empty(len(rays), dtype=torch.int64)
        n_rays = ctypes.c_int64(len(rays))
        given = (ctypes.byref(ours), ctypes.byref(cells), _at(candidates), n_rays)
        _library().march_count(*given, _at(live), _at(counts), threads.count())
        offsets = _prefix(counts)
        n_live = int(offsets[-1])
        ray, t = torch.empty(n_live, dtype=torch.int64), torch.empty(n_live)
        delta, position = torch.empty(n_live), torch.empty(n_live, 3)
        given = (ctypes.byref(ours), _at(candidates), _at(live), _at(offsets), ctypes.c_int64(n_samples), n_rays)
        _library().march_fill(*given, _at(ray), _at(t), _at(delta), _at(position), threads.count())
    if not rays.detach_samples and (rays.origins.requires_grad or rays.directions.requires_grad):
        # t grows with the entry; what a sample's number adds to it is fixed.
        t = t + (t_enter - t_enter.detach()).index_select(0, ray)
        origins, directions = (x.index_select(0, ray) for x in (rays.origins, rays.directions))
        position = normalise(origins + directions * t[:, None], aabb)
    return Samples(ray, t, delta, position, offsets)


def _mask(mask: AlphaMask | None) -> _Mask:
    ours = _Mask()
    if mask is not None:
        ours.alive = mask.cells.contiguous()
        ours.cells = ours.alive.data_ptr()
        ours.size[:] = mask.grid_size
        ours.low[:] = mask.aabb[0].tolist()
        ours.scale[:] = mask.scale.tolist()
        ours.allowed[:] = mask.allowed.tolist()
    return ours


class _RayWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature: Tensor, samples: Samples, softplus: bool, shift: float, scale: float) -> Tensor:
        feature, delta = feature.contiguous(), samples.delta.contiguous()
        alpha, weights = torch.empty_like(feature), torch.empty_like(feature)
        ends = (softplus, ctypes.c_float(shift), ctypes.c_float(scale))
        given = (_at(feature), _at(delta), _at(samples.offsets), ctypes.c_int64(samples.n_rays), *ends)
        _library().weights_forward(*given, _at(alpha), _at(weights), threads.count())
        ctx.save_for_backward(feature, delta, samples.offsets, alpha, weights)
        ctx.ends = ends
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        feature, delta, offsets, alpha, weights = ctx.saved_tensors
        grad, gradient = grad.contiguous(), torch.empty_like(feature)
        given = (
            *map(_at, (feature, delta, offsets, alpha, weights, grad)),
            ctypes.c_int64(len(offsets) - 1),
            *ctx.ends,
        )
        _library().weights_backward(*given, _at(gradient), threads.count())
        return gradient, None, None, None, None


def ray_weights(feature: Tensor, samples: Samples, activation: str, shift: float, scale: float) -> Tensor:
    """See components.compositing.ray_weights."""
    if feature.dtype != torch.float32 or samples.delta.dtype != torch.float32 or samples.delta.requires_grad:
        return torch_rendering.ray_weights(feature, samples, activation, shift, scale)
    return _RayWeights.apply(feature, samples, activation == "softplus", shift, scale)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, colour: Tensor, coloured: Tensor, t: Tensor, offsets: Tensor):
        weights, colour, t, coloured = (x.contiguous() for x in (weights, colour, t, coloured))
        n_rays = len(offsets) - 1
        rgb, opacity, distance = torch.empty(n_rays, 3), torch.empty(n_rays), torch.empty(n_rays)
        given = (_at(weights), _at(t), _at(offsets), _at(coloured), ctypes.c_int64(len(coloured)), _at(colour))
        out = (_at(rgb), _at(opacity), _at(distance))
        _library().composite_forward(*given, ctypes.c_int64(n_rays), *out, threads.count())
        ctx.save_for_backward(weights, colour, coloured, offsets)
        ctx.mark_non_differentiable(distance)
        return rgb, opacity, distance

    @staticmethod
    @once_differentiable
    def backward(ctx, to_rgb: Tensor, to_opacity: Tensor, _):
        weights, colour, coloured, offsets = ctx.saved_tensors
        to_rgb, to_opacity = to_rgb.contiguous(), to_opacity.contiguous()
        to_weights, to_colour = torch.empty_like(weights), torch.empty_like(colour)
        given = (_at(weights), _at(offsets), _at(coloured), ctypes.c_int64(len(coloured)), _at(colour))
        upstream, out = (_at(to_rgb), _at(to_opacity)), (_at(to_weights), _at(to_colour))
        _library().composite_backward(*given, ctypes.c_int64(len(offsets) - 1), *upstream, *out, threads.count())
        return to_weights, to_colour, None, None, None


def composite(weights: Tensor, samples: Samples, coloured: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See components.compositing.composite."""
    if any(x.dtype != torch.float32 for x in (weights, samples.t, colour)):
        return torch_rendering.composite(weights, samples, coloured, colour)
    return _Composite.apply(weights, colour, coloured, samples.t.detach(), samples.offsets)
