"""Adam on a CPU, by adam.cpp and this machine's threads.

A step reads and writes four arrays as large as the field, so memory sets its pace. Torch's fused Adam copies what is
stored channels-last first, which the field's factors are, and so moves twice as much.
"""

import ctypes
import math

import torch
from torch import Tensor

from models.kernels import threads
from models.kernels.compiled import libraries


class _Parameter(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "gradient", "mean", "square")),
        ("n", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "step_size", "rest", "eps")),
    )


class CompiledAdam(torch.optim.Adam):
    """torch.optim.Adam for dense float32 parameters on the CPU; its state and state_dict are torch's."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all parameters that have a gradient (Adam, arXiv:1412.6980, algorithm 1)."""
        if closure is not None:
            raise ValueError("CompiledAdam takes no closure")
        given, alive = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    given.append(self._given(group, parameter, alive))
        array = (_Parameter * len(given))(*given)
        libraries()["adam"].adam(array, ctypes.c_int64(len(given)), threads.count())

    def _given(self, group: dict, parameter: Tensor, alive: list[Tensor]) -> _Parameter:
        """The parameter as the library wants it; what it points to is kept alive in `alive`."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        tensors = [_like(x, parameter) for x in (parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        state["exp_avg"], state["exp_avg_sq"] = tensors[1:]
        alive += tensors
        beta1, beta2 = group["betas"]
        count = state["step"].item()
        step_size, rest = group["lr"] / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        pointers = [x.data_ptr() for x in (parameter, *tensors)]
        return _Parameter(*pointers, parameter.numel(), beta1, beta2, step_size, rest, group["eps"])


def _like(x: Tensor, parameter: Tensor) -> Tensor:
    """x in the parameter's memory layout."""
    return x if x.stride() == parameter.stride() else torch.empty_like(parameter).copy_(x)


def serves(parameters: list[Tensor]) -> bool:
    """Whether all of these are dense float32 tensors on the CPU."""
    return all(
        p.device.type == "cpu"
        and p.dtype == torch.float32
        and (p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)))
        for p in parameters
    )
