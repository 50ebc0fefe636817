"""The field: TensoRF's VM and CP decompositions, and how a field is built and restored."""

import torch
from torch import Tensor

from models.alpha_mask import AlphaMask
from models.config import FieldConfig
from models.field import Field
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

    Raises RuntimeError if the parameters do not fit the configuration.
    """
    field = build_field(FieldConfig.from_dict(state["config"]), state["aabb"], tuple(state["grid_size"]))
    mask = state["alpha_mask"]
    field.load_state_dict({"aabb": state["aabb"], **state["parameters"]})
    if mask is not None:
        field.alpha_mask = AlphaMask(mask["volume"], mask["aabb"])
    field.to(device)
    field.select_kernels()
    return field
