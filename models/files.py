"""Fields in files: our checkpoints and TensoRF's read, TensoRF's and meshes written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models import restore_field
from models.config import FieldConfig
from models.field import Field
from models.growth import dense_alpha
from models.tensorf_files import from_tensorf, is_tensorf, tensorf_config, to_tensorf
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError
from utils.mesh import export_mesh
from utils.shortage import is_shortage

CHECKPOINT_FORMAT = 1
# Alpha over one step at which a mesh's surface lies, as TensoRF's export.
MESH_ALPHA = 0.005
# What a checkpoint's field must share with the options, by their names on the command line.
_MUST_AGREE = {
    "model_name": "model_name",
    "n_density": "n_lamb_sigma",
    "n_appearance": "n_lamb_sh",
    "n_features": "data_dim_color",
    "shading": "shadingMode",
    "pos_pe": "pos_pe",
    "view_pe": "view_pe",
    "fea_pe": "fea_pe",
    "hidden": "featureC",
    "density_activation": "fea2denseAct",
}


def load_field(path: Path, device: torch.device | str, wanted: FieldConfig) -> tuple[Field, dict]:
    """The field in a checkpoint of ours or of TensoRF's, and the whole checkpoint.

    wanted: what the options ask for. Raises CheckpointError if the file is missing, damaged or unsafe, or holds
    another kind of field; the message names the options that differ.
    """
    state = load_checkpoint(path)
    tensorf = is_tensorf(state)
    if not tensorf and not (_is_number(state.get("format"), CHECKPOINT_FORMAT) and "field" in state):
        told = str(state.get("format"))[:40]
        raise CheckpointError(f"{path} is no checkpoint of this program (format {told}) or of TensoRF")
    with _naming_damage(path, tensorf):
        config = tensorf_config(state, wanted.ndc) if tensorf else FieldConfig.from_dict(state["field"]["config"])
    _refuse_other_field(path, config, wanted)
    with _naming_damage(path, tensorf):
        field = from_tensorf(state, config, device) if tensorf else restore_field(state["field"], device)
    field.set_mlp_dtype(wanted.mlp_dtype)
    return field, state


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, int) and value == number


@contextmanager
def _naming_damage(path: Path, tensorf: bool) -> Iterator[None]:
    """Turn what the parts of a checkpoint that do not fit raise into a CheckpointError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, ArithmeticError) as error:
        if is_shortage(error):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        message = f"{path} is damaged: its field cannot be rebuilt ({what}); use an older checkpoint"
        if tensorf:
            message = f"{path} is not a complete TensoRF checkpoint ({what}); export it again, or use another one"
        raise CheckpointError(message) from error


def _refuse_other_field(path: Path, config: FieldConfig, wanted: FieldConfig) -> None:
    ours, theirs = wanted.to_dict(), config.to_dict()
    if wanted.shading != "MLP_PE":
        theirs["pos_pe"] = ours["pos_pe"]  # without effect on the other shadings
    differing = [
        f"--{option} {theirs[name]} (not {ours[name]})"
        for name, option in _MUST_AGREE.items()
        if theirs[name] != ours[name]
    ]
    if ours["ndc"] != theirs["ndc"]:
        raise CheckpointError(f"{path} was trained on another kind of scene (NDC or not): check --nerf_dataset")
    if differing:
        raise CheckpointError(
            f"{path} holds another field than the options ask for: give {', '.join(differing)}, or another checkpoint "
            "(if it is this run's own: remove it, or --overwrite the run)"
        )


def write_tensorf(field: Field, path: Path) -> None:
    """Write the field as a TensoRF checkpoint. Raises RunFolderError if that cannot be done."""
    save_checkpoint(to_tensorf(field), Path(path))


def write_mesh(field: Field, path: Path) -> None:
    """Write the surface where alpha over one step is 0.005, in world coordinates, as .ply.

    Raises UserError if the field has no such surface, RunFolderError if the file cannot be written.
    """
    alpha, _ = dense_alpha(field, field.grid_size)
    export_mesh(Path(path), alpha.cpu().numpy(), field.aabb.cpu().numpy(), MESH_ALPHA)
