"""The L1 norm of factors in a few launches for all of them together; see components.regularisers.l1_norm.

One by one they are some twenty launches forward and as many backward, which on CUDA cost more than the work.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MeanAbsolutes(torch.autograd.Function):
    """Sum over factors of their mean absolute values, a scalar."""

    @staticmethod
    def forward(ctx, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        norms = torch._foreach_norm(factors, 1)
        return torch.stack(torch._foreach_div(norms, _counts(factors))).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gradients = torch._foreach_sign(ctx.saved_tensors)
        torch._foreach_div_(gradients, _counts(gradients))
        torch._foreach_mul_(gradients, grad)
        return tuple(gradients)


def _counts(factors: tuple[Tensor, ...] | list[Tensor]) -> list[float]:
    return [float(factor.numel()) for factor in factors]


def l1_norm(planes: list[Tensor], lines: list[Tensor]) -> Tensor:
    """See components.regularisers.l1_norm."""
    return _MeanAbsolutes.apply(*planes, *lines)
