"""TensoRF's own checkpoint files (.th): read into a Field, and written from one.

A file holds `kwargs` (settings), `state_dict` (same parameter names as ours) and, once there is a mask, its volume as
packed bits (`alphaMask.mask`, numpy uint8), shape and box.
"""

import math

import numpy as np
import torch

from models import checked_box, filled_field
from models.alpha_mask import AlphaMask
from models.config import FieldConfig
from models.field import Field

_FILES_KEYS = ("kwargs", "state_dict")


def is_tensorf(state: dict) -> bool:
    """Whether a loaded checkpoint is TensoRF's rather than ours."""
    return all(key in state for key in _FILES_KEYS)


def tensorf_config(state: dict, ndc: bool) -> FieldConfig:
    """The settings in a TensoRF checkpoint. ndc: whether its scene is in NDC (the file does not say).

    Raises KeyError, TypeError, ValueError, IndexError, AttributeError or ArithmeticError if some are missing or wrong.
    """
    kwargs = state["kwargs"]
    vm = any(name.startswith("density_plane") for name in state["state_dict"])
    config = FieldConfig(
        model_name="TensorVMSplit" if vm else "TensorCP",
        n_density=tuple(int(n) for n in kwargs["density_n_comp"]),
        n_appearance=tuple(int(n) for n in kwargs["appearance_n_comp"]),
        n_features=int(kwargs["app_dim"]),
        shading=kwargs["shadingMode"],
        pos_pe=int(kwargs["pos_pe"]),
        view_pe=int(kwargs["view_pe"]),
        fea_pe=int(kwargs["fea_pe"]),
        hidden=int(kwargs["featureC"]),
        density_activation=kwargs["fea2denseAct"],
        density_shift=float(kwargs["density_shift"]),
        distance_scale=float(kwargs["distance_scale"]),
        step_ratio=float(kwargs["step_ratio"]),
        weight_threshold=float(kwargs["rayMarch_weight_thres"]),
        alpha_threshold=float(kwargs["alphaMask_thres"]),
        near=float(kwargs["near_far"][0]),
        far=float(kwargs["near_far"][1]),
        ndc=ndc,
    )
    config.check()
    return config


def from_tensorf(state: dict, config: FieldConfig, device: torch.device | str) -> Field:
    """The field in a TensoRF checkpoint, whose settings are `config`; raises as `tensorf_config`, and RuntimeError."""
    kwargs = state["kwargs"]
    field = filled_field(config, kwargs["aabb"], [int(n) for n in kwargs["gridSize"]], state["state_dict"])
    if "alphaMask.mask" in state:
        shape, packed = tuple(int(n) for n in state["alphaMask.shape"])[-3:], state["alphaMask.mask"]
        if len(shape) != 3 or min(shape) < 1 or not 0 <= 8 * packed.size - math.prod(shape) < 8 or packed.ndim != 1:
            raise ValueError("alphaMask.mask does not have the bits of alphaMask.shape")
        bits = np.unpackbits(packed)[: math.prod(shape)].reshape(shape)
        field.alpha_mask = AlphaMask(torch.from_numpy(bits.astype(bool)), checked_box(state["alphaMask.aabb"]))
    field.to(device)
    field.select_kernels()
    return field


def to_tensorf(field: Field) -> dict:
    """The field as TensoRF's checkpoint dictionary, on the CPU; read back by `from_tensorf` and by TensoRF."""
    c = field.config
    state = {
        "kwargs": {
            "aabb": field.aabb.cpu(),
            "gridSize": list(field.grid_size),
            "density_n_comp": list(c.n_density),
            "appearance_n_comp": list(c.n_appearance),
            "app_dim": c.n_features,
            "density_shift": c.density_shift,
            "alphaMask_thres": c.alpha_threshold,
            "distance_scale": c.distance_scale,
            "rayMarch_weight_thres": c.weight_threshold,
            "fea2denseAct": c.density_activation,
            "near_far": [c.near, c.far],
            "step_ratio": c.step_ratio,
            "shadingMode": c.shading,
            "pos_pe": c.pos_pe,
            "view_pe": c.view_pe,
            "fea_pe": c.fea_pe,
            "featureC": c.hidden,
        },
        "state_dict": {name: p.detach().cpu() for name, p in field.named_parameters()},
    }
    if field.alpha_mask is not None:
        volume = field.alpha_mask.volume.cpu().numpy()
        state["alphaMask.shape"] = (1, 1, *volume.shape)
        state["alphaMask.mask"] = np.packbits(volume.reshape(-1))
        state["alphaMask.aabb"] = field.alpha_mask.aabb.cpu()
    return state
