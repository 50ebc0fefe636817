"""The field: TensoRF's VM and CP decompositions, and how a field is built and restored."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.alpha_mask import AlphaMask
from models.config import FieldConfig
from models.field import Field
from models.sizes import n_parameters
from models.tensor_cp import TensorCP
from models.tensor_vm import TensorVMSplit
from utils.seeds import seed_for

MODELS: dict[str, type[Field]] = {"TensorVMSplit": TensorVMSplit, "TensorCP": TensorCP}


def build_field(config: FieldConfig, aabb: Tensor, grid_size: tuple[int, int, int], seed: int = 0) -> Field:
    """A freshly initialised field on aabb's device; the same for the same seed, whatever the device.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "field"))
        field = MODELS[config.model_name](config, aabb.cpu(), grid_size)
    field.to(aabb.device)
    field.select_kernels()
    return field


def field_state(field: Field) -> dict:
    """Everything that makes a field, as plain values and tensors; see `restore_field`."""
    mask = field.alpha_mask
    return {
        "config": field.config.to_dict(),
        "aabb": field.aabb.cpu(),
        "grid_size": list(field.grid_size),
        "parameters": {name: p.detach().cpu() for name, p in field.named_parameters()},
        "alpha_mask": None if mask is None else {"volume": mask.volume.cpu(), "aabb": mask.aabb.cpu()},
    }


def restore_field(state: dict, device: torch.device | str) -> Field:
    """The field of which `field_state` was taken, on `device`.

    Raises KeyError, TypeError, ValueError, AttributeError or RuntimeError if the state is not whole or its parts do not
    fit each other.
    """
    mask, config = state["alpha_mask"], FieldConfig.from_dict(state["config"])
    field = filled_field(config, state["aabb"], state["grid_size"], state["parameters"])
    if mask is not None:
        field.alpha_mask = AlphaMask(checked_volume(mask["volume"]), checked_box(mask["aabb"]))
    field.to(device)
    field.select_kernels()
    return field


def filled_field(
    config: FieldConfig, aabb: Tensor, grid_size: Sequence[int], parameters: Mapping[str, Tensor]
) -> Field:
    """A field with the parameters given, by name, on the CPU. They may come from anywhere: nothing is built that they
    could not fill. Raises as `restore_field`."""
    box, grid = checked_box(aabb), tuple(grid_size)
    if len(grid) != 3 or not all(isinstance(n, int) and n >= 2 for n in grid):
        raise ValueError("the grid's size is no three numbers of points")
    for name, values in parameters.items():
        if not values.is_floating_point() or not bool(values.isfinite().all()):
            raise ValueError(f"{name} holds something else than finite numbers")
    if n_parameters(config, grid) > sum(values.numel() for values in parameters.values()):
        raise ValueError("there are fewer parameters than the settings and the grid's size ask for")
    field = build_field(config, box, grid)
    field.load_state_dict({**field.state_dict(), **{name: parameters[name] for name, _ in field.named_parameters()}})
    return field


def checked_box(aabb: Tensor) -> Tensor:
    """aabb [2, 3] as float32; ValueError if it is no box with a volume."""
    if aabb.shape != (2, 3) or not bool(aabb.isfinite().all()) or not bool((aabb[1] > aabb[0]).all()):
        raise ValueError("the box has no volume")
    return aabb.cpu().float()


def checked_volume(volume: Tensor) -> Tensor:
    """An alpha mask's volume [Nz, Ny, Nx] bool; ValueError if it is none."""
    if volume.dim() != 3 or volume.dtype != torch.bool or not volume.numel():
        raise ValueError("the alpha mask is no volume")
    return volume
