"""A module over many samples, a chunk at a time, without keeping what it computes on the way."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.kernels import threads


class _Chunks(torch.autograd.Function):
    """module(*inputs), computed again in backward."""

    @staticmethod
    def forward(ctx, module: nn.Module, size: int, n_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.module, ctx.size, ctx.n_inputs = module, size, n_inputs
        inputs = tensors[:n_inputs]
        starts = range(0, max(len(inputs[0]), 1), size)
        out: list[Tensor] = [inputs[0]] * len(starts)

        def run(number: int, start: int) -> None:
            with torch.no_grad():
                out[number] = module(*(x[start : start + size] for x in inputs))

        run_all([partial(run, number, start) for number, start in enumerate(starts)], inputs[0].device)
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inputs, parameters = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        needs = ctx.needs_input_grad[3 : 3 + ctx.n_inputs]
        to_inputs = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
        starts = range(0, max(len(inputs[0]), 1), ctx.size)
        to_parameters: list[Sequence[Tensor | None]] = [()] * len(starts)

        def run(number: int, start: int) -> None:
            part = slice(start, start + ctx.size)
            with torch.enable_grad():
                own = [x[part].detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
                out = ctx.module(*own)
            wanted = [x for x in own if x.requires_grad]
            gradients = torch.autograd.grad(out, [*wanted, *parameters], grad[part], allow_unused=True)
            for target, value in zip((x for x in to_inputs if x is not None), gradients, strict=False):
                if value is not None:
                    target[part] = value
            to_parameters[number] = gradients[len(wanted) :]

        run_all([partial(run, number, start) for number, start in enumerate(starts)], grad.device)
        sums = [
            None if values[0] is None else sum(values[1:], values[0]) for values in zip(*to_parameters, strict=True)
        ]
        return None, None, None, *to_inputs, *sums


def run_all(calls: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Side by side on a CPU (see threads.together), one after another on a device that is busy with one alone."""
    if device.type == "cpu":
        threads.together(calls)
    else:
        for call in calls:
            call()


def in_chunks(module: nn.Module, size: int, *inputs: Tensor) -> Tensor:
    """module(*inputs) for inputs [K, *], `size` rows at a time; gradients flow to the inputs and to the parameters.

    Nothing between inputs and output is kept for the backward pass. Sums over chunks are taken in the chunks' order:
    results do not depend on the number of threads.
    """
    return _Chunks.apply(module, size, len(inputs), *inputs, *(p for p in module.parameters() if p.requires_grad))
