"""Options: layers and their precedence, what is refused and how the message helps."""

import json
from pathlib import Path

import pytest

from opt import BY_NAME, RUN_IDENTITY_EXEMPT, parse_options, resolved_dict
from utils.errors import OptionError

LEGO = ["--nerf_dataset", "syn", "--nerf_scene", "lego"]


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path as text."""

    def write_file(text: str, name: str = "mine.txt") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def refusal(*argv: str) -> str:
    """The message with which the options are refused; it is one line."""
    with pytest.raises(OptionError) as caught:
        parse_options(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- layers ---
def test_later_layers_win(write):
    first = write("nerf_dataset = syn\nnerf_scene = lego\nn_iters = 10\nbatch_size = 20\nL1_weight_rest = 0.5", "a.txt")
    second = write("batch_size = 30\nvis_every = 7", "b.txt")
    options = parse_options(["--config", first, "--config", second, "--vis_every", "9"])
    assert (options.n_iters, options.batch_size, options.vis_every) == (10, 30, 9)
    assert options.L1_weight_rest == 0.5  # a file beats the data set's file
    assert options.L1_weight_inital == 8e-5  # which beats the default
    assert options.lr_init == BY_NAME["lr_init"].default


def test_order_of_config_files_decides(write):
    first, second = write("batch_size = 1", "a.txt"), write("batch_size = 2", "b.txt")
    assert parse_options([*LEGO, "--config", first, "--config", second]).batch_size == 2
    assert parse_options([*LEGO, "--config", second, "--config", first]).batch_size == 1


@pytest.mark.parametrize("place", ["file", "command line"])
def test_data_set_file_follows_whatever_layer_names_the_data_set(write, place):
    named = ["--config", write("nerf_dataset = llff")] if place == "file" else ["--nerf_dataset", "llff"]
    options = parse_options([*named, "--nerf_scene", "fern"])
    assert (options.fea2denseAct, options.downsample_train, options.downsample_test) == ("relu", 4.0, 4.0)
    assert options.ndc_ray == 1


def test_naming_another_data_set_takes_the_scene_of_lower_layers_away():
    message = refusal("--config", "configs/lego.txt", "--nerf_dataset", "llff")
    assert "nerf_scene" in message
    assert "flower" in message
    options = parse_options(["--config", "configs/lego.txt", "--nerf_dataset", "llff", "--nerf_scene", "fern"])
    assert (options.nerf_scene, options.n_lamb_sigma) == ("fern", [16, 4, 4])


def test_later_words_on_the_command_line_win():
    assert parse_options([*LEGO, "--strategy", "full", "--strategy", "soft"]).strategy == "soft"


@pytest.mark.parametrize("words", [["--demo"], ["--nerf_dataset", "demo"], ["--config", "configs/lego.txt", "--demo"]])
def test_demo_needs_no_scene_and_names_its_own(words):
    options = parse_options(words)
    assert (options.demo, options.nerf_dataset, options.nerf_scene) == (True, "demo", "shapes_160")
    assert parse_options([*words, "--demo_resolution", "64"]).nerf_scene == "shapes_64"


def test_cp_takes_its_own_settings_beneath_the_users(write):
    options = parse_options([*LEGO, "--model_name", "TensorCP"])
    assert (options.n_lamb_sigma, options.n_lamb_sh, options.N_voxel_final) == ([96], [288], 125000000)
    assert (options.tag, options.L1_weight_rest) == ("full_cp", 1e-5)
    path = write("model_name = TensorCP\nn_lamb_sigma = [24,24,24]")
    assert parse_options([*LEGO, "--config", path]).n_lamb_sigma == [24]


# --- how values are written ---
@pytest.mark.parametrize("words", [["[8,4,2]"], ["[8, 4, 2]"], ["[8,", "4,", "2]"], ["[", "8,4,2", "]"]])
def test_lists_may_hold_blanks_inside_their_brackets(words):
    options = parse_options([*LEGO, "--n_lamb_sigma", *words, "--batch_size", "5"])
    assert (options.n_lamb_sigma, options.batch_size) == ([8, 4, 2], 5)


def test_files_may_hold_comments_blanks_and_a_byte_order_mark(write):
    path = write(
        "\ufeff# all\n; of\n\n  n_iters =  7   # it\nupsamp_list = [1, 2]\nsave_dir = a#b\ndensity_shift = -3\n"
    )
    options = parse_options([*LEGO, "--config", path])
    assert (options.n_iters, options.upsamp_list, options.save_dir) == (7, [1, 2], "a#b")
    assert options.density_shift == -3.0


@pytest.mark.parametrize(("words", "value"), [([], False), (["--overwrite"], True), (["--overwrite", "false"], False)])
def test_flags_need_no_value(words, value):
    assert parse_options([*LEGO, *words]).overwrite is value


def test_the_command_line_can_take_back_a_flag_of_a_file(write):
    path = write("overwrite = true")
    assert parse_options([*LEGO, "--config", path]).overwrite is True
    assert parse_options([*LEGO, "--config", path, "--overwrite", "false"]).overwrite is False


def test_none_takes_back_what_a_file_gives(write):
    path = write("scene_bbox = [-1,-1,-1,1,1,1]")
    assert parse_options([*LEGO, "--config", path]).scene_bbox == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
    assert parse_options([*LEGO, "--config", path, "--scene_bbox", "None"]).scene_bbox is None


# --- refusals: each names where, what and how to mend it ---
MALFORMED = [
    ("n_iters", "many", "whole number"),
    ("n_iters", "1.5", "whole number"),
    ("n_iters", "0", "1 or more"),
    ("lr_init", "fast", "not a number"),
    ("lr_init", "0", "above 0"),
    ("lr_basis", "nan", "finite"),
    ("step_ratio", "-1", "above 0"),
    ("downsample_train", "0.5", "1 or more"),
    ("n_lamb_sigma", "16", "[16,16,16]"),
    ("n_lamb_sigma", "[16,x,16]", "whole number"),
    ("upsamp_list", "[-5]", "0 or more"),
    ("nerf_dataset", "blender", "one of syn"),
    ("shadingMode", "MLP_fea", "did you mean MLP_Fea"),
    ("render_test", "2", "0 or 1"),
    ("overwrite", "maybe", "true or false"),
    ("device", "gpu", "cuda:N"),
    ("tag", "a/b", "folder"),
    ("nerf_scene", "..", "folder"),
]


@pytest.mark.parametrize(("key", "value", "remedy"), MALFORMED)
def test_malformed_values_are_refused_by_name_and_place(write, key, value, remedy):
    path = write(f"{key} = {value}")
    in_file, on_line = refusal(*LEGO, "--config", path), refusal(*LEGO, f"--{key}", value)
    assert in_file.startswith(f"{path}: {key}: ")
    assert on_line.startswith(f"command line: {key}: ")
    assert remedy in in_file
    assert remedy in on_line


CONTRADICTIONS = [
    ({"shadingMode": "SH", "data_dim_color": "12"}, "data_dim_color", "27"),
    ({"shadingMode": "RGB"}, "data_dim_color", "3"),
    ({"n_lamb_sigma": "[16,16]"}, "n_lamb_sigma", "three modes"),
    ({"model_name": "TensorCP", "n_lamb_sh": "[16,16]"}, "n_lamb_sh", "[96]"),
    ({"model_name": "TensorCP", "n_lamb_sh": "[16,4,4]"}, "n_lamb_sh", "[96]"),
    ({"upsamp_list": "[5,5]"}, "upsamp_list", "increase"),
    ({"update_AlphaMask_list": "[4000,2000]"}, "update_AlphaMask_list", "increase"),
    ({"N_voxel_final": "1000"}, "N_voxel_final", "N_voxel_init"),
    ({"scene_bbox": "[1,2,3]"}, "scene_bbox", "six numbers"),
    ({"scene_bbox": "[1,-1,-1,1,1,1]"}, "scene_bbox", "smallest corner first"),
    ({"ndc_ray": "1"}, "ndc_ray", "only llff"),
    ({"lr_decay_iters": "0"}, "lr_decay_iters", "-1"),
    ({"ckpt": "nowhere.th"}, "ckpt", "no such file"),
    ({"lpips_weights": "nowhere"}, "lpips_weights", "no such folder"),
    ({"export_tensorf": "a.th", "seeds": "2"}, "export_tensorf", "seeds"),
    ({"demo_resolution": "64"}, "demo_resolution", "only the demo"),
]


@pytest.mark.parametrize(("given", "key", "remedy"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name_and_place(write, given, key, remedy):
    path = write("\n".join(f"{k} = {v}" for k, v in given.items()))
    in_file = refusal(*LEGO, "--config", path)
    on_line = refusal(*LEGO, *(word for k, v in given.items() for word in (f"--{k}", v)))
    assert f"{key} = " in in_file
    assert remedy in in_file
    assert on_line.split(": ", 1)[1] == in_file.split(": ", 1)[1]


def test_a_contradiction_names_the_file_or_line_that_holds_the_value(write):
    path = write("data_dim_color = 12")
    message = refusal(*LEGO, "--config", path, "--shadingMode", "SH")
    assert message.startswith(f"{path}: data_dim_color = 12: ")
    message = refusal(*LEGO, "--shadingMode", "RGB")
    assert message.startswith("default: data_dim_color = 27: ")


def test_unknown_options_are_refused_with_the_closest_name(write):
    path = write("n_iter = 5")
    assert refusal(*LEGO, "--config", path) == f"{path}: n_iter: is no option: did you mean n_iters?"
    assert refusal(*LEGO, "--batchsize", "5") == "command line: batchsize: is no option: did you mean batch_size?"
    assert "--help" in refusal(*LEGO, "--xyzzy")
    assert refusal(*LEGO, "--use_cuda", "1").endswith("in run.py; here it is device = cuda:1")


def test_options_cannot_be_abbreviated():
    assert "did you mean" in refusal(*LEGO, "--nerf_scen", "chair")


def test_stray_words_and_missing_values_are_refused():
    assert "'chair'" in refusal(*LEGO, "chair")
    assert refusal(*LEGO, "--n_iters") == "command line: n_iters: needs a value after it"


def test_a_key_given_twice_in_one_file_is_refused(write):
    path = write("n_iters = 5\n\nn_iters = 6")
    message = refusal(*LEGO, "--config", path)
    assert message.startswith(f"{path}: n_iters is given twice, again in line 3")


@pytest.mark.parametrize("line", ["n_iters 5", "n_iters =", "[section]", "n iters = 5", "--n_iters = 5"])
def test_a_malformed_line_is_refused_with_its_number(write, line):
    path = write(f"batch_size = 4\n{line}")
    message = refusal(*LEGO, "--config", path)
    assert message.startswith(f"{path}: line 2, '{line}': ")
    assert "name = value" in message


def test_a_missing_or_unreadable_config_file_is_refused(tmp_path):
    assert "did you mean configs/lego.txt" in refusal("--config", "configs/legoo.txt")
    assert "no such file" in refusal("--config", str(tmp_path))
    binary = tmp_path / "picture.png"
    binary.write_bytes(b"\x89PNG\xff\xfe")
    assert refusal("--config", str(binary)).startswith(f"{binary}: ")


TENSORF_LINES = [
    ("datadir", "./data/nerf_synthetic/lego", "data_folder = data and nerf_scene = lego"),
    ("datadir", "/sets/nerf_llff_data/fern", "data_folder = /sets and nerf_scene = fern"),
    ("dataset_name", "blender", "nerf_dataset = syn"),
    ("dataset_name", "tankstemple", "nerf_dataset = tt"),
    ("dataset_name", "own_data", "nerf_dataset = own_data"),
    ("expname", "tensorf_lego_VM", "tag = tensorf_lego_VM"),
    ("basedir", "./log", "save_dir = ./log"),
    ("lindisp", "1", "delete"),
    ("perturb", "1.0", "delete"),
    ("accumulate_decay", "0.998", "delete"),
    ("idx_view", "0", "delete"),
    ("with_depth", "1", "delete"),
    ("white_bkgd", "1", "delete"),
    ("add_timestamp", "0", "delete"),
]


@pytest.mark.parametrize(("key", "value", "ours"), TENSORF_LINES)
def test_tensorf_names_are_refused_with_ours(write, key, value, ours):
    path = write(f"{key} = {value}")
    for message in (refusal("--config", path), refusal(f"--{key}", value), refusal(f"--{key}={value}")):
        assert f": {key}: " in message
        assert ours in message


@pytest.mark.parametrize(("key", "value"), [("config", "other.txt"), ("demo", "true"), ("debug", "true")])
def test_what_belongs_on_the_command_line_is_refused_in_files(write, key, value):
    path = write(f"{key} = {value}")
    assert refusal("--config", path).startswith(f"{path}: {key}: ")


def test_demo_with_another_data_set_or_scene_is_refused():
    assert "contradicts" in refusal("--demo", "--nerf_dataset", "llff")
    assert "demo_resolution" in refusal("--demo", "--nerf_scene", "lego")


def test_multi_data_needs_no_scene_and_refuses_one_on_the_command_line(tmp_path):
    assert parse_options(["--nerf_dataset", "nsvf", "--multi_data"]).nerf_scene is None
    assert parse_options(["--config", "configs/lego.txt", "--multi_data"]).nerf_scene is None
    assert "multi_data" in refusal(*LEGO, "--multi_data")
    checkpoint = tmp_path / "a.th"
    checkpoint.touch()
    assert "multi_data" in refusal("--multi_data", "--ckpt", str(checkpoint))


@pytest.mark.parametrize(("dataset", "scene"), [("syn", "lego"), ("llff", "flower"), ("tt", "Truck"), ("nsvf", "Wine")])
def test_a_missing_scene_is_refused_with_an_example(dataset, scene):
    message = refusal("--nerf_dataset", dataset)
    assert f"--nerf_scene {scene}" in message
    assert "--demo" in message


# --- what is resolved ---
def test_tag_and_downsample_test_default_to_what_they_follow():
    options = parse_options([*LEGO, "--strategy", "egra", "--downsample_train", "2"])
    assert (options.tag, options.downsample_test) == ("egra", 2.0)
    options = parse_options([*LEGO, "--tag", "mine", "--downsample_train", "2", "--downsample_test", "1"])
    assert (options.tag, options.downsample_test) == ("mine", 1.0)


@pytest.mark.parametrize("words", [["--demo"], LEGO, ["--config", "configs/tensorf/syn_cp.txt", "--nerf_scene", "mic"]])
def test_resolved_options_survive_json_in_a_stable_order(words):
    options = parse_options(words)
    saved = json.loads(json.dumps(resolved_dict(options)))
    assert saved == vars(options)
    assert list(saved) == list(BY_NAME)


@pytest.mark.parametrize("words", [["--demo"], LEGO, ["--config", "configs/tensorf/syn_cp.txt", "--nerf_scene", "mic"]])
def test_resolved_options_written_as_a_config_file_resolve_to_themselves(write, words):
    first = resolved_dict(parse_options(words))
    lines = [f"{k} = {v}" for k, v in first.items() if k not in ("config", "demo", "debug")]
    if not first["demo"]:
        lines = [line for line in lines if not line.startswith("demo_resolution")]
    path = write("\n".join(lines))
    assert resolved_dict(parse_options(["--config", path])) == first | {"config": [path]}


def test_parsing_leaves_the_defaults_as_they_are():
    parse_options(LEGO).n_lamb_sigma.append(99)
    assert parse_options(LEGO).n_lamb_sigma == [16, 16, 16]


def test_what_decides_a_result_is_part_of_a_runs_identity():
    assert set(BY_NAME) > RUN_IDENTITY_EXEMPT
    decisive = {
        "seed",
        "strategy",
        "nerf_dataset",
        "nerf_scene",
        "n_iters",
        "downsample_test",
        "filter_rays",
        "test_every",
    }
    assert not decisive & RUN_IDENTITY_EXEMPT
    assert {"device", "overwrite", "save_dir", "data_folder", "vis_every"} <= RUN_IDENTITY_EXEMPT


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for option in BY_NAME.values():
        assert f"--{option.name} " in text
        if isinstance(option.default, int | float) and not isinstance(option.default, bool):
            assert f"(default: {option.default})" in text


def test_a_config_path_counts_from_the_working_folder_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    Path(tmp_path / "configs" / "lego.txt").write_text("nerf_scene = other\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert parse_options(["--config", "configs/lego.txt"]).nerf_scene == "other"
    assert parse_options(["--config", "configs/flower.txt"]).nerf_scene == "flower"  # from the repository


def test_the_data_sets_file_is_always_the_repositorys(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    Path(tmp_path / "configs" / "syn.txt").write_text("n_iters = 3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert parse_options(LEGO).n_iters == 30000


def test_rendering_only_but_nothing_is_refused():
    with pytest.raises(OptionError, match=r"render_only = 1: there is nothing to do; give one of --render_test"):
        parse_options(["--nerf_scene", "lego", "--render_only", "1", "--render_test", "0"])
