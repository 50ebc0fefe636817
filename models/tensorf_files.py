"""TensoRF's own checkpoint files (.th): read into a Field, and written from one.

A file holds `kwargs` (settings), `state_dict` (same parameter names as ours) and, once there is a mask, its volume as
packed bits (`alphaMask.mask`, numpy uint8), shape and box.
"""

import math

import numpy as np
import torch

from models import build_field
from models.alpha_mask import AlphaMask
from models.config import FieldConfig
from models.field import Field
from utils.errors import CheckpointError

_FILES_KEYS = ("kwargs", "state_dict")


def is_tensorf(state: dict) -> bool:
    """Whether a loaded checkpoint is TensoRF's rather than ours."""
    return all(key in state for key in _FILES_KEYS)


def from_tensorf(state: dict, device: torch.device | str, ndc: bool, path: str = "checkpoint") -> Field:
    """The field in a TensoRF checkpoint. ndc: whether its scene is in NDC (the file does not say).

    Raises CheckpointError, naming `path`, if something is missing or does not fit.
    """
    try:
        kwargs, parameters = state["kwargs"], state["state_dict"]
        vm = any(name.startswith("density_plane") for name in parameters)
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
        field = build_field(config, kwargs["aabb"].cpu().float(), tuple(int(n) for n in kwargs["gridSize"]))
        own = dict(field.named_parameters())
        field.load_state_dict({**field.state_dict(), **{name: parameters[name] for name in own}})
        if "alphaMask.mask" in state:
            shape = tuple(int(n) for n in state["alphaMask.shape"])[-3:]
            bits = np.unpackbits(np.asarray(state["alphaMask.mask"]))[: math.prod(shape)].reshape(shape)
            box = state["alphaMask.aabb"].cpu().float()
            if box.shape != (2, 3) or not bool((box[1] > box[0]).all()):
                raise ValueError("alphaMask.aabb is no box")
            field.alpha_mask = AlphaMask(torch.from_numpy(bits.astype(bool)), box)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is not a complete TensoRF checkpoint ({type(error).__name__}: {reason})"
        ) from error
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
