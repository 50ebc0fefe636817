"""The feature network on a CPU, by network.cpp and this machine's threads.

Letters: K samples, F features, I inputs, H hidden units. Equal to models.shading.FeatureNetwork up to rounding, in
single precision. Both hidden layers are stored for the backward pass, 8*H bytes a sample: making them again would
repeat a quarter of a step's arithmetic. The inputs, more than half of what could be stored, are cheap and made again.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.kernels import threads
from models.kernels.compiled import libraries

_UNIT = 32  # network.cpp's padding
# Samples of a share: a sum of the weights' gradients each, added in the shares' order whatever the number of threads.
_SHARE = 1 << 10


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_features", "fea_pe", "view_pe", "hidden")),
        *((name, ctypes.c_void_p) for name in ("w1", "w1_transposed", "w2", "w2_transposed", "w3", "b1", "b2", "b3")),
    )


def _padded(x: Tensor, *dims: int) -> Tensor:
    """x with zeros behind the given dimensions, up to a multiple of _UNIT."""
    widths = [-x.shape[dim] % _UNIT if dim in dims else 0 for dim in range(x.dim())]
    return pad(x.detach(), [number for width in reversed(widths) for number in (0, width)]).contiguous()


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class _Call:
    """The network as the library wants it; keeps alive what it points to."""

    def __init__(self, n_features: int, pe: tuple[int, int], w1, b1, w2, b2, w3, b3) -> None:
        w1, w2 = _padded(w1, 0, 1), _padded(w2, 0, 1)
        transposed = w1.T.contiguous(), w2.T.contiguous()
        self.hidden = w1.shape[0]
        biases = _padded(b1, 0), _padded(b2, 0), b3.detach().contiguous()
        self.weights = (w1, transposed[0], w2, transposed[1], _padded(w3, 1), *biases)
        self.network = _Network(n_features, *pe, len(b1), *(x.data_ptr() for x in self.weights))
        self.gradients_like = (w1, biases[0], w2, biases[1], self.weights[4], biases[2])


def _shares(number: int) -> list[tuple[ctypes.c_int64, ctypes.c_int64]]:
    return [(ctypes.c_int64(start), ctypes.c_int64(min(start + _SHARE, number))) for start in range(0, number, _SHARE)]


class _Shaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pe: tuple[int, int], keep: bool, features: Tensor, view: Tensor, *parameters: Tensor) -> Tensor:
        features, view = features.contiguous(), view.contiguous()
        call, n = _Call(features.shape[1], pe, *parameters), len(features)
        rgb = features.new_empty(n, 3)
        hidden = [features.new_empty(n, call.hidden) if keep else None for _ in range(2)]
        given = (ctypes.byref(call.network), _at(features), _at(view))
        out = (_at(rgb), *map(_at, hidden))
        forward = libraries()["network"].network_forward
        threads.together([partial(forward, *given, *share, *out) for share in _shares(n)])
        if keep:
            ctx.save_for_backward(features, view, rgb, *hidden, *parameters)
        ctx.pe = pe
        return rgb

    @staticmethod
    def backward(ctx, grad: Tensor):
        features, view, rgb, *hidden = ctx.saved_tensors[:5]
        parameters, grad = ctx.saved_tensors[5:], grad.contiguous()
        call, shares = _Call(features.shape[1], ctx.pe, *parameters), _shares(len(features))
        to_features, to_view = (
            torch.empty_like(x) if need else None
            for x, need in zip((features, view), ctx.needs_input_grad[2:4], strict=True)
        )
        own = [x.new_zeros(len(shares), *x.shape) for x in call.gradients_like]
        given = (ctypes.byref(call.network), _at(features), _at(view))
        also = (*map(_at, (rgb, *hidden, grad, to_features, to_view)),)
        backward = libraries()["network"].network_backward
        threads.together(
            [
                partial(backward, *given, *share, *also, *(_at(gradient[number]) for gradient in own))
                for number, share in enumerate(shares)
            ]
        )
        sums = [gradient.sum(0)[tuple(map(slice, p.shape))] for gradient, p in zip(own, parameters, strict=True)]
        return None, None, to_features, to_view, *sums


def serves(module: torch.nn.Module, *inputs: Tensor) -> bool:
    """Whether `shade` can take these: float32, on the CPU, a FeatureNetwork all of whose parameters are trained."""
    parameters = list(module.parameters())
    return (
        type(module).__name__ == "FeatureNetwork"
        and module.dtype == torch.float32
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (*inputs, *parameters))
        and all(parameter.requires_grad for parameter in parameters)
        and libraries() is not None
    )


def shade(module: torch.nn.Module, features: Tensor, view: Tensor) -> Tensor:
    """rgb [K, 3] of features [K, F] seen along view [K, 3]."""
    layers = (module.mlp[0], module.mlp[2], module.mlp[4])
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return _Shaded.apply((module.fea_pe, module.view_pe), torch.is_grad_enabled(), features, view, *parameters)
