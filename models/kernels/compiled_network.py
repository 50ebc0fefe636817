"""Colours of samples on a CPU, by network.cpp and this machine's threads: lookups, basis, network in one.

Letters: K samples, B rays, F features, P products, H hidden units; X, I inputs before and after encoding. Equal to
appearance_feature followed by models.shading.FeatureNetwork up to rounding, in single precision. Inputs and both hidden
layers are stored for the backward pass, 8*H + 128 bytes a sample for a usual network: making them again would repeat a
quarter of a step's arithmetic. That is done for what exceeds _KEPT samples, which the first steps have, before there is
an alpha mask. Products and encodings, several times as much, are cheap and always made again.
"""

import ctypes
import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from models.kernels import threads
from models.kernels.compiled import libraries
from models.kernels.compiled_lookups import CP_AXES, Factors, vm_order

_TILE = 64  # samples that network.cpp takes at once
# Samples whose d loss / d products is held at once, 4*P bytes each, which should fit into a cache; parts of them whose
# gradients of the weights are summed apart.
_BLOCK, _SHARES = 1 << 13, 16
_KEPT = 48 << 10  # samples whose hidden layers are stored, 54 MB


class _Colours(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("features", "frequencies", "products", "inputs", "hidden")),
        *((name, ctypes.c_void_p) for name in ("basis", "basis_transposed", "w1", "w1_transposed", "w2")),
        *((name, ctypes.c_void_p) for name in ("w2_transposed", "w3", "b1", "b2", "b3", "xyz", "view", "ray")),
        ("groups", ctypes.c_void_p),
        ("n_groups", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
    )


@functools.cache
def _unit() -> int:
    """network.cpp's padding."""
    return ctypes.c_int64.in_dll(libraries()["network"], "padding").value


def _up(number: int) -> int:
    """The next multiple of the padding."""
    return -(-number // _unit()) * _unit()


def _padded(x: Tensor, *dims: int) -> Tensor:
    """x with zeros behind the given dimensions, up to a multiple of the padding."""
    widths = [_up(x.shape[dim]) - x.shape[dim] if dim in dims else 0 for dim in range(x.dim())]
    if any(widths):
        x = pad(x, [number for width in reversed(widths) for number in (0, width)])
    return x.contiguous()


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _columns(n_features: int, fea_pe: int, view_pe: int) -> tuple[Tensor, Tensor]:
    """Where network.cpp's inputs stand among FeatureNetwork's [I], its number of inputs for those it does not have, and
    the other way round: each of FeatureNetwork's inputs among network.cpp's."""
    inputs, columns = _up(n_features + 3), []
    sine = {"features": n_features + 3, "view": n_features + 3 + 2 * n_features * fea_pe}
    n_theirs = n_features * (1 + 2 * fea_pe) + 3 * (1 + 2 * view_pe)
    for block in range(1 + 2 * max(fea_pe, view_pe)):
        frequency, is_cosine = (block - 1) // 2, block % 2 == 0
        for i in range(inputs):
            kind, own, count, pe = ("features", i, n_features, fea_pe)
            if i >= n_features:
                kind, own, count, pe = ("view", i - n_features, 3, view_pe)
            if own >= count or (block and frequency >= pe):
                columns.append(n_theirs)
            elif block == 0:
                columns.append(i)
            else:
                columns.append(sine[kind] + is_cosine * count * pe + own * pe + frequency)
    theirs = torch.tensor(columns)
    return theirs, torch.argsort(theirs, stable=True)[:n_theirs]


class _Call:
    """The network as the library wants it; keeps alive what it points to."""

    def __init__(self, pe: tuple[int, int], axes, position, view, ray, basis, w1, b1, w2, b2, w3, b3, *factors) -> None:
        self.factors = Factors(axes, factors)
        self.theirs, self.ours = _columns(len(basis), *pe)
        basis = pad(_padded(basis, 1), (0, 0, 0, _up(len(basis) + 3) - len(basis)))
        w1, w2 = _padded(pad(w1, (0, 1)).index_select(1, self.theirs), 0), _padded(w2, 0, 1)
        self.inputs, self.products, self.hidden = len(basis), basis.shape[1], len(w1)
        weights = (basis, basis.T.contiguous(), w1, w1.T.contiguous(), w2, w2.T.contiguous(), _padded(w3, 1))
        self.alive = (*weights, _padded(b1, 0), _padded(b2, 0), b3.detach().contiguous(), position, view, ray, factors)
        sizes = (self.theirs.numel() // self.inputs // 2, self.products, self.inputs, self.hidden)
        self.struct = _Colours(
            *(self.n_features(pe), *sizes),
            *(x.data_ptr() for x in self.alive[:-1]),
            *(ctypes.addressof(self.factors.groups), len(self.factors.groups), self.factors.grid),
        )
        rows = ((self.products, self.inputs), w1.shape, (self.hidden,), w2.shape, (self.hidden,), (3, self.hidden))
        self.gradient_shapes = (*rows, (_unit(),))

    def n_features(self, pe: tuple[int, int]) -> int:
        """F."""
        return (len(self.ours) - 3 * (1 + 2 * pe[1])) // (1 + 2 * pe[0])

    def gradients(self, sums: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        """Of basis, w1, b1, w2, b2, w3, b3, from what the library has summed up."""
        parts = sums.split([math.prod(shape) for shape in self.gradient_shapes])
        basis, w1, *others = (x.view(shape) for x, shape in zip(parts, self.gradient_shapes, strict=True))
        return [
            x[tuple(map(slice, p.shape))]
            for x, p in zip((basis.T, w1.index_select(1, self.ours), *others), parameters, strict=True)
        ]


class _Shaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pe, axes, keep: bool, position: Tensor, view: Tensor, ray: Tensor, *tensors: Tensor) -> Tensor:
        position, view, ray = position.contiguous(), view.contiguous(), ray.contiguous()
        parameters = tensors[:7]
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in tensors[7:]]
        call, n = _Call(pe, axes, position, view, ray, *parameters, *factors), len(position)
        rgb = position.new_empty(n, 3)
        n_kept = min(-(-n // _TILE) * _TILE, _KEPT) if keep else 0
        kept = [position.new_empty(n_kept, width) for width in (call.inputs, call.hidden, call.hidden)]
        sizes = map(ctypes.c_int64, (n, n_kept))
        libraries()["network"].colours_forward(
            ctypes.byref(call.struct), *sizes, *map(_at, (rgb, *kept)), threads.count()
        )
        if keep:
            ctx.save_for_backward(position, view, ray, rgb, *kept, *parameters, *factors)
            ctx.call = call  # its copies serve the backward pass too
        return rgb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        position, view, ray, rgb, *kept = ctx.saved_tensors[:7]
        parameters, factors, grad = ctx.saved_tensors[7:14], ctx.saved_tensors[14:], grad.contiguous()
        call, n = ctx.call, len(position)
        gradients = [torch.empty_like(factor, memory_format=torch.channels_last) for factor in factors]
        call.factors.into(gradients)
        to_position, to_view = (
            x.new_empty(n, 3) if need else None
            for x, need in zip((position, view), ctx.needs_input_grad[3:5], strict=True)
        )
        own = position.new_empty(_SHARES, sum(map(math.prod, call.gradient_shapes)))
        blocks = max(-(-n // _BLOCK), 1)
        for first, end in ((n * block // blocks, n * (block + 1) // blocks) for block in range(blocks)):
            to_products = position.new_empty(end - first, call.products)
            libraries()["network"].colours_backward(
                *(ctypes.byref(call.struct), *map(ctypes.c_int64, (first, end, len(kept[0])))),
                *map(_at, (rgb, *kept, grad, to_products, to_view, own)),
                *(ctypes.c_int64(_SHARES), threads.count()),
            )
            call.factors.scatter(position[first:end], to_products, fresh=first == 0)
            if to_position is not None:
                to_position[first:end] = call.factors.positions(position[first:end], to_products)
        sums = torch.empty_like(own[0])
        sizes = (ctypes.c_int64(_SHARES), ctypes.c_int64(len(sums)))
        libraries()["network"].sum_shares(_at(own), *sizes, _at(sums), threads.count())
        if to_view is not None:
            to_view = torch.zeros_like(view).index_add_(0, ray, to_view)
        return None, None, None, to_position, to_view, None, *call.gradients(sums, parameters), *gradients


def serves(module: torch.nn.Module, *inputs: Tensor) -> bool:
    """Whether `colours` can take these: float32, on the CPU, a FeatureNetwork all of whose parameters are trained."""
    parameters = list(module.parameters())
    return (
        type(module).__name__ == "FeatureNetwork"
        and module.dtype == torch.float32
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (*inputs, *parameters))
        and all(parameter.requires_grad for parameter in parameters)
        and libraries() is not None
    )


def colours(
    module: torch.nn.Module,
    planes: list[Tensor],
    lines: list[Tensor],
    basis: Tensor,
    position: Tensor,
    view: Tensor,
    ray: Tensor,
) -> Tensor:
    """rgb [K, 3] at normalised positions [K, 3], seen along the directions view[ray], view [B, 3], ray [K] int64.

    planes, lines: the appearance's factors (no planes for CP); basis [F, P].
    """
    axes, factors = vm_order(planes, lines) if planes else (CP_AXES, lines)
    layers = (module.mlp[0], module.mlp[2], module.mlp[4])
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    pe = (module.fea_pe, module.view_pe)
    return _Shaded.apply(pe, axes, torch.is_grad_enabled(), position, view, ray, basis, *parameters, *factors)
