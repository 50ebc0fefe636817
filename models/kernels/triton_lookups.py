"""Lookups in the factors as Triton kernels, for CUDA; equal to torch_lookups up to rounding, in single precision.

Letters: K points xyz [K, 3] in [-1, 1], C components of a table, stored channels-last: a factor [1, C, H, W] is H*W
rows of C numbers. P points of a program's tile [P, C2], where C2 is C padded to a power of two; (u, v) grid point of
a table, a line being a table with size_v = 1; fu, fv shares of the upper neighbours.

Anything that is not float32 on CUDA takes gather_lookups' way. Nothing of size [K, C] is kept: density sums in
registers, appearance writes the products of a chunk of points, which backward computes again.

Where a point lies between grid points is rounded as torch rounds it on a CPU, for which a compiler must not fuse
products and sums (UNFUSED); where they may be fused, tl.fma says so.

Backward: points come along rays, about two samples a cell. So each row of a tile walks LENGTH consecutive points and
collects the gradients of its cell's corners in registers; only when it enters another cell they go to memory, with
one atomic addition a corner. The order of these additions, hence the last bits of the gradients, may vary.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import gather_lookups
from models.kernels.triton_common import UNFUSED, numbered, power_of_two, serves

# Values of a tile [P, C2]: 8 a thread (4 warps, Triton's default) where they are only read, 4 where 6 accumulators
# of the same shape must stay in registers.
_TILE, _GRADIENT_TILE = 1024, 512
# Consecutive points of one walk: longer ones flush less often, shorter ones keep more of the GPU busy.
_LENGTH = 16
# Products (points x components) held at once: 64 MiB.
_CHUNK_VALUES = 1 << 24
# Grids grow and numbers of points change while training: kernels are not compiled anew for their divisibility.
SIZES = [f"size_{axis}{mode}" for mode in range(3) for axis in "uvw"]


# --- pieces of kernels -----------------------------------------------------------------------------------------------
@triton.jit
def _along(xyz, k, live, AXIS: tl.constexpr, size):
    """(lower neighbour [P] int32, share of the upper one [P]) of points k [P] along an axis.

    lower is -1 .. size - 1 where one of the two lies on the grid, else -2: far outside, NaN, or not live.
    """
    coordinate = tl.load(xyz + 3 * k + AXIS, mask=live, other=float("nan"))
    position = ((coordinate + 1) * 0.5) * (size - 1)
    lower = tl.floor(position)
    near = (lower >= -1) & (lower < size)
    return tl.where(near, lower, -2.0).to(tl.int32), tl.where(near, position - lower, 0.0)


@triton.jit
def _row(u, v, size_u, size_v, C: tl.constexpr, C2: tl.constexpr):
    """(where [P, C2] int64, valid [P, C2]): the numbers of the table's rows at grid points (u, v), if on the grid."""
    inside = (u >= 0) & (u < size_u) & (v >= 0) & (v < size_v)
    channel = tl.arange(0, C2)
    row = v.to(tl.int64) * size_u + u
    return row[:, None] * C + channel[None, :], inside[:, None] & (channel < C)[None, :]


@triton.jit
def _read(table, u, v, size_u, size_v, C: tl.constexpr, C2: tl.constexpr):
    """[P, C2] values at grid points (u, v), 0 outside."""
    where, valid = _row(u, v, size_u, size_v, C, C2)
    return tl.load(table + where, mask=valid, other=0.0)


@triton.jit
def _add(gradient, values, chosen, u, v, size_u, size_v, C: tl.constexpr, C2: tl.constexpr):
    """Add values [P, C2] to the rows at grid points (u, v) where `chosen` [P]."""
    where, valid = _row(u, v, size_u, size_v, C, C2)
    tl.atomic_add(gradient + where, values, mask=valid & chosen[:, None], sem="relaxed")


@triton.jit
def _read_line(line, w, size, C: tl.constexpr, C2: tl.constexpr):
    """[P, C2] each: values at w and w + 1."""
    zero = tl.zeros_like(w)
    return _read(line, w, zero, size, 1, C, C2), _read(line, w + 1, zero, size, 1, C, C2)


@triton.jit
def _read_plane(plane, u, v, size_u, size_v, C: tl.constexpr, C2: tl.constexpr):
    """[P, C2] each: values at (u, v), (u + 1, v), (u, v + 1), (u + 1, v + 1)."""
    p00 = _read(plane, u, v, size_u, size_v, C, C2)
    p10 = _read(plane, u + 1, v, size_u, size_v, C, C2)
    p01 = _read(plane, u, v + 1, size_u, size_v, C, C2)
    p11 = _read(plane, u + 1, v + 1, size_u, size_v, C, C2)
    return p00, p10, p01, p11


@triton.jit
def _between(lower, upper, share):
    """[P, C2]: linear interpolation of values [P, C2]; share [P]."""
    return tl.fma(upper, share[:, None], lower * (1 - share)[:, None])


@triton.jit
def _bilinear(p00, p10, p01, p11, fu, fv):
    return _between(_between(p00, p10, fu), _between(p01, p11, fu), fv)


@triton.jit
def line_values(line, xyz, k, live, AXIS: tl.constexpr, size, C: tl.constexpr, C2: tl.constexpr):
    """[P, C2] linear lookups at points k."""
    w, fw = _along(xyz, k, live, AXIS, size)
    l0, l1 = _read_line(line, w, size, C, C2)
    return _between(l0, l1, fw)


@triton.jit
def vm_products(
    plane, line, xyz, k, live, size_u, size_v, size_w,
    U: tl.constexpr, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
):  # fmt: skip
    """[P, C2] products plane * line of one mode at points k."""
    u, fu = _along(xyz, k, live, U, size_u)
    v, fv = _along(xyz, k, live, V, size_v)
    p00, p10, p01, p11 = _read_plane(plane, u, v, size_u, size_v, C, C2)
    return _bilinear(p00, p10, p01, p11, fu, fv) * line_values(line, xyz, k, live, W, size_w, C, C2)


@triton.jit
def _store_products(out, products, k, live, WIDTH: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):  # fmt: skip # noqa: E501
    """products [P, C2] to columns OFFSET .. OFFSET + C - 1 of out [K, WIDTH]."""
    channel = tl.arange(0, C2)
    valid = live[:, None] & (channel < C)[None, :]
    tl.store(out + k[:, None] * WIDTH + OFFSET + channel[None, :], products, mask=valid)


@triton.jit
def _upstream(upstream, k, live, SUM: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):  # fmt: skip # noqa: E501
    """d loss / d products of points k: [P, 1] if the products are summed, else [P, C2]."""
    if SUM:
        return tl.load(upstream + k, mask=live, other=0.0)[:, None]
    else:
        channel = tl.arange(0, C2)
        valid = live[:, None] & (channel < C)[None, :]
        return tl.load(upstream + k[:, None] * WIDTH + OFFSET + channel[None, :], mask=valid, other=0.0)


# --- forward: one program for P points, all modes --------------------------------------------------------------------
# Axes 0, 1, 2 in these kernels are torch_lookups' PLANE_AXES and LINE_AXES.
@triton.jit(do_not_specialize=["n", *SIZES])
def _vm_forward(
    out, xyz, n, plane0, line0, plane1, line1, plane2, line2,
    size_u0, size_v0, size_w0, size_u1, size_v1, size_w1, size_u2, size_v2, size_w2,
    C_0: tl.constexpr, C_1: tl.constexpr, C_2: tl.constexpr,
    C2_0: tl.constexpr, C2_1: tl.constexpr, C2_2: tl.constexpr, SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Products of all modes, summed into out [K] or side by side in out [K, C_0 + C_1 + C_2]."""
    k = numbered(tl.program_id(0), P)
    live = k < n
    first = vm_products(plane0, line0, xyz, k, live, size_u0, size_v0, size_w0, 0, 1, 2, C_0, C2_0)
    second = vm_products(plane1, line1, xyz, k, live, size_u1, size_v1, size_w1, 0, 2, 1, C_1, C2_1)
    third = vm_products(plane2, line2, xyz, k, live, size_u2, size_v2, size_w2, 1, 2, 0, C_2, C2_2)
    if SUM:
        tl.store(out + k, tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(third, 1), mask=live)
    else:
        WIDTH: tl.constexpr = C_0 + C_1 + C_2
        _store_products(out, first, k, live, WIDTH, 0, C_0, C2_0)
        _store_products(out, second, k, live, WIDTH, C_0, C_1, C2_1)
        _store_products(out, third, k, live, WIDTH, C_0 + C_1, C_2, C2_2)


@triton.jit
def cp_products(
    line0, line1, line2, xyz, k, live, size_0, size_1, size_2, C: tl.constexpr, C2: tl.constexpr
):  # fmt: skip
    """[P, C2] products of three lines at points k."""
    products = line_values(line0, xyz, k, live, 2, size_0, C, C2)
    products *= line_values(line1, xyz, k, live, 1, size_1, C, C2)
    return products * line_values(line2, xyz, k, live, 0, size_2, C, C2)


@triton.jit(do_not_specialize=["n", "size_0", "size_1", "size_2"])
def _cp_forward(
    out, xyz, n, line0, line1, line2, size_0, size_1, size_2,
    C: tl.constexpr, C2: tl.constexpr, SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Products of three lines, summed into out [K] or out [K, C] itself."""
    k = numbered(tl.program_id(0), P)
    live = k < n
    products = cp_products(line0, line1, line2, xyz, k, live, size_0, size_1, size_2, C, C2)
    if SUM:
        tl.store(out + k, tl.sum(products, 1), mask=live)
    else:
        _store_products(out, products, k, live, C, 0, C, C2)


# --- backward: factors -----------------------------------------------------------------------------------------------
@triton.jit
def _add_line(gradient, a0, a1, chosen, w, size, C: tl.constexpr, C2: tl.constexpr):
    """Add what was collected for the cell w of a line, where `chosen`."""
    zero = tl.zeros_like(w)
    _add(gradient, a0, chosen, w, zero, size, 1, C, C2)
    _add(gradient, a1, chosen, w + 1, zero, size, 1, C, C2)


@triton.jit
def _add_plane(gradient, a00, a10, a01, a11, chosen, u, v, size_u, size_v, C: tl.constexpr, C2: tl.constexpr):
    """Add what was collected for the cell (u, v) of a plane, where `chosen`."""
    _add(gradient, a00, chosen, u, v, size_u, size_v, C, C2)
    _add(gradient, a10, chosen, u + 1, v, size_u, size_v, C, C2)
    _add(gradient, a01, chosen, u, v + 1, size_u, size_v, C, C2)
    _add(gradient, a11, chosen, u + 1, v + 1, size_u, size_v, C, C2)


@triton.jit(do_not_specialize=["n", "size_u", "size_v", "size_w"])
def _vm_gradients(
    upstream, xyz, n, plane, line, plane_gradient, line_gradient, size_u, size_v, size_w,
    U: tl.constexpr, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    SUM: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, P: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Adds d loss / d plane and line of one mode; each of P walks takes LENGTH points."""
    walk = numbered(tl.program_id(0), P)
    # The cells the walks are in: none yet, so nothing is on the grid to be added to.
    cell_u = tl.full([P], -2, tl.int32)
    cell_v = tl.full([P], -2, tl.int32)
    cell_w = tl.full([P], -2, tl.int32)
    a00 = tl.zeros([P, C2], tl.float32)
    a10 = tl.zeros([P, C2], tl.float32)
    a01 = tl.zeros([P, C2], tl.float32)
    a11 = tl.zeros([P, C2], tl.float32)
    a0 = tl.zeros([P, C2], tl.float32)
    a1 = tl.zeros([P, C2], tl.float32)
    for number in range(LENGTH):
        k = walk * LENGTH + number
        live = k < n
        u, fu = _along(xyz, k, live, U, size_u)
        v, fv = _along(xyz, k, live, V, size_v)
        w, fw = _along(xyz, k, live, W, size_w)
        p00, p10, p01, p11 = _read_plane(plane, u, v, size_u, size_v, C, C2)
        l0, l1 = _read_line(line, w, size_w, C, C2)
        g = _upstream(upstream, k, live, SUM, WIDTH, OFFSET, C, C2)
        to_plane = g * _between(l0, l1, fw)
        to_line = g * _bilinear(p00, p10, p01, p11, fu, fv)

        moved = (u != cell_u) | (v != cell_v)
        _add_plane(plane_gradient, a00, a10, a01, a11, moved, cell_u, cell_v, size_u, size_v, C, C2)
        same = ~moved[:, None]
        a00 = tl.fma(to_plane, ((1 - fu) * (1 - fv))[:, None], tl.where(same, a00, 0.0))
        a10 = tl.fma(to_plane, (fu * (1 - fv))[:, None], tl.where(same, a10, 0.0))
        a01 = tl.fma(to_plane, ((1 - fu) * fv)[:, None], tl.where(same, a01, 0.0))
        a11 = tl.fma(to_plane, (fu * fv)[:, None], tl.where(same, a11, 0.0))
        cell_u, cell_v = u, v

        moved = w != cell_w
        _add_line(line_gradient, a0, a1, moved, cell_w, size_w, C, C2)
        same = ~moved[:, None]
        a0 = tl.fma(to_line, (1 - fw)[:, None], tl.where(same, a0, 0.0))
        a1 = tl.fma(to_line, fw[:, None], tl.where(same, a1, 0.0))
        cell_w = w
    everyone = walk >= 0
    _add_plane(plane_gradient, a00, a10, a01, a11, everyone, cell_u, cell_v, size_u, size_v, C, C2)
    _add_line(line_gradient, a0, a1, everyone, cell_w, size_w, C, C2)


@triton.jit
def _collect(gradient, a0, a1, added, w, fw, cell, size, C: tl.constexpr, C2: tl.constexpr):
    """A walk's next point on a line: what was collected goes to memory if the cell changes. The new (a0, a1)."""
    moved = w != cell
    _add_line(gradient, a0, a1, moved, cell, size, C, C2)
    same = ~moved[:, None]
    a0 = tl.fma(added, (1 - fw)[:, None], tl.where(same, a0, 0.0))
    a1 = tl.fma(added, fw[:, None], tl.where(same, a1, 0.0))
    return a0, a1


@triton.jit(do_not_specialize=["n", "size_0", "size_1", "size_2"])
def _cp_gradients(
    upstream, xyz, n, line0, line1, line2, gradient0, gradient1, gradient2, size_0, size_1, size_2,
    C: tl.constexpr, C2: tl.constexpr, SUM: tl.constexpr, P: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Adds d loss / d lines; each of P walks takes LENGTH points."""
    walk = numbered(tl.program_id(0), P)
    cell_0 = tl.full([P], -2, tl.int32)
    cell_1 = tl.full([P], -2, tl.int32)
    cell_2 = tl.full([P], -2, tl.int32)
    a00 = tl.zeros([P, C2], tl.float32)
    a01 = tl.zeros([P, C2], tl.float32)
    a10 = tl.zeros([P, C2], tl.float32)
    a11 = tl.zeros([P, C2], tl.float32)
    a20 = tl.zeros([P, C2], tl.float32)
    a21 = tl.zeros([P, C2], tl.float32)
    for number in range(LENGTH):
        k = walk * LENGTH + number
        live = k < n
        w0, f0 = _along(xyz, k, live, 2, size_0)
        w1, f1 = _along(xyz, k, live, 1, size_1)
        w2, f2 = _along(xyz, k, live, 0, size_2)
        lower, upper = _read_line(line0, w0, size_0, C, C2)
        value0 = _between(lower, upper, f0)
        lower, upper = _read_line(line1, w1, size_1, C, C2)
        value1 = _between(lower, upper, f1)
        lower, upper = _read_line(line2, w2, size_2, C, C2)
        value2 = _between(lower, upper, f2)
        g = _upstream(upstream, k, live, SUM, C, 0, C, C2)
        a00, a01 = _collect(gradient0, a00, a01, g * value1 * value2, w0, f0, cell_0, size_0, C, C2)
        a10, a11 = _collect(gradient1, a10, a11, g * value0 * value2, w1, f1, cell_1, size_1, C, C2)
        a20, a21 = _collect(gradient2, a20, a21, g * value0 * value1, w2, f2, cell_2, size_2, C, C2)
        cell_0, cell_1, cell_2 = w0, w1, w2
    everyone = walk >= 0
    _add_line(gradient0, a00, a01, everyone, cell_0, size_0, C, C2)
    _add_line(gradient1, a10, a11, everyone, cell_1, size_1, C, C2)
    _add_line(gradient2, a20, a21, everyone, cell_2, size_2, C, C2)


# --- backward: positions ---------------------------------------------------------------------------------------------
@triton.jit
def _vm_slopes(
    upstream, plane, line, xyz, k, live, size_u, size_v, size_w,
    U: tl.constexpr, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    SUM: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """d loss / d coordinates [P] along u, v and w of one mode."""
    u, fu = _along(xyz, k, live, U, size_u)
    v, fv = _along(xyz, k, live, V, size_v)
    w, fw = _along(xyz, k, live, W, size_w)
    p00, p10, p01, p11 = _read_plane(plane, u, v, size_u, size_v, C, C2)
    l0, l1 = _read_line(line, w, size_w, C, C2)
    g = _upstream(upstream, k, live, SUM, WIDTH, OFFSET, C, C2)
    to_plane = g * _between(l0, l1, fw)
    to_line = g * _bilinear(p00, p10, p01, p11, fu, fv)
    slope_u = tl.sum(to_plane * _between(p10 - p00, p11 - p01, fv), 1) * (0.5 * (size_u - 1))
    slope_v = tl.sum(to_plane * _between(p01 - p00, p11 - p10, fu), 1) * (0.5 * (size_v - 1))
    slope_w = tl.sum(to_line * (l1 - l0), 1) * (0.5 * (size_w - 1))
    return slope_u, slope_v, slope_w


@triton.jit(do_not_specialize=["n", *SIZES])
def _vm_positions(
    gradient, upstream, xyz, n, plane0, line0, plane1, line1, plane2, line2,
    size_u0, size_v0, size_w0, size_u1, size_v1, size_w1, size_u2, size_v2, size_w2,
    C_0: tl.constexpr, C_1: tl.constexpr, C_2: tl.constexpr,
    C2_0: tl.constexpr, C2_1: tl.constexpr, C2_2: tl.constexpr, SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """d loss / d xyz [K, 3]."""
    k = numbered(tl.program_id(0), P)
    live = k < n
    WIDTH: tl.constexpr = C_0 + C_1 + C_2
    x0, y0, z0 = _vm_slopes(
        upstream, plane0, line0, xyz, k, live, size_u0, size_v0, size_w0, 0, 1, 2, C_0, C2_0, SUM, WIDTH, 0
    )
    x1, z1, y1 = _vm_slopes(
        upstream, plane1, line1, xyz, k, live, size_u1, size_v1, size_w1, 0, 2, 1, C_1, C2_1, SUM, WIDTH, C_0
    )
    y2, z2, x2 = _vm_slopes(
        upstream, plane2, line2, xyz, k, live, size_u2, size_v2, size_w2, 1, 2, 0, C_2, C2_2, SUM, WIDTH, C_0 + C_1
    )
    tl.store(gradient + 3 * k, x0 + x1 + x2, mask=live)
    tl.store(gradient + 3 * k + 1, y0 + y1 + y2, mask=live)
    tl.store(gradient + 3 * k + 2, z0 + z1 + z2, mask=live)


@triton.jit(do_not_specialize=["n", "size_0", "size_1", "size_2"])
def _cp_positions(
    gradient, upstream, xyz, n, line0, line1, line2, size_0, size_1, size_2,
    C: tl.constexpr, C2: tl.constexpr, SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """d loss / d xyz [K, 3]."""
    k = numbered(tl.program_id(0), P)
    live = k < n
    w0, f0 = _along(xyz, k, live, 2, size_0)
    w1, f1 = _along(xyz, k, live, 1, size_1)
    w2, f2 = _along(xyz, k, live, 0, size_2)
    lower0, upper0 = _read_line(line0, w0, size_0, C, C2)
    lower1, upper1 = _read_line(line1, w1, size_1, C, C2)
    lower2, upper2 = _read_line(line2, w2, size_2, C, C2)
    value0, value1, value2 = _between(lower0, upper0, f0), _between(lower1, upper1, f1), _between(lower2, upper2, f2)
    g = _upstream(upstream, k, live, SUM, C, 0, C, C2)
    slope_0 = tl.sum(g * value1 * value2 * (upper0 - lower0), 1) * (0.5 * (size_0 - 1))
    slope_1 = tl.sum(g * value0 * value2 * (upper1 - lower1), 1) * (0.5 * (size_1 - 1))
    slope_2 = tl.sum(g * value0 * value1 * (upper2 - lower2), 1) * (0.5 * (size_2 - 1))
    tl.store(gradient + 3 * k, slope_2, mask=live)
    tl.store(gradient + 3 * k + 1, slope_1, mask=live)
    tl.store(gradient + 3 * k + 2, slope_0, mask=live)


# --- launching -------------------------------------------------------------------------------------------------------
class Call:
    """A field's factors as the kernels take them: [1, C, H, W], channels-last; VM: plane, line of each mode in turn;
    CP: three lines."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.factors, self.vm = factors, len(factors) == 6
        lines = factors[1::2] if self.vm else factors
        self.counts = [line.shape[1] for line in lines] if self.vm else [lines[0].shape[1]]
        self.padded = [power_of_two(count) for count in self.counts]
        self.width = sum(self.counts)
        self.sizes = [line.shape[2] for line in lines]
        if self.vm:
            pairs = zip(factors[0::2], lines, strict=True)
            self.sizes = [n for plane, line in pairs for n in (plane.shape[3], plane.shape[2], line.shape[2])]
        self.points = max(_TILE // max(self.padded), 1)

    def products(self, xyz: Tensor, summed: bool) -> Tensor:
        """[K, width], or [K] summed."""
        out = xyz.new_empty(len(xyz) if summed else (len(xyz), self.width))
        if len(xyz):
            kernel = _vm_forward if self.vm else _cp_forward
            arguments = (*self.factors, *self.sizes, *self.counts, *self.padded)
            options = {"SUM": summed, "P": self.points} | UNFUSED
            kernel[(triton.cdiv(len(xyz), self.points),)](out, xyz, len(xyz), *arguments, **options)
        return out

    def scatter(self, xyz: Tensor, upstream: Tensor, gradients: Sequence[Tensor], summed: bool) -> None:
        """Add d loss / d factors to `gradients`, from d loss / d products."""
        n = len(xyz)
        if not n:
            return
        offset = 0
        for mode, (count, padded) in enumerate(zip(self.counts, self.padded, strict=True)):
            walks = max(_GRADIENT_TILE // padded, 1)
            grid = (triton.cdiv(n, walks * _LENGTH),)
            shape = {"C": count, "C2": padded, "P": walks, "LENGTH": _LENGTH} | UNFUSED
            if self.vm:
                pair, sizes = slice(2 * mode, 2 * mode + 2), self.sizes[3 * mode : 3 * mode + 3]
                axes = dict(zip("UVW", ((0, 1, 2), (0, 2, 1), (1, 2, 0))[mode], strict=True))
                arguments = (upstream, xyz, n, *self.factors[pair], *gradients[pair], *sizes)
                _vm_gradients[grid](*arguments, **axes, **shape, SUM=summed, WIDTH=self.width, OFFSET=offset)
            else:
                _cp_gradients[grid](upstream, xyz, n, *self.factors, *gradients, *self.sizes, **shape, SUM=summed)
            offset += count

    def positions(self, xyz: Tensor, upstream: Tensor, summed: bool) -> Tensor:
        """d loss / d xyz [K, 3]."""
        gradient = torch.empty_like(xyz)
        if len(xyz):
            kernel, grid = (_vm_positions if self.vm else _cp_positions), (triton.cdiv(len(xyz), self.points),)
            arguments = (*self.factors, *self.sizes, *self.counts, *self.padded)
            kernel[grid](gradient, upstream, xyz, len(xyz), *arguments, SUM=summed, P=self.points, **UNFUSED)
        return gradient


def _zeros_like(factors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros as the factors lie in memory, filled by one launch; each begins as far on as vectors want it."""
    sizes = [-(-factor.numel() // 64) * 64 for factor in factors]
    parts = factors[0].new_zeros(sum(sizes)).split(sizes)
    return [part.as_strided(factor.shape, factor.stride()) for part, factor in zip(parts, factors, strict=True)]


class _Products(torch.autograd.Function):
    """Products of lookups, summed to [K], or times the basis [F, width] to [K, F]; see gather_lookups._Products."""

    @staticmethod
    def forward(ctx, xyz: Tensor, basis: Tensor | None, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, basis, *factors)
        call = Call(factors)
        with torch.cuda.device_of(xyz):
            if basis is None:
                return call.products(xyz, summed=True)
            size, out = max(_CHUNK_VALUES // call.width, 1), xyz.new_empty(len(xyz), len(basis))
            for points, features in zip(xyz.split(size), out.split(size), strict=True):
                torch.mm(call.products(points, summed=False), basis.T, out=features)
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        xyz, basis, *factors = ctx.saved_tensors
        gradients = _zeros_like(factors)
        call, summed = Call(factors), basis is None
        basis_grad, position_grads = None if summed else torch.zeros_like(basis), []
        grad = grad.contiguous()
        size = max(len(xyz), 1) if summed else max(_CHUNK_VALUES // call.width, 1)
        with torch.cuda.device_of(xyz):
            for points, upstream in zip(xyz.split(size), grad.split(size), strict=True):
                if not summed:
                    basis_grad.addmm_(upstream.T, call.products(points, summed=False))
                    upstream = upstream @ basis
                call.scatter(points, upstream, gradients, summed)
                if ctx.needs_input_grad[0]:
                    position_grads.append(call.positions(points, upstream, summed))
        return torch.cat(position_grads) if position_grads else None, basis_grad, *gradients


def in_order(planes: list[Tensor], lines: list[Tensor]) -> list[Tensor]:
    """Plane, line of each mode in turn, as Call takes them."""
    return [factor for pair in zip(planes, lines, strict=True) for factor in pair]


def vm_density(planes: list[Tensor], lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.vm_density."""
    if not serves(xyz, *planes, *lines):
        return gather_lookups.vm_density(planes, lines, xyz)
    return _Products.apply(xyz, None, *in_order(planes, lines))


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.vm_appearance."""
    if not serves(xyz, basis, *planes, *lines):
        return gather_lookups.vm_appearance(planes, lines, basis, xyz)
    return _Products.apply(xyz, basis, *in_order(planes, lines))


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.cp_density."""
    if not serves(xyz, *lines):
        return gather_lookups.cp_density(lines, xyz)
    return _Products.apply(xyz, None, *lines)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.cp_appearance."""
    if not serves(xyz, basis, *lines):
        return gather_lookups.cp_appearance(lines, basis, xyz)
    return _Products.apply(xyz, basis, *lines)
