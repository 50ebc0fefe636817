"""Marching, weights and compositing as Triton kernels, for CUDA; the definition is torch_rendering.

Letters: B rays, K samples, Kc coloured ones, k sample number, u jitter, T transmittance. One program (one warp) takes
a ray and goes along it BLOCK numbers or samples at a time, so nothing as long as all candidates is ever stored.

Marching keeps exactly the definition's samples: the same float32 expressions in the same order, without fused
multiply-adds (UNFUSED) and without Triton's `/`, which is not rounded correctly. Weights are running
products in float32, as the reference's cumprod. Anything that is not float32 on CUDA takes torch_rendering's way.

With a capacity (see components.marching.Samples.n_live) marching does not wait for the device.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.marching import Mask, Samples, box_intersection, candidate_counts, ndc_rows, normalise
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
def _ray_parameter(number, valid, start, step, u, t_row, NDC: tl.constexpr):
    """t [BLOCK] of sample numbers of one ray."""
    if NDC:
        return tl.load(t_row + number, mask=valid, other=0.0)
    else:
        return start + step * (number.to(tl.float32) + u)


@triton.jit
def _candidates(
    t, valid, origin, direction, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED: tl.constexpr,
):  # fmt: skip
    """(x, y, z, whether the sample lives), each [BLOCK], at t [BLOCK] of one ray."""
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
    return x, y, z, live


@triton.jit
def _start_and_jitter(t_enter, jitter, ray, NDC: tl.constexpr, JITTERED: tl.constexpr):
    """Where a ray's sample numbers begin, and by how much of a step they are moved; NDC's t say both."""
    start = 0.0
    u = 0.0
    if not NDC:
        start = tl.load(t_enter + ray)
        if JITTERED:
            u = tl.load(jitter + ray)
    return start, u


@triton.jit(do_not_specialize=["step", "size_x", "size_y", "size_z"])
def _count(
    counts, n_candidates, t_enter, jitter, t_row, origins, directions, step, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z,
    NDC: tl.constexpr, JITTERED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [B] int64: live samples of each ray."""
    ray = tl.program_id(0).to(tl.int64)
    n = tl.load(n_candidates + ray)
    start, u = _start_and_jitter(t_enter, jitter, ray, NDC, JITTERED)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        number = first + tl.arange(0, BLOCK)
        t = _ray_parameter(number, number < n, start, step, u, t_row, NDC)
        _, _, _, live = _candidates(
            t, number < n, origins + 3 * ray, directions + 3 * ray, aabb,
            cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED,
        )  # fmt: skip
        total += live.to(tl.int32)
    tl.store(counts + ray, tl.sum(total, 0).to(tl.int64))


@triton.jit(do_not_specialize=["step", "n_samples", "size_x", "size_y", "size_z"])
def _fill(
    rays, ts, deltas, positions, box_scale, offsets, n_samples, delta_row, length,
    n_candidates, t_enter, jitter, t_row, origins, directions, step, aabb,
    cells, allowed, scale, mask_aabb, size_x, size_y, size_z,
    NDC: tl.constexpr, JITTERED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes each ray's samples from offsets[ray] on, those that end before offsets[ray + 1]: rays [K] int64, ts [K],
    deltas [K], positions [K, 3]."""
    ray = tl.program_id(0).to(tl.int64)
    n = tl.load(n_candidates + ray)
    start, u = _start_and_jitter(t_enter, jitter, ray, NDC, JITTERED)
    written = tl.load(offsets + ray)
    end = tl.load(offsets + ray + 1)
    for first in range(0, n, BLOCK):
        number = first + tl.arange(0, BLOCK)
        t = _ray_parameter(number, number < n, start, step, u, t_row, NDC)
        x, y, z, live = _candidates(
            t, number < n, origins + 3 * ray, directions + 3 * ray, aabb,
            cells, allowed, scale, mask_aabb, size_x, size_y, size_z, MASKED,
        )  # fmt: skip
        if NDC:
            delta = tl.load(delta_row + number, mask=number < n, other=0.0) * tl.load(length + ray)
        else:
            following = start + step * ((number.to(tl.float32) + 1) + u)
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
    if not _takes(rays, aabb, jitter, mask, capacity):
        return torch_rendering.march_box(rays, aabb, near, far, step, n_samples, jitter, mask)
    t_enter, t_exit = box_intersection(rays, aabb)
    t_enter = t_enter.clamp(near, far)
    with torch.no_grad():
        n_candidates = candidate_counts(t_enter, t_exit, step, n_samples)
        given = {"t_enter": t_enter.contiguous(), "jitter": None if jitter is None else jitter.contiguous()}
        samples = _marched(rays, aabb, mask, capacity, n_candidates, n_samples, float(step), **given)
    if rays.detach_samples or not (rays.origins.requires_grad or rays.directions.requires_grad):
        return samples
    # The same values; t moves as its ray's t_enter does.
    t = samples.t + (t_enter - t_enter.detach()).index_select(0, samples.ray)
    return replace(samples, t=t, position=_moving(rays, samples, t, aabb))


def march_ndc(
    rays: Rays,
    aabb: Tensor,
    near: float,
    far: float,
    n_samples: int,
    jitter: Tensor | None = None,
    mask: Mask | None = None,
    capacity: int | None = None,
) -> Samples:
    """Samples of rays in aabb and mask; see components.marching.march_ndc. jitter: [1, S]; capacity: see march_box."""
    t_row, delta_row = ndc_rows(rays, near, far, n_samples, jitter)
    if len(t_row) > 1 or not _takes(rays, aabb, t_row, mask, capacity):
        if capacity is not None:
            raise ValueError("a capacity needs one jitter for all rays")
        return torch_rendering.march_ndc(rays, aabb, near, far, n_samples, jitter, mask)
    length = torch.linalg.vector_norm(rays.directions, dim=-1)
    with torch.no_grad():
        n_candidates = torch.full((len(rays),), n_samples, dtype=torch.int64, device=aabb.device)
        own = torch.ones_like(length) if length.requires_grad else length
        given = {"t_row": t_row[0].contiguous(), "delta_row": delta_row[0].contiguous(), "length": own}
        samples = _marched(rays, aabb, mask, capacity, n_candidates, n_samples, 0.0, **given)
    if length.requires_grad:
        samples = replace(samples, delta=samples.delta * length.index_select(0, samples.ray))
    if rays.detach_samples or not (rays.origins.requires_grad or rays.directions.requires_grad):
        return samples
    return replace(samples, position=_moving(rays, samples, samples.t, aabb))


@torch.no_grad()
def count_in_mask(rays: Rays, t_enter: Tensor, n_candidates: Tensor, step: float, mask: Mask) -> Tensor:
    """See components.marching.count_in_mask."""
    if not _takes(rays, t_enter, None, mask, None):
        return torch_rendering.count_in_mask(rays, t_enter, n_candidates, step, mask)
    everywhere = torch.tensor([[-torch.inf] * 3, [torch.inf] * 3], device=t_enter.device)
    return _counted(rays, everywhere, mask, n_candidates, float(step), t_enter=t_enter.contiguous())[0]


def _takes(rays: Rays, aabb: Tensor, numbers: Tensor | None, mask: Mask | None, capacity: int | None) -> bool:
    """Whether the kernels serve; numbers: jitter or t. Raises ValueError if not, but a capacity is asked for."""
    floats = [rays.origins, rays.directions, aabb, *([] if numbers is None else [numbers])]
    masks = [mask.aabb] if isinstance(mask, AlphaMask) else []
    taken = len(rays) > 0 and serves(*floats, *masks) and (mask is None or len(masks) > 0)
    if not taken and capacity is not None:
        raise ValueError("a capacity needs rays, box and mask in float32 on CUDA")
    return taken


def _counted(
    rays: Rays,
    aabb: Tensor,
    mask: AlphaMask | None,
    n_candidates: Tensor,
    step: float,
    t_enter: Tensor | None = None,
    jitter: Tensor | None = None,
    t_row: Tensor | None = None,
) -> tuple[Tensor, tuple, dict]:
    """(live samples of each ray [B], arguments, options): what `_fill` takes too."""
    origins, directions, aabb = rays.origins.contiguous(), rays.directions.contiguous(), aabb.contiguous()
    # Pointers that are not read: aabb's.
    masked = (aabb, aabb, aabb, aabb, 2, 2, 2)
    if mask is not None:
        masked = (mask.cells.contiguous(), mask.allowed, mask.scale, mask.aabb.contiguous(), *mask.grid_size)
    options = {"NDC": t_row is not None, "JITTERED": jitter is not None, "MASKED": mask is not None, "BLOCK": _BLOCK}
    options |= {"num_warps": _WARPS} | UNFUSED
    own = [aabb if x is None else x for x in (t_enter, jitter, t_row)]
    arguments = (n_candidates, *own, origins, directions, step, aabb, *masked)
    counts = torch.empty_like(n_candidates)
    with torch.cuda.device_of(aabb):
        _count[(len(rays),)](counts, *arguments, **options)
    return counts, arguments, options


def _marched(
    rays: Rays,
    aabb: Tensor,
    mask: AlphaMask | None,
    capacity: int | None,
    n_candidates: Tensor,
    n_samples: int,
    step: float,
    delta_row: Tensor | None = None,
    length: Tensor | None = None,
    **given,
) -> Samples:
    """Samples without gradients, of n_candidates [B] int64 sample numbers a ray; `given`: where these are, from t_enter
    [B] on, or at t_row [S] of NDC."""
    counts, arguments, options = _counted(rays, aabb, mask, n_candidates, step, **given)
    with torch.cuda.device_of(aabb):
        offsets = torch.zeros(len(rays) + 1, dtype=torch.int64, device=aabb.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        n_live = None if capacity is None else offsets[-1].clone()
        ray, t, delta, position = _memory(offsets, aabb) if capacity is None else _room(capacity, offsets, aabb)
        box_scale = 2.0 / (aabb[1] - aabb[0])  # as components.marching.normalise
        if len(ray):
            rows = [aabb if x is None else x for x in (delta_row, length)]
            outputs = (ray, t, delta, position, box_scale, offsets, n_samples, *rows)
            _fill[(len(rays),)](*outputs, *arguments, **options)
    return Samples(ray, t, delta, position, offsets, n_live)


def _moving(rays: Rays, samples: Samples, t: Tensor, aabb: Tensor) -> Tensor:
    """Positions of samples at t, which follow their rays' gradients; what is nobody's stays where it is."""
    origins, directions = (x.index_select(0, samples.ray) for x in (rays.origins, rays.directions))
    moved, position = normalise(origins + directions * t[:, None], aabb), samples.position
    if samples.n_live is None:
        return moved
    return torch.where((position == _NOWHERE).all(-1, keepdim=True), position, moved)


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
    gradient, to_delta, upstream, light, feature, delta, offsets, shift, scale,
    SOFTPLUS: tl.constexpr, DISTANCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d feature [K] and, if DISTANCES, d loss / d delta [K].

    dw_j/dalpha_i = -w_j / (1 - alpha_i + 1e-10) for j > i: from a ray's last sample on.
    """
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
        to_depth = to_alpha * tl.exp(-depth)
        tl.store(gradient + i, to_depth * length * slope, mask=valid)
        if DISTANCES:
            tl.store(to_delta + i, to_depth * _density(f, shift, SOFTPLUS) * scale, mask=valid)
        carried = tl.sum(tl.where(lane == BLOCK - 1, later, 0.0), 0)


class _Weights(torch.autograd.Function):
    """Weights [K] of density features [K] and distances [K]."""

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
        gradient, distances = ctx.new(feature), ctx.needs_input_grad[1]
        to_delta = ctx.new(delta) if distances else None
        arguments = (gradient, gradient if to_delta is None else to_delta, grad.contiguous(), light, feature, delta)
        with torch.cuda.device_of(feature):
            _weights_backward[(len(offsets) - 1,)](*arguments, offsets, *numbers, **options, DISTANCES=distances)
        return gradient, to_delta, None, None, None, None, None


def ray_weights(feature: Tensor, samples: Samples, activation: str, shift: float, scale: float) -> Tensor:
    """Weights w [K] of samples; see components.compositing.ray_weights."""
    if not len(samples) or not serves(feature, samples.delta):
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
