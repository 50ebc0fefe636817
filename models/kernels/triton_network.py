"""FeatureNetwork (models/shading.py) as Triton kernels, for CUDA (Hopper): encodings, three layers and their gradients.

Letters: K samples, B rays, F features, H hidden units, WIDTH inputs of the network; P samples of a program's tile; F2,
H2, V2 the numbers of features, hidden units and inputs of the view, padded for matrix products; z1, z2, z3 what the
layers give before their activation.

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

from models.kernels.triton_common import INTERPRETED, numbered, power_of_two, serves

# Samples of a tile, as the registers allow; without copies of the weights for tiles to come, which nothing would read.
_ROWS, _HIDDEN_ROWS, _INPUT_ROWS, _LAUNCH = 128, 64, 128, {"num_warps": 8, "num_stages": 1}
# Samples whose activations are held at once: 134 MiB for a usual network.
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
def _matrix(w, row, column, valid_row, valid_column, WIDTH: tl.constexpr):
    """(where, valid): the numbers of a matrix' entries at rows x columns, whose rows are WIDTH long."""
    return w + row[:, None] * WIDTH + column[None, :], valid_row[:, None] & valid_column[None, :]


@triton.jit
def _block(w, start, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, C2: tl.constexpr):  # fmt: skip # noqa: E501
    """(where, valid) [H2, C2] of COLUMNS columns of a layer's weights [H, WIDTH], from `start` on, every STRIDE."""
    row, column = tl.arange(0, H2), tl.arange(0, C2)
    return _matrix(w, row, start + STRIDE * column, row < H, column < COLUMNS, WIDTH)


@triton.jit
def _view_block(w1, F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, V2: tl.constexpr):  # fmt: skip # noqa: E501
    """(where, valid) [H2, V2] of the view's and its encoding's columns of w1."""
    row, column = tl.arange(0, H2), tl.arange(0, V2)
    place = tl.where(column < 3, F + column, F + 2 * F * FEA_PE + column)
    return _matrix(w1, row, place, row < H, column < 3 + 6 * VIEW_PE, WIDTH)


@triton.jit
def _read(where, valid):
    return tl.load(where, mask=valid, other=0.0)


@triton.jit
def _rows(x, k, live, WIDTH: tl.constexpr, W2: tl.constexpr):
    """[P, W2] rows k of x [K, WIDTH], zeros behind."""
    column = tl.arange(0, W2)
    return _read(x + k[:, None] * WIDTH + column[None, :], live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _view_angles(view, ray, k, live, VIEW_PE: tl.constexpr, V2: tl.constexpr):
    """(angle, its frequency, where its view coordinate stands, whether it is one) [P, V2] of the view's inputs: first
    the coordinates themselves, then what is to be encoded, for the sines and once more for the cosines."""
    column = tl.arange(0, V2)
    number = (column - 3) % (3 * VIEW_PE) if VIEW_PE else column
    axis = tl.where(column < 3, column, number // VIEW_PE if VIEW_PE else column)
    power = tl.where(column < 3, 0, number % VIEW_PE if VIEW_PE else column)
    frequency = tl.exp2(power.to(tl.float32))
    where = 3 * tl.load(ray + k, mask=live, other=0)[:, None] + axis[None, :]
    valid = live[:, None] & (column < 3 + 6 * VIEW_PE)[None, :]
    return _read(view + where, valid) * frequency[None, :], frequency, where, valid


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
    """Of angles of any size. CUDA's own keep a table in memory for the large ones; here a quarter turn is taken off in
    double precision, and Cephes' polynomials serve what is left."""
    angle = x.to(tl.float64)
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle - quarters * 1.5707963267948966).to(tl.float32)
    quadrant = (quarters - 4 * tl.floor(quarters * 0.25)).to(tl.int32)
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
def _bias(b, SIZE: tl.constexpr, SIZE2: tl.constexpr):
    """[1, SIZE2] of a layer's bias [SIZE]."""
    number = tl.arange(0, SIZE2)
    return tl.load(b + number, mask=number < SIZE, other=0.0)[None, :]


@triton.jit
def _hidden_layers(
    features, view, ray, k, live, w1, b1, w2, b2,
    F: tl.constexpr, FEA_PE: tl.constexpr, VIEW_PE: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    F2: tl.constexpr, V2: tl.constexpr, H2: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both hidden layers [P, H2] of samples k."""
    x = _rows(features, k, live, F, F2)
    where, valid = _block(w1, 0, 1, F, WIDTH, H, H2, F2)
    z = _product(x, tl.trans(_read(where, valid)), tl.zeros([P, H2], tl.float32) + _bias(b1, H, H2), PRECISION)
    sine, cosine = _sine_and_cosine(x)
    for power in tl.static_range(FEA_PE):
        where, valid = _block(w1, F + 3 + power, FEA_PE, F, WIDTH, H, H2, F2)
        z = _product(sine, tl.trans(_read(where, valid)), z, PRECISION)
        where, valid = _block(w1, F + 3 + F * FEA_PE + power, FEA_PE, F, WIDTH, H, H2, F2)
        z = _product(cosine, tl.trans(_read(where, valid)), z, PRECISION)
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    angle, frequency, _, _ = _view_angles(view, ray, k, live, VIEW_PE, V2)
    encoded, _ = _view_inputs(angle, frequency, VIEW_PE, V2)
    where, valid = _view_block(w1, F, FEA_PE, VIEW_PE, WIDTH, H, H2, V2)
    z = _product(encoded, tl.trans(_read(where, valid)), z, PRECISION)
    first = _relu(z)
    where, valid = _block(w2, 0, 1, H, H, H, H2, H2)
    z = _product(first, tl.trans(_read(where, valid)), tl.zeros([P, H2], tl.float32) + _bias(b2, H, H2), PRECISION)
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
        where, valid = _block(w3, 0, 1, H, H, 3, _RGB, H2)
        z = tl.zeros([P, _RGB], tl.float32) + _bias(b3, 3, _RGB)
        z = _product(hidden, tl.trans(_read(where, valid)), z, PRECISION)
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
        where, valid = _block(to_w3, 0, 1, H, H, 3, _RGB, H2)
        weights = _product(tl.trans(slope), second, tl.zeros([_RGB, H2], tl.float32), PRECISION)
        tl.atomic_add(where, weights, mask=valid, sem="relaxed")
        where, valid = _block(w3, 0, 1, H, H, 3, _RGB, H2)
        slope = tl.where(second > 0, _product(slope, _read(where, valid), none, PRECISION), 0.0)
        tl.store(to_z2 + row, slope, mask=inside)
        tl.atomic_add(to_b2 + unit, tl.sum(slope, 0), mask=unit < H, sem="relaxed")
        where, valid = _block(w2, 0, 1, H, H, H, H2, H2)
        slope = tl.where(first > 0, _product(slope, _read(where, valid), none, PRECISION), 0.0)
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
    inside = k < end
    if COUNTED:
        end = tl.minimum(end, tl.load(count))
    live = k < end
    feature, column = tl.arange(0, F2), tl.arange(0, V2)
    row = inputs + local[:, None] * WIDTH
    inside_x = inside[:, None] & (feature < F)[None, :]
    inside_v = inside[:, None] & (column < 3 + 6 * VIEW_PE)[None, :]
    place = tl.where(column < 3, F + column, F + 2 * F * FEA_PE + column)
    own = to_features + k[:, None] * F + feature[None, :]
    none = tl.zeros([P, F2], tl.float32)
    if begin + tl.program_id(0).to(tl.int64) * P < end:
        slope = _rows(to_z1, local, live, H, H2)
        x = _rows(features, k, live, F, F2)
        tl.store(row + feature[None, :], x, mask=inside_x)
        where, valid = _block(w1, 0, 1, F, WIDTH, H, H2, F2)
        to_x = _product(slope, _read(where, valid), none, PRECISION)
        sine, cosine = _sine_and_cosine(x)
        factor = 1.0
        for power in tl.static_range(FEA_PE):
            start = F + 3 + power
            tl.store(row + start + FEA_PE * feature[None, :], sine, mask=inside_x)
            where, valid = _block(w1, start, FEA_PE, F, WIDTH, H, H2, F2)
            to_x += factor * _product(slope, _read(where, valid), none, PRECISION) * cosine
            start = F + 3 + F * FEA_PE + power
            tl.store(row + start + FEA_PE * feature[None, :], cosine, mask=inside_x)
            where, valid = _block(w1, start, FEA_PE, F, WIDTH, H, H2, F2)
            to_x -= factor * _product(slope, _read(where, valid), none, PRECISION) * sine
            sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
            factor *= 2.0
        tl.store(own, to_x, mask=inside_x)
        angle, frequency, coordinate, valid_v = _view_angles(view, ray, k, live, VIEW_PE, V2)
        encoded, slope_v = _view_inputs(angle, frequency, VIEW_PE, V2)
        tl.store(row + place[None, :], encoded, mask=inside_v)
        if VIEW:
            where, valid = _view_block(w1, F, FEA_PE, VIEW_PE, WIDTH, H, H2, V2)
            to_inputs = _product(slope, _read(where, valid), tl.zeros([P, V2], tl.float32), PRECISION)
            tl.atomic_add(to_view + coordinate, to_inputs * slope_v, mask=valid_v, sem="relaxed")
    else:
        tl.store(own, none, mask=inside_x)
        tl.store(row + feature[None, :], none, mask=inside_x)
        for block in tl.static_range(2 * FEA_PE):
            tl.store(row + F + 3 + block * F + feature[None, :], none, mask=inside_x)
        tl.store(row + place[None, :], tl.zeros([P, V2], tl.float32), mask=inside_v)


# --- launching -------------------------------------------------------------------------------------------------------
def _padded(number: int) -> int:
    """As matrix products want their sizes."""
    return max(power_of_two(number), 16)


def _options(features: Tensor, w1: Tensor, fea_pe: int, view_pe: int, dtype: torch.dtype) -> dict:
    """What all kernels are compiled for."""
    sizes = {"F": features.shape[1], "FEA_PE": fea_pe, "VIEW_PE": view_pe, "WIDTH": w1.shape[1], "H": w1.shape[0]}
    padded = {"F2": _padded(sizes["F"]), "V2": _padded(3 + 6 * view_pe), "H2": _padded(sizes["H"])}
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    if dtype == torch.bfloat16:
        precision = "rounded" if INTERPRETED else "bf16"
    return sizes | padded | {"PRECISION": precision} | _LAUNCH


class _Network(torch.autograd.Function):
    """rgb [K, 3] of features [K, F] and view[ray]."""

    @staticmethod
    def forward(ctx, kind: tuple, count: Tensor | None, features: Tensor, view: Tensor, ray: Tensor, *layers: Tensor):
        features, view, ray = features.contiguous(), view.contiguous(), ray.contiguous()
        layers, n = [x.contiguous() for x in layers], len(features)
        ctx.options = _options(features, layers[0], *kind) | {"COUNTED": count is not None}
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
        for begin in range(0, n, _CHUNK):
            end = min(begin + _CHUNK, n)
            inputs = features.new_empty(end - begin, w1.shape[1])
            first, to_z1, to_z2 = (features.new_empty(end - begin, hidden) for _ in range(3))
            given = (features, view, ray, begin, end, count)
            with torch.cuda.device_of(features):
                outputs = (first, to_z1, to_z2, to_b1, to_b2, to_w3, to_b3)
                grid = (triton.cdiv(end - begin, _HIDDEN_ROWS),)
                arguments = (*outputs, grad, rgb, *given, w1, b1, w2, b2, w3)
                _hidden_gradients[grid](*arguments, **ctx.options, P=_HIDDEN_ROWS)
                outputs = (to_features, view if to_view is None else to_view, inputs)
                grid = (triton.cdiv(end - begin, _INPUT_ROWS),)
                own = {"P": _INPUT_ROWS, "VIEW": to_view is not None}
                _input_gradients[grid](*outputs, to_z1, *given, w1, **ctx.options, **own)
            to_w1.addmm_(to_z1.T, inputs)
            to_w2.addmm_(to_z2.T, first)
        return None, None, to_features, to_view, None, to_w1, to_b1, to_w2, to_b2, to_w3, to_b3


@functools.cache
def known(device: torch.device) -> bool:
    """Whether the tiles above suit a GPU: Hopper's matrix units. On others registers would not suffice."""
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] == 9


def takes(module: torch.nn.Module, features: Tensor, view: Tensor) -> bool:
    """Whether `colours` can take these: float32 on a GPU that is known, a FeatureNetwork that is not too wide."""
    if type(module).__name__ != "FeatureNetwork" or not serves(features, view, *module.parameters()):
        return False
    if not known(features.device):
        return False
    inputs = (features.shape[1], 3 + 6 * module.view_pe)
    return max(inputs) <= _MOST_INPUTS and module.mlp[0].out_features <= _MOST_HIDDEN


def colours(module: torch.nn.Module, features: Tensor, view: Tensor, ray: Tensor, count: Tensor | None) -> Tensor:
    """rgb [K, 3] of features [K, F], seen along the directions view[ray], view [B, 3], ray [K] int64.

    count: None, or 0-dim int64: samples from this one on are nobody's and become black.
    """
    layers = [x for number in (0, 2, 4) for x in (module.mlp[number].weight, module.mlp[number].bias)]
    return _Network.apply((module.fea_pe, module.view_pe, module.dtype), count, features, view, ray, *layers)
