"""Adam for a field whose parameters change size."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.kernels import compiled_adam
from models.kernels.compiled import libraries

BETAS = (0.9, 0.99)


def make_adam(groups: list[dict]) -> torch.optim.Adam:
    """Adam (betas 0.9, 0.99) over parameter groups with their learning rates; a fused implementation."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if compiled_adam.serves(parameters) and libraries() is not None:
        return compiled_adam.CompiledAdam(groups, betas=BETAS)
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


def crop_adam(
    old: torch.optim.Adam,
    groups: list[dict],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    slices: Mapping[str, tuple[slice, ...]],
) -> torch.optim.Adam:
    """Adam over cropped parameters that goes on with the kept part of its moments and with its learning rates.

    groups: parameter groups of the cropped parameters, in the old order. before, after: parameters by name; slices:
    what was kept of each cropped one.
    """
    new = make_adam([{**group, "lr": previous["lr"]} for group, previous in zip(groups, old.param_groups, strict=True)])
    for name, parameter in after.items():
        state = old.state.get(before[name])
        if state is None:
            continue
        kept = slices.get(name, (Ellipsis,))
        new.state[parameter] = {
            key: torch.empty_like(parameter).copy_(value[kept]) if value.dim() > 0 else value
            for key, value in state.items()
        }
    return new
