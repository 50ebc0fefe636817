"""Marching, weights and compositing on a CPU, by rendering.cpp and this machine's threads.

Marching keeps exactly the samples of components/marching.py; the rest equals components/compositing.py up to rounding.
All in single precision; anything else takes the way of torch_rendering. Results do not depend on the number of threads.
"""

import ctypes
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.marching import Mask, Samples, box_intersection, candidate_counts, ndc_rows, normalise
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
        ("t_row", ctypes.c_void_p),
        ("delta_row", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
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


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


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
    if _foreign(mask, rays.origins, rays.directions, aabb, jitter):
        return torch_rendering.march_box(rays, aabb, near, far, step, n_samples, jitter, mask)
    t_enter, t_exit = box_intersection(rays, aabb)
    t_enter = t_enter.clamp(near, far)
    with torch.no_grad():
        enter, jitters = t_enter.contiguous(), None if jitter is None else jitter[:, 0].contiguous()
        candidates = _prefix(candidate_counts(enter, t_exit, step, n_samples))
        samples = _marched(rays, aabb, mask, candidates, n_samples, t_enter=enter, jitter=jitters, step=step)
    if rays.detach_samples or not (rays.origins.requires_grad or rays.directions.requires_grad):
        return samples
    # t grows with the entry; what a sample's number adds to it is fixed.
    t = samples.t + (t_enter - t_enter.detach()).index_select(0, samples.ray)
    return replace(samples, t=t, position=_moving(rays, samples.ray, t, aabb))


def march_ndc(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: AlphaMask | None = None,
) -> Samples:
    """See components.marching.march_ndc."""
    t_row, delta_row = ndc_rows(rays, near, far, n_samples, jitter)
    if len(t_row) != 1 or _foreign(mask, rays.origins, rays.directions, aabb, t_row):
        return torch_rendering.march_ndc(rays, aabb, near, far, n_samples, jitter, mask)
    length = torch.linalg.vector_norm(rays.directions, dim=-1)
    with torch.no_grad():
        # A vector's reads go past the end.
        wide = ctypes.c_int64.in_dll(_library(), "wide").value
        rows = {"t_row": torch.nn.functional.pad(t_row[0], (0, wide)), "delta_row": delta_row[0].contiguous()}
        candidates = torch.arange(len(rays) + 1) * n_samples
        own = torch.ones_like(length) if length.requires_grad else length.contiguous()
        samples = _marched(rays, aabb, mask, candidates, n_samples, length=own, **rows)
    if length.requires_grad:
        samples = replace(samples, delta=samples.delta * length.index_select(0, samples.ray))
    if rays.detach_samples or not (rays.origins.requires_grad or rays.directions.requires_grad):
        return samples
    return replace(samples, position=_moving(rays, samples.ray, samples.t, aabb))


@torch.no_grad()
def count_in_mask(rays: Rays, t_enter: Tensor, n_candidates: Tensor, step: float, mask: Mask) -> Tensor:
    """See components.marching.count_in_mask."""
    if _foreign(mask, rays.origins, rays.directions, t_enter):
        return torch_rendering.count_in_mask(rays, t_enter, n_candidates, step, mask)
    everywhere = torch.tensor([[-torch.inf] * 3, [torch.inf] * 3])
    return _counted(rays, everywhere, mask, _prefix(n_candidates), step, t_enter=t_enter.contiguous())[2]


def _foreign(mask: AlphaMask | None, *floats: Tensor | None) -> bool:
    """Whether the library cannot take these."""
    # A mask of another kind knows no cells; those of a mask are numbered with 32 bits.
    known = mask is None or (isinstance(mask, AlphaMask) and mask.cells.numel() < 2**31)
    return not known or any(x is not None and x.dtype != torch.float32 for x in floats)


def _counted(
    rays: Rays, aabb: Tensor, mask: AlphaMask | None, candidates: Tensor, step: float = 0.0, **given
) -> tuple[_Rays, Tensor, Tensor]:
    """(the rays as the library takes them, which candidates live [K0], how many of each ray [B]); `given`: more of what
    _Rays points to."""
    tensors = {"origins": rays.origins.contiguous(), "directions": rays.directions.contiguous(), **given}
    ours, cells = _Rays(step=step), _mask(mask)
    ours.alive = tensors
    for name, tensor in tensors.items():
        setattr(ours, name, None if tensor is None else tensor.data_ptr())
    ours.low[:], ours.high[:] = aabb.tolist()
    ours.scale[:] = (2.0 / (aabb[1] - aabb[0])).tolist()
    live = torch.empty(int(candidates[-1]), dtype=torch.uint8)
    counts = torch.empty(len(rays), dtype=torch.int64)
    sizes = (ctypes.byref(ours), ctypes.byref(cells), _at(candidates), ctypes.c_int64(len(rays)))
    _library().march_count(*sizes, _at(live), _at(counts), threads.count())
    return ours, live, counts


def _marched(rays: Rays, aabb: Tensor, mask: AlphaMask | None, candidates: Tensor, n_samples: int, **given) -> Samples:
    """Samples of candidates; `given`: as for `_counted`."""
    ours, live, counts = _counted(rays, aabb, mask, candidates, **given)
    offsets = _prefix(counts)
    n_live = int(offsets[-1])
    ray, t = torch.empty(n_live, dtype=torch.int64), torch.empty(n_live)
    delta, position = torch.empty(n_live), torch.empty(n_live, 3)
    ends = (ctypes.c_int64(n_samples), ctypes.c_int64(len(rays)))
    sizes = (ctypes.byref(ours), _at(candidates), _at(live), _at(offsets), *ends)
    _library().march_fill(*sizes, _at(ray), _at(t), _at(delta), _at(position), threads.count())
    return Samples(ray, t, delta, position, offsets)


def _moving(rays: Rays, ray: Tensor, t: Tensor, aabb: Tensor) -> Tensor:
    """Samples' positions, which follow their rays' gradients."""
    origins, directions = (x.index_select(0, ray) for x in (rays.origins, rays.directions))
    return normalise(origins + directions * t[:, None], aabb)


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
    def forward(
        ctx, feature: Tensor, delta: Tensor, offsets: Tensor, softplus: bool, shift: float, scale: float
    ) -> Tensor:
        feature, delta, offsets = feature.contiguous(), delta.contiguous(), offsets.contiguous()
        alpha, weights = torch.empty_like(feature), torch.empty_like(feature)
        ends = (softplus, ctypes.c_float(shift), ctypes.c_float(scale))
        given = (_at(feature), _at(delta), _at(offsets), ctypes.c_int64(len(offsets) - 1), *ends)
        _library().weights_forward(*given, _at(alpha), _at(weights), threads.count())
        ctx.save_for_backward(feature, delta, offsets, alpha, weights)
        ctx.ends = ends
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        feature, delta, offsets, alpha, weights = ctx.saved_tensors
        grad, gradient = grad.contiguous(), torch.empty_like(feature)
        to_delta = torch.empty_like(delta) if ctx.needs_input_grad[1] else None
        given = (
            *map(_at, (feature, delta, offsets, alpha, weights, grad)),
            ctypes.c_int64(len(offsets) - 1),
            *ctx.ends,
        )
        _library().weights_backward(*given, _at(gradient), _at(to_delta), threads.count())
        return gradient, to_delta, None, None, None, None


def ray_weights(feature: Tensor, samples: Samples, activation: str, shift: float, scale: float) -> Tensor:
    """See components.compositing.ray_weights."""
    if feature.dtype != torch.float32 or samples.delta.dtype != torch.float32:
        return torch_rendering.ray_weights(feature, samples, activation, shift, scale)
    return _RayWeights.apply(feature, samples.delta, samples.offsets, activation == "softplus", shift, scale)


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
