"""TensoRF's checkpoint files and our own: what is read renders the reference's pictures, what is written reads back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models import field_state, restore_field
from models.files import CHECKPOINT_FORMAT, load_field, write_tensorf
from models.tensorf_files import is_tensorf, to_tensorf
from tests.helpers import GOLDEN, GOLDEN_FIELDS, golden, golden_config, golden_rays, random_field, random_rays
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = ["TensorVMSplit", "TensorCP"]


@pytest.fixture(params=GOLDEN_FIELDS)
def name(request):
    return request.param


def load_golden(name):
    return load_field(GOLDEN / f"{name}.th", "cpu", golden_config(name))[0]


def pictures(field, rays):
    with torch.no_grad():
        return [field.render(rays, background) for background in (0.0, 1.0)]


def assert_same_to_the_bit(ours, other, rays):
    """Parameters, memory layout, geometry, mask and renderings of two fields."""
    theirs = dict(other.named_parameters())
    assert dict(ours.named_parameters()).keys() == theirs.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.stride() == theirs[name].stride(), name
        assert parameter.requires_grad == theirs[name].requires_grad
    assert ours.config == other.config
    assert torch.equal(ours.aabb, other.aabb)
    assert (ours.grid_size, ours.step, ours.n_samples) == (other.grid_size, other.step, other.n_samples)
    assert (ours.alpha_mask is None) == (other.alpha_mask is None)
    if ours.alpha_mask is not None:
        assert torch.equal(ours.alpha_mask.volume, other.alpha_mask.volume)
        assert torch.equal(ours.alpha_mask.aabb, other.alpha_mask.aabb)
    for a, b in zip(pictures(ours, rays), pictures(other, rays), strict=True):
        assert torch.equal(a.rgb, b.rgb)
        assert torch.equal(a.depth, b.depth)


def assert_channels_last(field):
    for kind in (field.density_factors(), field.appearance_factors()):
        for factor in (*kind[0], *kind[1]):
            assert factor.is_contiguous(memory_format=torch.channels_last)


# --- TensoRF's files ---
def test_tensorfs_files_render_the_references_pictures(name):
    arrays, field = golden(f"field_{name}"), load_golden(name)
    assert torch.equal(field.alpha_mask.volume, arrays["mask/volume"][0, 0].bool())
    assert field.step == pytest.approx(arrays["step_size"].item(), rel=1e-6)
    for white, out in enumerate(pictures(field, golden_rays(arrays))):
        torch.testing.assert_close(out.rgb, arrays[f"mask/rgb_white{white}"], **TOLERANCE)
    assert_channels_last(field)


def test_tensorfs_files_hold_the_settings_of_the_field(name):
    assert load_golden(name).config == golden_config(name)


def test_a_file_without_a_mask_gives_a_field_without_one(name, tmp_path):
    state = load_checkpoint(GOLDEN / f"{name}.th")
    save_checkpoint({key: state[key] for key in ("kwargs", "state_dict")}, tmp_path / "early.th")
    field, _ = load_field(tmp_path / "early.th", "cpu", golden_config(name))
    assert field.alpha_mask is None
    arrays = golden(f"field_{name}")
    for white, out in enumerate(pictures(field, golden_rays(arrays))):
        torch.testing.assert_close(out.rgb, arrays[f"nomask/rgb_white{white}"], **TOLERANCE)


def test_an_exported_golden_field_reads_back_to_the_bit(name, tmp_path):
    field = load_golden(name)
    write_tensorf(field, tmp_path / "export.th")
    again, state = load_field(tmp_path / "export.th", "cpu", golden_config(name))
    assert is_tensorf(state)
    assert_same_to_the_bit(again, field, golden_rays(golden(f"field_{name}")))


def test_an_exported_file_has_exactly_the_keys_and_values_of_tensorfs(name):
    theirs, ours = load_checkpoint(GOLDEN / f"{name}.th"), to_tensorf(load_golden(name))
    assert ours.keys() == theirs.keys()
    assert ours["kwargs"].keys() == theirs["kwargs"].keys()
    for key, value in theirs["kwargs"].items():
        mine = ours["kwargs"][key]
        assert torch.equal(mine, value) if key == "aabb" else mine == value, key
        assert isinstance(mine, (type(value), float)), key
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value)
    assert tuple(ours["alphaMask.shape"]) == tuple(theirs["alphaMask.shape"])
    assert ours["alphaMask.mask"].dtype == np.uint8
    assert np.array_equal(ours["alphaMask.mask"], theirs["alphaMask.mask"])
    assert torch.equal(ours["alphaMask.aabb"], theirs["alphaMask.aabb"])


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shading", ["MLP_Fea", "MLP_PE", "SH", "RGB"])
def test_an_exported_random_field_reads_back_to_the_bit(model_name, masked, shading, tmp_path):
    field = random_field(4, model_name, masked=masked, shading=shading)
    write_tensorf(field, tmp_path / "export.th")
    again, _ = load_field(tmp_path / "export.th", "cpu", field.config)
    assert_same_to_the_bit(again, field, random_rays(4, 80))


def test_a_loaded_field_can_be_trained():
    field, rays = load_golden("vm_mlpfea"), golden_rays(golden("field_vm_mlpfea"))
    field.render(rays, 1.0).rgb.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in field.parameters())
    assert any(p.grad.any() for p in field.density_plane)


# --- what does not fit ---
def refusal(path, wanted) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_field(path, "cpu", wanted)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("file", "wanted"), [("cp_mlpfea", "vm_mlpfea"), ("vm_mlpfea", "cp_mlpfea")])
def test_a_file_of_the_other_decomposition_is_refused_by_the_options_name(file, wanted):
    model = "TensorCP" if file.startswith("cp") else "TensorVMSplit"
    assert f"--model_name {model}" in refusal(GOLDEN / f"{file}.th", golden_config(wanted))


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"n_density": (3, 4, 6)}, "--n_lamb_sigma [3, 4, 5] (not [3, 4, 6])"),
        ({"n_appearance": (6, 7, 9)}, "--n_lamb_sh [6, 7, 8]"),
        ({"shading": "MLP"}, "--shadingMode MLP_Fea"),
        ({"view_pe": 5}, "--view_pe 2"),
        ({"fea_pe": 5}, "--fea_pe 2"),
        ({"hidden": 128}, "--featureC 32"),
        ({"density_activation": "relu"}, "--fea2denseAct softplus"),
        ({"n_features": 12}, "--data_dim_color 27"),
    ],
)
def test_options_that_ask_for_another_field_are_named_with_the_files_value(change, option):
    assert option in refusal(GOLDEN / "vm_mlpfea.th", replace(golden_config("vm_mlpfea"), **change))


def test_the_positional_encoding_matters_only_where_it_is_used():
    field, _ = load_field(GOLDEN / "vm_mlpfea.th", "cpu", replace(golden_config("vm_mlpfea"), pos_pe=6))
    assert field.config.pos_pe == 3


def without(state, *keys):
    """The dictionary less the entry at a path of keys."""
    if len(keys) == 1:
        return {key: value for key, value in state.items() if key != keys[0]}
    return {**state, keys[0]: without(state[keys[0]], *keys[1:])}


GOLDEN_STATE = load_checkpoint(GOLDEN / "vm_mlpfea.th")
PATHS = [
    *[("kwargs", key) for key in GOLDEN_STATE["kwargs"]],
    *[("state_dict", key) for key in ("density_plane.2", "app_line.0", "basis_mat.weight", "renderModule.mlp.4.bias")],
    *[(key,) for key in ("kwargs", "state_dict", "alphaMask.shape", "alphaMask.aabb")],
]


@pytest.mark.parametrize("path", PATHS, ids="/".join)
def test_a_file_that_lacks_something_is_refused(path, tmp_path):
    save_checkpoint(without(GOLDEN_STATE, *path), tmp_path / "part.th")
    refusal(tmp_path / "part.th", golden_config("vm_mlpfea"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gridSize", [21, 25, 18]),
        ("gridSize", [21, 25]),
        ("gridSize", None),
        ("aabb", [[0, 0, 0], [1, 1, 1]]),
        ("shadingMode", "Phong"),
        ("density_n_comp", [3, 4]),
        ("density_n_comp", 3),
        ("featureC", "many"),
        ("near_far", [2.0]),
        ("step_ratio", 0.0),
        ("gridSize", [float("inf"), 25, 17]),
    ],
)
def test_a_file_with_a_setting_that_does_not_fit_is_refused(key, value, tmp_path):
    state = {**GOLDEN_STATE, "kwargs": {**GOLDEN_STATE["kwargs"], key: value}}
    save_checkpoint(state, tmp_path / "odd.th")
    refusal(tmp_path / "odd.th", golden_config("vm_mlpfea"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alphaMask.mask", np.zeros(5, dtype=np.uint8)),
        ("alphaMask.mask", None),
        ("alphaMask.shape", (17, 25)),
        ("alphaMask.aabb", None),
        ("state_dict", []),
        ("kwargs", None),
    ],
)
def test_a_file_with_a_damaged_part_is_refused(key, value, tmp_path):
    save_checkpoint({**GOLDEN_STATE, key: value}, tmp_path / "odd.th")
    refusal(tmp_path / "odd.th", golden_config("vm_mlpfea"))


# --- our own checkpoints ---
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ndc", [True, False])
def test_our_checkpoints_bring_a_field_back_to_the_bit(model_name, masked, ndc, tmp_path):
    field = random_field(5, model_name, ndc=ndc, masked=masked)
    save_checkpoint({"format": CHECKPOINT_FORMAT, "field": field_state(field)}, tmp_path / "ckpt_1.th")
    again, _ = load_field(tmp_path / "ckpt_1.th", "cpu", field.config)
    assert_same_to_the_bit(again, field, random_rays(5, 80, ndc))
    assert_channels_last(again)


def test_a_restored_field_owns_its_parameters():
    field = random_field(5)
    again = restore_field(field_state(field), "cpu")
    before = again.density_plane[0].detach().clone()
    with torch.no_grad():
        field.density_plane[0].add_(1.0)
    assert torch.equal(again.density_plane[0], before)


def test_our_checkpoints_hold_plain_values_and_tensors_only(tmp_path):
    torch.save(field_state(random_field(5)), tmp_path / "state.th")
    torch.load(tmp_path / "state.th", weights_only=True)


@pytest.mark.parametrize("key", ["config", "aabb", "grid_size", "parameters", "alpha_mask"])
def test_our_damaged_checkpoints_are_refused(key, tmp_path):
    field = random_field(5)
    save_checkpoint({"format": CHECKPOINT_FORMAT, "field": without(field_state(field), key)}, tmp_path / "ckpt_1.th")
    refusal(tmp_path / "ckpt_1.th", field.config)


def test_a_dictionary_of_something_else_is_refused(tmp_path):
    field = random_field(5)
    for number, state in enumerate(({}, {"format": 99, "field": field_state(field)}, {"format": CHECKPOINT_FORMAT})):
        save_checkpoint(state, tmp_path / f"{number}.th")
        refusal(tmp_path / f"{number}.th", field.config)
