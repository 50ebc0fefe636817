"""The files in configs/ resolve to the settings table of the data sets."""

import re
from pathlib import Path

import pytest

from opt import REPOSITORY, parse_options, resolved_dict

CONFIGS = REPOSITORY / "configs"
SCENES = {"syn": "chair", "nsvf": "Bike", "tt": "Barn", "llff": "fern", "own_data": "mine"}

# Expansive Supervision's settings, with the digit that its code lost on llff.
OBJECT = {
    "n_iters": 30000,
    "batch_size": 4096,
    "filter_rays": 0,
    "ndc_ray": 0,
    "downsample_train": 1.0,
    "downsample_test": 1.0,
    "model_name": "TensorVMSplit",
    "n_lamb_sigma": [16, 16, 16],
    "n_lamb_sh": [48, 48, 48],
    "N_voxel_init": 2097156,
    "N_voxel_final": 27000000,
    "upsamp_list": [2000, 3000, 4000, 5500, 7000],
    "update_AlphaMask_list": [2000, 4000],
    "shadingMode": "MLP_Fea",
    "fea2denseAct": "softplus",
    "density_shift": -10.0,
    "distance_scale": 25.0,
    "data_dim_color": 27,
    "view_pe": 2,
    "fea_pe": 2,
    "featureC": 128,
    "L1_weight_inital": 8e-5,
    "L1_weight_rest": 4e-5,
    "TV_weight_density": 0.0,
    "TV_weight_app": 0.0,
    "Ortho_weight": 0.0,
    "step_ratio": 0.5,
    "lr_init": 0.02,
    "lr_basis": 1e-3,
    "lr_decay_iters": -1,
    "lr_decay_target_ratio": 0.1,
    "lr_upsample_reset": 1,
    "rm_weight_mask_thre": 1e-4,
    "alpha_mask_thre": 1e-4,
    "N_vis": 5,
    "vis_every": 5000,
    "render_test": 1,
}
FORWARD_FACING = OBJECT | {
    "ndc_ray": 1,
    "downsample_train": 4.0,
    "downsample_test": 4.0,
    "n_lamb_sigma": [16, 4, 4],
    "n_lamb_sh": [48, 12, 12],
    "N_voxel_final": 262144000,
    "upsamp_list": [2000, 3000, 4000, 5500],
    "update_AlphaMask_list": [2500],
    "fea2denseAct": "relu",
    "view_pe": 0,
    "fea_pe": 0,
    "TV_weight_density": 1.0,
    "TV_weight_app": 1.0,
}
OURS = {"syn": OBJECT, "nsvf": OBJECT, "tt": OBJECT, "own_data": OBJECT, "llff": FORWARD_FACING}

NO_L1 = {"L1_weight_inital": 0.0, "L1_weight_rest": 0.0}
LESS_TV = {"TV_weight_density": 0.1, "TV_weight_app": 0.01}
CP = {
    "model_name": "TensorCP",
    "n_lamb_sigma": [96],
    "n_lamb_sh": [288],
    "N_voxel_final": 125000000,
    "L1_weight_inital": 1e-5,
    "L1_weight_rest": 1e-5,
}
OFFICIAL = {
    "syn": OBJECT,
    "nsvf": OBJECT,
    "tt": OBJECT | NO_L1 | LESS_TV,
    "own_data": OBJECT | NO_L1 | LESS_TV,
    "llff": FORWARD_FACING | NO_L1 | {"n_iters": 25000},
    "syn_cp": OBJECT | CP,
    "nsvf_cp": OBJECT | CP,
    "tt_cp": OBJECT | LESS_TV | CP,
}


def resolved(*argv: str, keys=OBJECT) -> dict:
    options = resolved_dict(parse_options(argv))
    return {key: options[key] for key in keys}


@pytest.mark.parametrize("dataset", OURS)
def test_naming_a_data_set_gives_its_settings(dataset):
    assert resolved("--nerf_dataset", dataset, "--nerf_scene", SCENES[dataset]) == OURS[dataset]


@pytest.mark.parametrize("dataset", OURS)
def test_a_data_sets_file_may_also_be_given_by_hand(dataset):
    assert resolved("--config", f"configs/{dataset}.txt", "--nerf_scene", SCENES[dataset]) == OURS[dataset]


@pytest.mark.parametrize("dataset", ["syn", "nsvf", "tt", "own_data"])
def test_choosing_cp_alone_gives_its_settings(dataset):
    argv = ["--nerf_dataset", dataset, "--nerf_scene", SCENES[dataset], "--model_name", "TensorCP"]
    assert resolved(*argv) == OBJECT | CP


@pytest.mark.parametrize("name", OFFICIAL)
def test_tensorf_files_give_its_official_settings(name):
    dataset = name.removesuffix("_cp")
    found = resolved("--config", f"configs/tensorf/{name}.txt", "--nerf_scene", SCENES[dataset])
    assert found == OFFICIAL[name] | {"filter_rays": 1}
    assert parse_options(["--config", f"configs/tensorf/{name}.txt", "--multi_data"]).nerf_dataset == dataset


@pytest.mark.parametrize(
    ("name", "dataset", "scene"),
    [
        ("lego", "syn", "lego"),
        ("flower", "llff", "flower"),
        ("truck", "tt", "Truck"),
        ("wineholder", "nsvf", "Wineholder"),
        ("your_own_data", "own_data", "my_scene"),
    ],
)
def test_scene_files_name_their_scene_and_change_nothing_else(name, dataset, scene):
    options = parse_options(["--config", f"configs/{name}.txt"])
    assert (options.nerf_dataset, options.nerf_scene) == (dataset, scene)
    assert resolved("--config", f"configs/{name}.txt") == OURS[dataset]


def test_lego200_is_the_short_protocol():
    short = {
        "downsample_train": 4.0,
        "downsample_test": 4.0,
        "n_iters": 1500,
        "batch_size": 1024,
        "N_voxel_init": 262144,
        "N_voxel_final": 2097152,
        "upsamp_list": [100, 150, 200, 275, 350],
        "update_AlphaMask_list": [100, 200],
        "vis_every": 500,
    }
    assert resolved("--config", "configs/lego200.txt") == OBJECT | short
    assert parse_options(["--config", "configs/lego200.txt"]).nerf_scene == "lego"


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_the_demo_is_small_and_finishes_its_schedule(model):
    options = parse_options(["--demo", "--model_name", model])
    assert options.n_iters <= 5000
    assert options.batch_size <= 4096
    assert options.N_voxel_final <= 160**3
    assert max(options.upsamp_list + options.update_AlphaMask_list) < options.n_iters
    assert (options.filter_rays, options.fea2denseAct, options.view_pe, options.fea_pe) == (0, "softplus", 2, 2)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.txt")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_config_file_parses_on_its_own(path: Path):
    dataset = re.search(r"^nerf_dataset = (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if "\ndatasets = " in path.read_text(encoding="utf-8"):  # a sweep
        assert parse_options(["--config", str(path)]).datasets
        return
    lacks_scene = "\nnerf_scene = " not in path.read_text(encoding="utf-8")
    argv = ["--config", str(path), *(["--multi_data"] if lacks_scene else [])]
    if dataset is None:  # a CP file, which goes on top of its data set
        argv += ["--nerf_dataset", path.stem.removesuffix("_cp"), "--model_name", "TensorCP"]
    options = parse_options(argv)
    assert options.nerf_dataset == (dataset[1] if dataset else path.stem.removesuffix("_cp"))
