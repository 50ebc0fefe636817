"""A linear layer in bfloat16 on a CPU: values rounded to bfloat16, their products summed in float32.

That is what a matrix unit computes. Most CPUs have none, and torch's own bfloat16 products take them ten times as long
as float32's, most of it for conversions.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def _rounded(x: Tensor) -> Tensor:
    """float32 values that bfloat16 holds."""
    return x.bfloat16().float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight = _rounded(x), _rounded(weight)
        ctx.save_for_backward(x, weight)
        return _rounded(linear(x, weight, _rounded(bias)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, weight), grad = ctx.saved_tensors, _rounded(grad)
        return _rounded(grad @ weight), _rounded(grad.T @ x), _rounded(grad.sum(0))


def rounded_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """[K, O] of linear layers and other modules in a row, from x [K, I] float32; as torch.autocast's up to the order of
    sums."""
    for module in mlp:
        x = _Linear.apply(x, module.weight, module.bias) if isinstance(module, nn.Linear) else module(x)
    return x
