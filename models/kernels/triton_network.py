"""FeatureNetwork (models/shading.py) as Triton kernels, for CUDA (Hopper): encodings, three layers and their gradients.

Letters: K samples, B rays, F features, H hidden units, I inputs; P samples of a program's tile; F2, H2, V2 the numbers
of features, hidden units and inputs of the view, padded for matrix products; WIDTH inputs as the kernels order and pad
them; z1, z2, z3 what the layers give before their activation.

A network's activations are a hundred times larger than what goes in and comes out. Forward keeps them in registers
and stores the colours alone. Backward makes them again, a chunk of samples at a time, and stores what torch's products
of matrices need for the gradients of the first two layers' weights.

Products are taken in TF32 where torch's own may be, else in three TF32 products each, which is nearly single precision;
in bfloat16, with sums in float32, where the network asks for it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from models.kernels.triton_common import INTERPRETED, numbered, power_of_two, serves

# Samples of a tile: what one warp group multiplies at once, so that two programs share a multiprocessor; without copies
# of the weights for tiles to come, which nothing would read.
_ROWS, _LAUNCH = 64, {"num_warps": 4, "num_stages": 1}
# Samples whose activations are held at once: 140 MiB for a usual network.
_CHUNK = 1 << 16
# What registers and shared memory were seen to suffice for.
_MOST_INPUTS, _MOST_HIDDEN = 64, 128
# Columns of rgb, padded as matrix products want it.
_RGB = tl.constexpr(16)


# --- pieces of kernels -----------------------------------------------------------------------------------------------
@triton.jit
def _product(a, b, to, PRECISION: tl.constexpr):
    """to + a @ b."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), to)
    elif PRECISION == "rounded":  # the same for the interpreter, whose products know no bfloat16
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), to)
    else:
        return tl.dot(a, b, to, input_precision=PRECISION)


@triton.jit
def _places(w, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, R2: tl.constexpr, C2: tl.constexpr):
    """(where, valid) [R2, C2]: columns start .. start + C2 - 1 of a matrix of ROWS rows, WIDTH numbers apart."""
    row, column = tl.arange(0, R2), start + tl.arange(0, C2)
    return w + row[:, None] * WIDTH + column[None, :], (row < ROWS)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _block(w, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, R2: tl.constexpr, C2: tl.constexpr):
    """The numbers there, zeros behind."""
    where, valid = _places(w, start, ROWS, WIDTH, R2, C2)
    return tl.load(where, mask=valid, other=0.0)


@triton.jit
def _rows(x, k, live, WIDTH: tl.constexpr, W2: tl.constexpr):
    """[P, W2] rows k of x [K, WIDTH], zeros behind."""
    column = tl.arange(0, W2)
    valid = live[:, None] & (column < WIDTH)[None, :]
    return tl.load(x + k[:, None] * WIDTH + column[None, :], mask=valid, other=0.0)


@triton.jit
def _view_angles(view, ray, k, live, VIEW_PE: tl.constexpr, V2: tl.constexpr):
    """(angle, its frequency, where its view coordinate stands, whether it is one) [P, V2] of the view's inputs: first
    the coordinates themselves, then what is to be encoded, for the sines and once more for the cosines."""
    column = tl.arange(0, V2)
    number = (column - 3) % (3 * VIEW_PE) if VIEW_PE else column
    axis = tl.where(column < 3, column, number // VIEW_PE if VIEW_PE else column)
    power = tl.where(column < 3, 0, number % VIEW_PE if VIEW_PE else 0)
    frequency = (1 << power).to(tl.float32)
    where = 3 * tl.load(ray + k, mask=live, other=0)[:, None] + axis[None, :]
    valid = live[:, None] & (column < 3 + 6 * VIEW_PE)[None, :]
    return tl.load(view + where, mask=valid, other=0.0) * frequency[None, :], frequency, where, valid


@triton.jit
def _view_inputs(angle, frequency, VIEW_PE: tl.constexpr, V2: tl.constexpr):
    """([P, V2] the coordinates, their sines, their cosines; and how they change with a coordinate)."""
    column = tl.arange(0, V2)[None, :]
    sine, cosine = _sine_and_cosine(angle)
    first = column < 3 + 3 * VIEW_PE
    encoded, slope = tl.where(first, sine, cosine), tl.where(first, cosine, -sine) * frequency[None, :]
    return tl.where(column < 3, angle, encoded), tl.where(column < 3, 1.0, slope)


@triton.jit
def _sine_and_cosine(x):
    """Of angles up to 2^51. CUDA's own keep a table in memory for the large ones; here quarter turns are taken off in
    double precision, and Cephes' polynomials serve what is left."""
    angle = x.to(tl.float64)
    # 1.5 * 2^52 added: what is left of the mantissa is the nearest whole number.
    shifted = angle * 0.6366197723675814 + 6755399441055744.0
    r = (angle - (shifted - 6755399441055744.0) * 1.5707963267948966).to(tl.float32)
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32) & 3
    q = r * r
    sine = r + r * q * (-1.6666654611e-1 + q * (8.3321608736e-3 - q * 1.9515295891e-4))
    cosine = 1 - 0.5 * q + q * q * (4.166664568298827e-2 + q * (-1.388731625493765e-3 + q * 2.443315711809948e-5))
    turned = (quadrant & 1) == 1
    first = tl.where(turned, cosine, sine)
    second = tl.where(turned, sine, cosine)
    return tl.where(quadrant > 1, -first, first), tl.where((quadrant == 1) | (quadrant == 2), -second, second)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # which keeps NaN


@triton.jit
def _bias(b, P: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr):
    """[P, SIZE2] of a layer's bias [SIZE]."""
    number = tl.arange(0, SIZE2)
    return tl.zeros([P, SIZE2], tl.float32) + tl.load(b + number, mask=number < SIZE, other=0.0)[None, :]


@triton.jit
def _hidden_layers(
    features, view, ray, k, live, w1, b1, w2, b2,
    F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    F2: tl.constexpr, V2: tl.constexpr, H2: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both hidden layers [P, H2] of samples k."""
    x = _rows(features, k, live, F, F2)
    z = _product(x, tl.trans(_block(w1, 0, H, WIDTH, H2, F2)), _bias(b1, P, H, H2), PRECISION)
    sine, cosine = _sine_and_cosine(x)
    for power in tl.static_range(FEA_PE):
        z = _product(sine, tl.trans(_block(w1, (1 + 2 * power) * F2, H, WIDTH, H2, F2)), z, PRECISION)
        z = _product(cosine, tl.trans(_block(w1, (2 + 2 * power) * F2, H, WIDTH, H2, F2)), z, PRECISION)
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    angle, frequency, _, _ = _view_angles(view, ray, k, live, VIEW_PE, V2)
    encoded, _ = _view_inputs(angle, frequency, VIEW_PE, V2)
    z = _product(encoded, tl.trans(_block(w1, WIDTH - V2, H, WIDTH, H2, V2)), z, PRECISION)
    first = _relu(z)
    z = _product(first, tl.trans(_block(w2, 0, H, H, H2, H2)), _bias(b2, P, H, H2), PRECISION)
    return first, _relu(z)


# --- forward ---------------------------------------------------------------------------------------------------------
# count lies anywhere in a tensor: kernels are not compiled anew for its alignment.
@triton.jit(do_not_specialize=["n", "count"])
def _network_forward(
    rgb, features, view, ray, n, count, w1, b1, w2, b2, w3, b3,
    F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    F2: tl.constexpr, V2: tl.constexpr, H2: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """rgb [K, 3] of P samples; of none where the first `count` samples do not reach."""
    if COUNTED:
        n = tl.minimum(n, tl.load(count))
    k = numbered(tl.program_id(0), P)
    live = k < n
    if tl.program_id(0).to(tl.int64) * P < n:
        _, hidden = _hidden_layers(
            features, view, ray, k, live, w1, b1, w2, b2, F, FEA_PE, VIEW_PE, WIDTH, H, F2, V2, H2, P, PRECISION
        )
        z = _product(hidden, tl.trans(_block(w3, 0, 3, H, _RGB, H2)), _bias(b3, P, 3, _RGB), PRECISION)
        channel = tl.arange(0, _RGB)
        valid = live[:, None] & (channel < 3)[None, :]
        tl.store(rgb + k[:, None] * 3 + channel[None, :], 1 / (1 + tl.exp(-z)), mask=valid)


# --- backward --------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["begin", "end", "count"])
def _hidden_gradients(
    first_layer, to_z1, to_z2, to_b1, to_b2, to_w3, to_b3, upstream, rgb, features, view, ray, begin, end, count,
    w1, b1, w2, b2, w3,
    F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    F2: tl.constexpr, V2: tl.constexpr, H2: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """Writes the first hidden layer, d loss / d z1 and d loss / d z2, each [end - begin, H], of samples begin ..
    end - 1, zeros in tiles that the first `count` samples do not reach; adds d loss / d b1, b2, w3 and b3."""
    local = tl.program_id(0) * P + tl.arange(0, P)  # of a chunk: 32 bits suffice
    k = begin + local.to(tl.int64)
    unit, channel = tl.arange(0, H2), tl.arange(0, _RGB)
    row = local[:, None] * H + unit[None, :]
    inside = (k < end)[:, None] & (unit < H)[None, :]
    if COUNTED:
        end = tl.minimum(end, tl.load(count))
    live = k < end
    none = tl.zeros([P, H2], tl.float32)
    if begin + tl.program_id(0).to(tl.int64) * P < end:
        first, second = _hidden_layers(
            features, view, ray, k, live, w1, b1, w2, b2, F, FEA_PE, VIEW_PE, WIDTH, H, F2, V2, H2, P, PRECISION
        )
        colour = _rows(rgb, k, live, 3, _RGB)
        slope = _rows(upstream, k, live, 3, _RGB) * colour * (1 - colour)
        tl.atomic_add(to_b3 + channel, tl.sum(slope, 0), mask=channel < 3, sem="relaxed")
        where, valid = _places(to_w3, 0, 3, H, _RGB, H2)
        weights = _product(tl.trans(slope), second, tl.zeros([_RGB, H2], tl.float32), PRECISION)
        tl.atomic_add(where, weights, mask=valid, sem="relaxed")
        slope = tl.where(second > 0, _product(slope, _block(w3, 0, 3, H, _RGB, H2), none, PRECISION), 0.0)
        tl.store(to_z2 + row, slope, mask=inside)
        tl.atomic_add(to_b2 + unit, tl.sum(slope, 0), mask=unit < H, sem="relaxed")
        slope = tl.where(first > 0, _product(slope, _block(w2, 0, H, H, H2, H2), none, PRECISION), 0.0)
        tl.store(first_layer + row, first, mask=inside)
        tl.store(to_z1 + row, slope, mask=inside)
        tl.atomic_add(to_b1 + unit, tl.sum(slope, 0), mask=unit < H, sem="relaxed")
    else:
        tl.store(to_z2 + row, none, mask=inside)
        tl.store(first_layer + row, none, mask=inside)
        tl.store(to_z1 + row, none, mask=inside)


@triton.jit(do_not_specialize=["begin", "end", "count"])
def _input_gradients(
    to_features, to_view, inputs, to_z1, features, view, ray, begin, end, count, w1,
    F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    F2: tl.constexpr, V2: tl.constexpr, H2: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    COUNTED: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Writes the network's inputs [end - begin, WIDTH] and, from d loss / d z1, d loss / d features, zeros as above;
    adds d loss / d view if VIEW."""
    local = tl.program_id(0) * P + tl.arange(0, P)  # of a chunk: 32 bits suffice
    k = begin + local.to(tl.int64)
    inside = (k < end)[:, None]
    if COUNTED:
        end = tl.minimum(end, tl.load(count))
    live = k < end
    feature = tl.arange(0, F2)[None, :]
    row = inputs + local[:, None] * WIDTH
    row_x, row_v = row + feature, row + (WIDTH - V2) + tl.arange(0, V2)[None, :]
    own = to_features + k[:, None] * F + feature
    none = tl.zeros([P, F2], tl.float32)
    if begin + tl.program_id(0).to(tl.int64) * P < end:
        slope = _rows(to_z1, local, live, H, H2)
        x = _rows(features, k, live, F, F2)
        tl.store(row_x, x, mask=inside)
        to_x = _product(slope, _block(w1, 0, H, WIDTH, H2, F2), none, PRECISION)
        sine, cosine = _sine_and_cosine(x)
        factor = 1.0
        for power in tl.static_range(FEA_PE):
            start = (1 + 2 * power) * F2
            tl.store(row_x + start, sine, mask=inside)
            to_x += factor * _product(slope, _block(w1, start, H, WIDTH, H2, F2), none, PRECISION) * cosine
            start = (2 + 2 * power) * F2
            tl.store(row_x + start, cosine, mask=inside)
            to_x -= factor * _product(slope, _block(w1, start, H, WIDTH, H2, F2), none, PRECISION) * sine
            sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
            factor *= 2.0
        tl.store(own, to_x, mask=inside & (feature < F))
        angle, frequency, coordinate, valid = _view_angles(view, ray, k, live, VIEW_PE, V2)
        encoded, turned = _view_inputs(angle, frequency, VIEW_PE, V2)
        tl.store(row_v, encoded, mask=inside)
        if VIEW:
            none_v = tl.zeros([P, V2], tl.float32)
            to_inputs = _product(slope, _block(w1, WIDTH - V2, H, WIDTH, H2, V2), none_v, PRECISION)
            tl.atomic_add(to_view + coordinate, to_inputs * turned, mask=valid, sem="relaxed")
    else:
        tl.store(own, none, mask=inside & (feature < F))
        for block in tl.static_range(1 + 2 * FEA_PE):
            tl.store(row_x + block * F2, none, mask=inside)
        tl.store(row_v, tl.zeros([P, V2], tl.float32), mask=inside)


# --- launching -------------------------------------------------------------------------------------------------------
def _padded(number: int) -> int:
    """As matrix products want their sizes."""
    return max(power_of_two(number), 16)


@functools.cache
def _columns(n_features: int, fea_pe: int, view_pe: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the kernels' inputs stand among FeatureNetwork's [I], its number of inputs for those it does not have, and
    the other way round: each of FeatureNetwork's inputs among the kernels' [WIDTH].

    The kernels' are blocks of F2: features, sines and cosines of each frequency in turn; and V2 of the view.
    """
    first, n_theirs = n_features + 3, n_features * (1 + 2 * fea_pe) + 3 * (1 + 2 * view_pe)
    blocks = [list(range(n_features))]
    for power in range(fea_pe):
        for start in (first, first + n_features * fea_pe):
            blocks.append([start + feature * fea_pe + power for feature in range(n_features)])
    view = [*range(n_features, first), *range(first + 2 * n_features * fea_pe, n_theirs)]
    columns = [c for block in blocks for c in (*block, *[n_theirs] * (_padded(n_features) - n_features))]
    theirs = torch.tensor([*columns, *view, *[n_theirs] * (_padded(len(view)) - len(view))])
    return theirs.to(device), torch.argsort(theirs, stable=True)[:n_theirs].to(device)


def _options(features: Tensor, hidden: int, fea_pe: int, view_pe: int, dtype: torch.dtype) -> dict:
    """What all kernels are compiled for."""
    n_features, n_view = features.shape[1], 3 + 6 * view_pe
    padded = {"F2": _padded(n_features), "V2": _padded(n_view), "H2": _padded(hidden)}
    width = padded["F2"] * (1 + 2 * fea_pe) + padded["V2"]
    sizes = {"F": n_features, "FEA_PE": fea_pe, "VIEW_PE": view_pe, "WIDTH": width, "H": hidden}
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    if dtype == torch.bfloat16:
        precision = "rounded" if INTERPRETED else "bf16"
    return sizes | padded | {"PRECISION": precision} | _LAUNCH


class _Network(torch.autograd.Function):
    """rgb [K, 3] of features [K, F] and view[ray]."""

    @staticmethod
    def forward(ctx, kind: tuple, count: Tensor | None, features: Tensor, view: Tensor, ray: Tensor, *layers: Tensor):
        features, view, ray = features.contiguous(), view.contiguous(), ray.contiguous()
        w1, *others = layers
        n, others = len(features), [x.contiguous() for x in others]
        ctx.options = _options(features, len(w1), *kind) | {"COUNTED": count is not None}
        theirs, ctx.ours = _columns(features.shape[1], *kind[:2], features.device)
        layers = (pad(w1, (0, 1)).index_select(1, theirs), *others)
        # What is nobody's is not written, and black.
        rgb = features.new_empty(n, 3) if count is None else features.new_zeros(n, 3)
        if n:
            given = (features, view, ray, n, ray if count is None else count)
            with torch.cuda.device_of(features):
                _network_forward[(triton.cdiv(n, _ROWS),)](rgb, *given, *layers, **ctx.options, P=_ROWS)
        ctx.save_for_backward(count, features, view, ray, rgb, *layers)
        return rgb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        count, features, view, ray, rgb, *layers = ctx.saved_tensors
        w1, b1, w2, b2, w3, _ = layers
        n, hidden, grad = len(features), len(w1), grad.contiguous()
        to_features, to_view = torch.empty_like(features), torch.zeros_like(view) if ctx.needs_input_grad[3] else None
        to_w1, to_b1, to_w2, to_b2, to_w3, to_b3 = (torch.zeros_like(x) for x in layers)
        if count is None:
            count = ray  # a pointer that is not read
        chunk = min(n, _CHUNK)
        inputs, *activations = (features.new_empty(chunk, width) for width in (w1.shape[1], hidden, hidden, hidden))
        for begin in range(0, n, _CHUNK):
            end = min(begin + _CHUNK, n)
            first, to_z1, to_z2 = (x[: end - begin] for x in activations)
            given = (features, view, ray, begin, end, count)
            with torch.cuda.device_of(features):
                outputs = (first, to_z1, to_z2, to_b1, to_b2, to_w3, to_b3)
                grid = (triton.cdiv(end - begin, _ROWS),)
                arguments = (*outputs, grad, rgb, *given, w1, b1, w2, b2, w3)
                _hidden_gradients[grid](*arguments, **ctx.options, P=_ROWS)
                outputs = (to_features, view if to_view is None else to_view, inputs)
                own = {"P": _ROWS, "VIEW": to_view is not None}
                _input_gradients[grid](*outputs, to_z1, *given, w1, **ctx.options, **own)
            to_w1.addmm_(to_z1.T, inputs[: end - begin])
            to_w2.addmm_(to_z2.T, first)
        to_w1 = to_w1.index_select(1, ctx.ours)
        return None, None, to_features, to_view, None, to_w1, to_b1, to_w2, to_b2, to_w3, to_b3


@functools.cache
def suits(device: torch.device) -> bool:
    """Whether the tiles above are for this GPU: Hopper's matrix units. On others registers would not suffice."""
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] == 9


def takes(module: torch.nn.Module, features: Tensor, view: Tensor) -> bool:
    """Whether `colours` can take these: float32 on a GPU that they suit, a FeatureNetwork that is not too wide."""
    if type(module).__name__ != "FeatureNetwork" or not serves(features, view, *module.parameters()):
        return False
    if not suits(features.device):
        return False
    inputs = (features.shape[1], 3 + 6 * module.view_pe)
    return max(inputs) <= _MOST_INPUTS and module.mlp[0].out_features <= _MOST_HIDDEN


def colours(module: torch.nn.Module, features: Tensor, view: Tensor, ray: Tensor, count: Tensor | None) -> Tensor:
    """rgb [K, 3] of features [K, F], seen along the directions view[ray], view [B, 3], ray [K] int64.

    count: None, or 0-dim int64: samples from this one on are nobody's and become black.
    """
    layers = [x for number in (0, 2, 4) for x in (module.mlp[number].weight, module.mlp[number].bias)]
    return _Network.apply((module.fea_pe, module.view_pe, module.dtype), count, features, view, ray, *layers)
