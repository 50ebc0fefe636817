"""The L1 norm of factors on a CPU, by l1.cpp and this machine's threads; see components.regularisers.l1_norm.

torch's norm of a factor takes one thread, and so do its signs and their product in the backward pass.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from components import regularisers
from models.kernels import threads
from models.kernels.compiled import libraries
from models.kernels.compiled_adam import serves


class _Array(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "gradient")),
        ("n", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class _MeanAbsolutes(torch.autograd.Function):
    """Sum over factors of their mean absolute values, a scalar."""

    @staticmethod
    def forward(ctx, *factors: Tensor) -> Tensor:
        arrays = (_Array * len(factors))(*((factor.data_ptr(), None, factor.numel(), 0) for factor in factors))
        sums = (ctypes.c_double * len(factors))()
        libraries()["l1"].l1_forward(arrays, ctypes.c_int64(len(factors)), sums, threads.count())
        ctx.save_for_backward(*factors)
        ctx.arrays = arrays
        return factors[0].new_tensor(sum(total / factor.numel() for total, factor in zip(sums, factors, strict=True)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        upstream, gradients = grad.item(), [torch.empty_like(factor) for factor in ctx.saved_tensors]
        for array, gradient in zip(ctx.arrays, gradients, strict=True):
            array.gradient, array.scale = gradient.data_ptr(), upstream / array.n
        libraries()["l1"].l1_backward(ctx.arrays, ctypes.c_int64(len(ctx.arrays)), threads.count())
        return tuple(gradients)


def l1_norm(planes: list[Tensor], lines: list[Tensor]) -> Tensor:
    """See components.regularisers.l1_norm."""
    factors = [*planes, *lines]
    return _MeanAbsolutes.apply(*factors) if serves(factors) else regularisers.l1_norm(planes, lines)
