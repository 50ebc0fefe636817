"""Adam for a field whose parameters change size."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.kernels import compiled_adam
from models.kernels.compiled import libraries
from utils.checkpoint_parts import check_like

BETAS = (0.9, 0.99)
MAX_STEPS = 1e10


def make_adam(groups: list[dict]) -> torch.optim.Adam:
    """Adam (betas 0.9, 0.99) over parameter groups with their learning rates; a fused implementation."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if compiled_adam.serves(parameters) and libraries() is not None:
        return compiled_adam.CompiledAdam(groups, betas=BETAS)
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


def load_adam(optimizer: torch.optim.Adam, state: Mapping) -> None:
    """Give a new optimiser of `make_adam` the state that another one had. Raises ValueError, KeyError or TypeError if
    the state, which may come from anywhere, does not fit: the kernels write where its moments should be."""
    groups = optimizer.state_dict()["param_groups"]
    check_like(groups, state["param_groups"], "optimizer")
    for ours, theirs in zip(groups, state["param_groups"], strict=True):
        if any(theirs[name] != value for name, value in ours.items() if name != "lr") or theirs["lr"] < 0:
            raise ValueError("optimizer/param_groups has other settings")
    check_like({number: {} for number in state["state"]}, state["state"], "optimizer")
    optimizer.load_state_dict(state)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        moments = optimizer.state.get(parameter)
        if moments:
            step = moments["step"]
            check_like({"exp_avg": parameter, "exp_avg_sq": parameter}, moments, "optimizer")
            if torch.as_tensor(step).numel() != 1 or not 0 <= float(step) <= MAX_STEPS:
                raise ValueError("optimizer/step is no number of steps")
            if bool((moments["exp_avg_sq"] < 0).any()):
                raise ValueError("optimizer/exp_avg_sq is negative")


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
