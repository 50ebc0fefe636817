"""Marching, weights and compositing as Triton kernels, for CUDA; the definition is torch_rendering.

Letters: B rays, K samples, Kc coloured ones, k sample number, u jitter, T transmittance. One program (one warp) takes
a ray and goes along it BLOCK numbers or samples at a time, so nothing as long as all candidates is ever stored.

march_box keeps exactly the definition's samples: the same float32 expressions in the same order, without fused
multiply-adds (UNFUSED) and without Triton's `/`, which is not rounded correctly. Weights are running
products in float32, as the reference's cumprod. Anything that is not float32 on CUDA takes torch_rendering's way.

With a capacity (see components.marching.Samples.n_live) marching does not wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.marching import Mask, Samples, box_intersection, candidate_counts, normalise
from components.types import Rays
from models.alpha_mask import AlphaMask
from models.kernels import torch_rendering
from models.kernels.triton_common import UNFUSED, numbered, serves

# Candidates or samples of a ray at once, 4 a thread of its warp; coloured samples of a program, 8 a thread.
_BLOCK, _WARPS = 128, 1
_FLAT_BLOCK = 1024
# A coordinate of samples that are nobody's: outside of every grid, and a finite number to a network.
_NOWHERE = 4.0


# --- marching --------------------------------------------------------------------------------------------------------
@triton.jit
def _occupied_cell(x, AXIS: tl.constexpr, scale, mask_aabb, size):
    """(cell number [N] of AlphaMask.occupied along an axis, whether x lies between grid points, whether on the grid).

    scale: [3], what world lengths are multiplied by to span -1 to 1.
    """
    normalised = (x - tl.load(mask_aabb + AXIS)) * tl.load(scale + AXIS) - 1
    position = ((normalised + 1) * 0.5) * (size - 1)
    lower = tl.floor(position)
    inside = (lower >= -1) & (lower <= size - 1)
    return tl.where(inside, lower + 1, 0.0).to(tl.int64), (position > lower).to(tl.int32), inside


@triton.jit
def _candidates(
    k, valid, u, t_enter, step, origin, direction, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED: tl.constexpr,
):  # fmt: skip
    """(t, x, y, z, whether the sample lives), each [BLOCK], of sample numbers k float32 of one ray."""
    t = t_enter + step * (k + u)
    x = tl.load(origin) + tl.load(direction) * t
    y = tl.load(origin + 1) + tl.load(direction + 1) * t
    z = tl.load(origin + 2) + tl.load(direction + 2) * t
    live = valid & (x >= tl.load(aabb)) & (x <= tl.load(aabb + 3))
    live = live & (y >= tl.load(aabb + 1)) & (y <= tl.load(aabb + 4))
    live = live & (z >= tl.load(aabb + 2)) & (z <= tl.load(aabb + 5))
    if MASKED:
        cell_x, between_x, inside_x = _occupied_cell(x, 0, scale, mask_aabb, size_x)
        cell_y, between_y, inside_y = _occupied_cell(y, 1, scale, mask_aabb, size_y)
        cell_z, between_z, inside_z = _occupied_cell(z, 2, scale, mask_aabb, size_z)
        live = live & inside_x & inside_y & inside_z
        cell = (cell_z * (size_y + 1) + cell_y) * (size_x + 1) + cell_x
        bits = tl.load(cells + cell, mask=live, other=0)
        corners = tl.load(allowed + (between_x + 2 * between_y + 4 * between_z))
        live = live & ((bits & corners) != 0)
    return t, x, y, z, live


@triton.jit(do_not_specialize=["step", "size_x", "size_y", "size_z"])
def _count(
    counts, n_candidates, t_enter, jitter, origins, directions, step, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z,
    JITTERED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [B] int64: live samples of each ray."""
    ray = tl.program_id(0).to(tl.int64)
    n = tl.load(n_candidates + ray)
    start = tl.load(t_enter + ray)
    u = 0.0
    if JITTERED:
        u = tl.load(jitter + ray)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        number = first + tl.arange(0, BLOCK)
        _, _, _, _, live = _candidates(
            number.to(tl.float32), number < n, u, start, step, origins + 3 * ray, directions + 3 * ray, aabb,
            cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED,
        )  # fmt: skip
        total += live.to(tl.int32)
    tl.store(counts + ray, tl.sum(total, 0).to(tl.int64))


@triton.jit(do_not_specialize=["step", "n_samples", "size_x", "size_y", "size_z"])
def _fill(
    rays, ts, deltas, positions, box_scale, offsets, n_samples,
    n_candidates, t_enter, jitter, origins, directions, step, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z,
    JITTERED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes each ray's samples from offsets[ray] on, those that end before offsets[ray + 1]: rays [K] int64, ts [K],
    deltas [K], positions [K, 3]."""
    ray = tl.program_id(0).to(tl.int64)
    n = tl.load(n_candidates + ray)
    start = tl.load(t_enter + ray)
    u = 0.0
    if JITTERED:
        u = tl.load(jitter + ray)
    written = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    for first in range(0, n, BLOCK):
        number = first + tl.arange(0, BLOCK)
        k = number.to(tl.float32)
        t, x, y, z, live = _candidates(
            k, number < n, u, start, step, origins + 3 * ray, directions + 3 * ray, aabb,
            cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED,
        )  # fmt: skip
        following = start + step * ((k + 1) + u)
        delta = tl.where(number < n_samples - 1, following - t, 0.0)
        one = live.to(tl.int32)
        slot = written + tl.cumsum(one, 0) - one
        live = live & (slot < end)
        tl.store(rays + slot, tl.zeros_like(slot) + ray, mask=live)
        tl.store(ts + slot, t, mask=live)
        tl.store(deltas + slot, delta, mask=live)
        tl.store(positions + 3 * slot, (x - tl.load(aabb)) * tl.load(box_scale) - 1, mask=live)
        tl.store(positions + 3 * slot + 1, (y - tl.load(aabb + 1)) * tl.load(box_scale + 1) - 1, mask=live)
        tl.store(positions + 3 * slot + 2, (z - tl.load(aabb + 2)) * tl.load(box_scale + 2) - 1, mask=live)
        written += tl.sum(one, 0)


def march_box(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    step: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: Mask | None = None,
    capacity: int | None = None,
) -> Samples:
    """Samples of rays in aabb and mask; see components.marching.march_box.

    capacity: None, or how many samples there is room for: capacity + 1 are made, see Samples.n_live. Raises ValueError
    if it is asked for where the kernels do not serve.
    """
    floats = [rays.origins, rays.directions, aabb, *([] if jitter is None else [jitter])]
    masks = [mask.aabb] if isinstance(mask, AlphaMask) else []
    if not len(rays) or not serves(*floats, *masks) or (mask is not None and not masks):
        if capacity is not None:
            raise ValueError("a capacity needs rays, box and mask in float32 on CUDA")
        return torch_rendering.march_box(rays, aabb, near, far, step, n_samples, jitter, mask)
    t_enter, t_exit = box_intersection(rays, aabb)
    t_enter = t_enter.clamp(near, far)
    with torch.no_grad(), torch.cuda.device_of(aabb):
        origins, directions, aabb = rays.origins.contiguous(), rays.directions.contiguous(), aabb.contiguous()
        n_candidates = candidate_counts(t_enter, t_exit, step, n_samples)
        # Pointers that are not read: aabb's.
        u = aabb if jitter is None else jitter.contiguous()
        masked = (aabb, aabb, aabb, aabb, 2, 2, 2)
        if mask is not None:
            masked = (mask.cells.contiguous(), mask.allowed, mask.scale, mask.aabb.contiguous(), *mask.grid_size)
        arguments = (n_candidates, t_enter.contiguous(), u, origins, directions, float(step), aabb, *masked)
        options = {"JITTERED": jitter is not None, "MASKED": mask is not None, "BLOCK": _BLOCK}
        options |= {"num_warps": _WARPS} | UNFUSED
        offsets = torch.zeros(len(rays) + 1, dtype=torch.int64, device=aabb.device)
        counts = torch.empty_like(n_candidates)
        _count[(len(rays),)](counts, *arguments, **options)
        torch.cumsum(counts, 0, out=offsets[1:])
        n_live = None if capacity is None else offsets[-1].clone()
        ray, t, delta, position = _memory(offsets, aabb) if capacity is None else _room(capacity, offsets, aabb)
        box_scale = 2.0 / (aabb[1] - aabb[0])  # as components.marching.normalise
        if len(ray):
            _fill[(len(rays),)](ray, t, delta, position, box_scale, offsets, n_samples, *arguments, **options)
    if not rays.detach_samples and (rays.origins.requires_grad or rays.directions.requires_grad):
        # The same values; t moves as its ray's t_enter does.
        t = t + (t_enter - t_enter.detach()).index_select(0, ray)
        origins, directions = (x.index_select(0, ray) for x in (rays.origins, rays.directions))
        moved = normalise(origins + directions * t[:, None], aabb)
        if n_live is not None:
            moved = torch.where((position == _NOWHERE).all(-1, keepdim=True), position, moved)
        position = moved
    return Samples(ray, t, delta, position, offsets, n_live)


def _memory(offsets: Tensor, aabb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for rays [K], t [K], deltas [K] and positions [K, 3] of all samples."""
    total = int(offsets[-1])  # waits for the device, as memory for the samples needs their number
    return offsets.new_empty(total), aabb.new_empty(total), aabb.new_empty(total), aabb.new_empty(total, 3)


def _room(capacity: int, offsets: Tensor, aabb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for capacity samples and one more, all nobody's; offsets end where the room does."""
    offsets.clamp_(max=capacity)
    total = capacity + 1
    return offsets.new_zeros(total), aabb.new_zeros(total), aabb.new_zeros(total), aabb.new_full((total, 3), _NOWHERE)


# --- weights ---------------------------------------------------------------------------------------------------------
@triton.jit
def _softplus(x):
    """log(1 + exp(x)). Triton's log is inexact near 1, so log(1 + z) is 2 atanh(z/(2 + z)), a quick series."""
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.where(x < 0, 0.0, x) + 2 * s * series


@triton.jit
def _opacity(x):
    """1 - exp(-x); a series for small x, where Triton's exp is too coarse for what is left of 1."""
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7))))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - tl.exp(-x))


@triton.jit
def _density(f, shift, SOFTPLUS: tl.constexpr):
    """sigma [BLOCK] of density features f [BLOCK]."""
    return _softplus(f + shift) if SOFTPLUS else tl.where(f < 0, 0.0, f)  # which keeps NaN


@triton.jit
def opacities(f, delta, i, valid, shift, scale, SOFTPLUS: tl.constexpr):
    """alpha [BLOCK] of samples i with density features f [BLOCK]; 0 where not valid."""
    length = tl.load(delta + i, mask=valid, other=0.0) * scale
    return tl.where(valid, _opacity(_density(f, shift, SOFTPLUS) * length), 0.0)


@triton.jit
def _alpha(feature, delta, i, valid, shift, scale, SOFTPLUS: tl.constexpr):
    """alpha [BLOCK] of samples i; 0 where not valid."""
    f = tl.load(feature + i, mask=valid, other=0.0)
    return opacities(f, delta, i, valid, shift, scale, SOFTPLUS)


@triton.jit(do_not_specialize=["shift", "scale"])
def _weights_forward(
    weights, light, feature, delta, offsets, shift, scale, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr
):
    """weights [K] and transmittances light [K] of a ray: products of 1 - alpha + 1e-10 of the samples before."""
    ray = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    lane = tl.arange(0, BLOCK)
    carried = 1.0
    for first in range(begin, end, BLOCK):
        i = first + lane
        # What each sample leaves is multiplied in at its successor's lane, so that the scan excludes the sample.
        before = (i > begin) & (i < end)
        left = tl.where(before, 1 - _alpha(feature, delta, i - 1, before, shift, scale, SOFTPLUS) + 1e-10, 1.0)
        product = carried * tl.cumprod(left, 0)
        tl.store(light + i, product, mask=i < end)
        tl.store(weights + i, _alpha(feature, delta, i, i < end, shift, scale, SOFTPLUS) * product, mask=i < end)
        carried = tl.sum(tl.where(lane == BLOCK - 1, product, 0.0), 0)


@triton.jit(do_not_specialize=["shift", "scale"])
def _weights_backward(
    gradient, upstream, light, feature, delta, offsets, shift, scale, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr
):
    """d loss / d feature [K]. dw_j/dalpha_i = -w_j / (1 - alpha_i + 1e-10) for j > i: from a ray's last sample on."""
    ray = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    lane = tl.arange(0, BLOCK)
    carried = 0.0
    for first in range(0, end - begin, BLOCK):
        i = end - 1 - first - lane
        # As above: a sample is summed at its predecessor's lane. A difference would lose what an opaque one leaves.
        after = (i + 1 < end) & (i + 1 >= begin)
        g = tl.load(upstream + i + 1, mask=after, other=0.0) * tl.load(light + i + 1, mask=after, other=0.0)
        later = carried + tl.cumsum(g * _alpha(feature, delta, i + 1, after, shift, scale, SOFTPLUS), 0)
        valid = i >= begin
        f = tl.load(feature + i, mask=valid, other=0.0)
        length = tl.load(delta + i, mask=valid, other=0.0) * scale
        depth = _density(f, shift, SOFTPLUS) * length
        g = tl.load(upstream + i, mask=valid, other=0.0) * tl.load(light + i, mask=valid, other=0.0)
        to_alpha = g - later / (1 - _opacity(depth) + 1e-10)
        slope = 1 / (1 + tl.exp(-(f + shift))) if SOFTPLUS else tl.where(f > 0, 1.0, 0.0)
        # exp(-depth), not 1 - alpha: of that, an opaque sample has lost all digits.
        tl.store(gradient + i, to_alpha * tl.exp(-depth) * length * slope, mask=valid)
        carried = tl.sum(tl.where(lane == BLOCK - 1, later, 0.0), 0)


class _Weights(torch.autograd.Function):
    """Weights [K] of density features [K]."""

    @staticmethod
    def forward(
        ctx, feature: Tensor, delta: Tensor, offsets: Tensor, padded: bool, softplus: bool, shift: float, scale: float
    ):
        feature, delta, offsets = feature.contiguous(), delta.contiguous(), offsets.contiguous()
        # What is nobody's is not written, and weighs nothing.
        ctx.new = torch.zeros_like if padded else torch.empty_like
        weights, light = ctx.new(feature), ctx.new(feature)
        ctx.settings = (float(shift), float(scale)), {"SOFTPLUS": softplus, "BLOCK": _BLOCK, "num_warps": _WARPS}
        numbers, options = ctx.settings
        with torch.cuda.device_of(feature):
            _weights_forward[(len(offsets) - 1,)](weights, light, feature, delta, offsets, *numbers, **options)
        ctx.save_for_backward(light, feature, delta, offsets)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        light, feature, delta, offsets = ctx.saved_tensors
        numbers, options = ctx.settings
        gradient = ctx.new(feature)
        arguments = (gradient, grad.contiguous(), light, feature, delta, offsets)
        with torch.cuda.device_of(feature):
            _weights_backward[(len(offsets) - 1,)](*arguments, *numbers, **options)
        return gradient, None, None, None, None, None, None


def ray_weights(feature: Tensor, samples: Samples, activation: str, shift: float, scale: float) -> Tensor:
    """Weights w [K] of samples; see components.compositing.ray_weights."""
    if not len(samples) or samples.delta.requires_grad or not serves(feature, samples.delta):
        return torch_rendering.ray_weights(feature, samples, activation, shift, scale)
    padded = samples.n_live is not None
    return _Weights.apply(feature, samples.delta, samples.offsets, padded, activation == "softplus", shift, scale)


# --- compositing -----------------------------------------------------------------------------------------------------
@triton.jit
def _composite_forward(
    rgb, opacity, distance, weights, t, offsets, coloured, coloured_offsets, colour, BLOCK: tl.constexpr
):
    """A ray's rgb, opacity and sum of w*t. coloured_offsets: where each ray's entries of `coloured` begin."""
    ray = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    begin = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    sum_w = tl.zeros([BLOCK], tl.float32)
    sum_wt = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + lane
        w = tl.load(weights + i, mask=i < end, other=0.0)
        sum_w += w
        sum_wt += w * tl.load(t + i, mask=i < end, other=0.0)
    tl.store(opacity + ray, tl.sum(sum_w, 0))
    tl.store(distance + ray, tl.sum(sum_wt, 0))
    begin = tl.load(coloured_offsets + ray)
    end = tl.load(coloured_offsets + ray + 1)
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        j = first + lane
        valid = j < end
        w = tl.load(weights + tl.load(coloured + j, mask=valid, other=0), mask=valid, other=0.0)
        red += w * tl.load(colour + 3 * j, mask=valid, other=0.0)
        green += w * tl.load(colour + 3 * j + 1, mask=valid, other=0.0)
        blue += w * tl.load(colour + 3 * j + 2, mask=valid, other=0.0)
    tl.store(rgb + 3 * ray, tl.sum(red, 0))
    tl.store(rgb + 3 * ray + 1, tl.sum(green, 0))
    tl.store(rgb + 3 * ray + 2, tl.sum(blue, 0))


@triton.jit(do_not_specialize=["n"])
def _composite_backward(
    weights_gradient, colour_gradient, to_rgb, weights, rays, coloured, colour, n, BLOCK: tl.constexpr
):
    """For coloured samples: adds to d loss / d weights (each sample comes up once), writes d loss / d colour."""
    j = numbered(tl.program_id(0), BLOCK)
    valid = j < n
    i = tl.load(coloured + j, mask=valid, other=0)
    ray = tl.load(rays + i, mask=valid, other=0)
    w = tl.load(weights + i, mask=valid, other=0.0)
    slope = tl.load(weights_gradient + i, mask=valid, other=0.0)
    for channel in range(3):
        g = tl.load(to_rgb + 3 * ray + channel, mask=valid, other=0.0)
        slope += g * tl.load(colour + 3 * j + channel, mask=valid, other=0.0)
        tl.store(colour_gradient + 3 * j + channel, g * w, mask=valid)
    tl.store(weights_gradient + i, slope, mask=valid)


class _Composite(torch.autograd.Function):
    """(rgb [B, 3], opacity [B], distance [B]) of weights [K] and colours [Kc, 3]."""

    @staticmethod
    def forward(ctx, weights: Tensor, colour: Tensor, ray: Tensor, t: Tensor, offsets: Tensor, coloured: Tensor):
        weights, colour, ray, t, offsets, coloured = (
            x.contiguous() for x in (weights, colour, ray, t, offsets, coloured)
        )
        n_rays = len(offsets) - 1
        rgb, opacity, distance = weights.new_empty(n_rays, 3), weights.new_empty(n_rays), weights.new_empty(n_rays)
        coloured_offsets = torch.searchsorted(coloured, offsets)
        arguments = (rgb, opacity, distance, weights, t, offsets, coloured, coloured_offsets, colour)
        with torch.cuda.device_of(weights):
            _composite_forward[(n_rays,)](*arguments, BLOCK=_BLOCK, num_warps=_WARPS)
        ctx.save_for_backward(weights, colour, ray, coloured)
        ctx.mark_non_differentiable(distance)
        return rgb, opacity, distance

    @staticmethod
    @once_differentiable
    def backward(ctx, to_rgb: Tensor, to_opacity: Tensor, _):
        weights, colour, ray, coloured = ctx.saved_tensors
        to_weights, to_colour, n = to_opacity[ray], torch.empty_like(colour), len(coloured)
        if n:
            arguments = (to_weights, to_colour, to_rgb.contiguous(), weights, ray, coloured, colour, n)
            with torch.cuda.device_of(weights):
                _composite_backward[(triton.cdiv(n, _FLAT_BLOCK),)](*arguments, BLOCK=_FLAT_BLOCK)
        return to_weights, to_colour, None, None, None, None


def composite(weights: Tensor, samples: Samples, coloured: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb [B, 3], opacity [B], sum of w*t [B]); see components.compositing.composite."""
    if not len(samples) or not serves(weights, samples.t, colour):
        return torch_rendering.composite(weights, samples, coloured, colour)
    return _Composite.apply(weights, colour, samples.ray, samples.t.detach(), samples.offsets, coloured)
