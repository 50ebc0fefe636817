"""Whatever is wrong with a data set is one line that names the file and the remedy, before any image is decoded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataLoader.assemble
from dataLoader import load_scene, scene_names
from utils.errors import OptionError, SceneError

SCENES = Path(__file__).parent / "golden" / "scenes"
FOLDERS = {
    "syn": "nerf_synthetic/tiny",
    "nsvf": "Synthetic_NSVF/Tiny",
    "tt": "TanksAndTemple/Tiny",
    "llff": "nerf_llff_data/tiny",
    "own_data": "own_data/tiny",
}


@pytest.fixture
def copy(tmp_path):
    """Copies a golden scene, and returns (its folder, a function that loads the copy)."""

    def make(dataset, split="train"):
        folder = tmp_path / FOLDERS[dataset]
        shutil.copytree(SCENES / FOLDERS[dataset], folder)
        factor = 4 if dataset == "llff" else 1
        return folder, lambda **options: load_scene(
            dataset, tmp_path, folder.name, split, factor, progress=False, **options
        )

    return make


def refuses(load, message, file=""):
    with pytest.raises(SceneError, match=message) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    assert str(file) in text


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dataset", FOLDERS)
def test_missing_scene_lists_those_that_exist_and_where_data_goes(dataset):
    name = Path(FOLDERS[dataset]).name
    refuses(lambda: load_scene(dataset, SCENES, "nope", "train", 1), f"nope: .*scenes there: {name}.*data/README.md")


def test_missing_data_folder_says_where_data_goes(tmp_path):
    refuses(lambda: load_scene("syn", tmp_path / "void", "lego", "train", 1), "no scenes there yet.*data/README.md")
    refuses(lambda: scene_names("syn", tmp_path / "void"), "holds no scenes; data/README.md")


def test_unknown_format_names_the_option_and_the_choices(tmp_path):
    with pytest.raises(OptionError, match="--nerf_dataset blender: unknown; choose one of syn, nsvf"):
        load_scene("blender", tmp_path, "lego", "train", 1)


@pytest.mark.parametrize("factor", [0.5, 0.0, -1.0, float("nan"), float("inf"), 33.0])
def test_downsampling_below_one_or_to_nothing_is_refused(factor):
    with pytest.raises(OptionError, match="--downsample_train"):
        load_scene("syn", SCENES, "tiny", "train", factor, progress=False)


@pytest.mark.parametrize("box", [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, float("nan")]])
def test_a_malformed_scene_bbox_is_refused(box):
    with pytest.raises(OptionError, match="--scene_bbox"):
        load_scene("syn", SCENES, "tiny", "train", 1, scene_bbox=box, progress=False)


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("syn", "transforms_train.json"),
        ("own_data", "transforms_train.json"),
        ("nsvf", "bbox.txt"),
        ("nsvf", "intrinsics.txt"),
        ("tt", "intrinsics.txt"),
        ("llff", "poses_bounds.npy"),
    ],
)
def test_missing_metadata_is_named(copy, dataset, file):
    folder, load = copy(dataset)
    (folder / file).unlink()
    refuses(load, "file is missing.*data/README.md", folder / file)


@pytest.mark.parametrize("dataset", ["syn", "own_data"])
def test_missing_images_of_frames_are_listed(copy, dataset):
    folder, load = copy(dataset)
    (folder / "train" / "r_2.png").unlink()
    refuses(load, "1 missing: .*r_2.png; .*--skip_missing_frames")
    assert load(skip_missing_frames=True).n_images == 3


@pytest.mark.parametrize("dataset", ["nsvf", "tt"])
def test_images_and_poses_must_match(copy, dataset):
    folder, load = copy(dataset)
    next((folder / "pose").glob("0_*1.txt")).unlink()
    next((folder / "rgb").glob("0_*2.png")).unlink()
    refuses(load, "2 missing: pose of 0_0*1, image 0_0*2; .*--skip_missing_frames")
    assert load(skip_missing_frames=True).n_images == 2


@pytest.mark.parametrize("part", ["rgb", "pose"])
def test_a_missing_subfolder_is_named(copy, part):
    folder, load = copy("nsvf")
    shutil.rmtree(folder / part)
    refuses(load, "folder is missing", folder / part)


def test_a_split_without_images_says_which_prefix_it_looks_for(copy):
    folder, load = copy("tt", "test")
    for path in [*folder.glob("*/1_*"), *folder.glob("*/2_*")]:
        path.unlink()
    refuses(load, "no image for split 'test'; names must start with 2_ or 1_", folder)


def test_llff_without_an_images_folder_says_so(copy):
    folder, load = copy("llff")
    shutil.rmtree(folder / "images_4")
    refuses(load, "no images_4, images_8 or images folder", folder)


def first_image(folder):
    return min(path for path in folder.rglob("*.png") if path.name[:3] in ("r_0", "0_0", "ima"))


@pytest.mark.parametrize("dataset", ["syn", "nsvf", "own_data"])
def test_a_truncated_image_is_named(copy, dataset):
    folder, load = copy(dataset)
    path = first_image(folder)
    path.write_bytes(path.read_bytes()[:-200])
    refuses(load, "cannot be decoded, perhaps cut short", path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_file_that_is_no_image_is_named(copy, content):
    folder, load = copy("syn")
    (folder / "train" / "r_1.png").write_bytes(content)
    refuses(load, "no image that can be read", folder / "train" / "r_1.png")


@pytest.mark.parametrize("dataset", FOLDERS)
def test_images_of_two_sizes_are_refused_before_any_is_decoded(copy, dataset, monkeypatch):
    folder, load = copy(dataset)
    paths = sorted(path for path in folder.rglob("*.png") if "2" in path.stem and "test" not in str(path.parent.name))
    odd = next(path for path in paths if path.stem[-1] == "2")
    Image.new("RGB", (7, 5)).save(odd)
    monkeypatch.setattr(dataLoader.assemble, "decode_images", lambda *_: pytest.fail("decoded an image"))
    refuses(load, "is 7x5 but .* bring all images of the scene to one size", odd)


@pytest.mark.parametrize("dataset", ["syn", "own_data"])
def test_json_faults_name_the_file(copy, dataset):
    folder, load = copy(dataset)
    path = folder / "transforms_train.json"
    good = path.read_text()
    cases = {
        good[:-30]: "not valid JSON .line",
        "[]": "holds a list, expected an object",
        "{}": "'frames' is missing",
        '{"frames": []}': "'frames' is missing, empty",
        '{"frames": 3}': "'frames' is missing, empty or no list",
        '{"frames": [7]}': "frame 0 is no object",
        '{"frames": [{"file_path": 7}]}': "frame 0 lacks a text 'file_path'",
        '{"frames": [{"file_path": "a"}]}': "frame 'a' lacks 'transform_matrix'",
    }
    for text, message in cases.items():
        path.write_text(text)
        refuses(load, message, path)
    path.write_bytes(b"\xff\xfe\x00")
    refuses(load, "cannot be read as text", path)


@pytest.mark.parametrize(
    ("angle", "message"), [("wide", "finite number"), (0.0, "positive"), (4.0, "below pi"), (True, "finite number")]
)
def test_the_angle_of_view_must_be_one(copy, angle, message):
    folder, load = copy("syn")
    edit_json(folder / "transforms_train.json", lambda content: content.update(camera_angle_x=angle))
    refuses(load, f"'camera_angle_x' must be .*{message}|must be {message}", folder / "transforms_train.json")


def test_a_missing_angle_of_view_is_named(copy):
    folder, load = copy("syn")
    edit_json(folder / "transforms_train.json", lambda content: content.pop("camera_angle_x"))
    refuses(load, "'camera_angle_x' is missing", folder / "transforms_train.json")


BAD_POSES = {
    "holds NaN or inf": np.full((4, 4), np.nan).tolist(),
    "shape .3, 3., expected 4x4": np.eye(3).tolist(),
    "no 4x4 table of numbers": [[1, 2], [3]],
    "no rotation .determinant": np.zeros((4, 4)).tolist(),
    "not at right angles": [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
}


@pytest.mark.parametrize("message", BAD_POSES)
@pytest.mark.parametrize("dataset", ["syn", "own_data"])
def test_a_bad_pose_names_its_frame(copy, dataset, message):
    folder, load = copy(dataset)
    path = folder / "transforms_train.json"
    edit_json(path, lambda content: content["frames"][2].update(transform_matrix=BAD_POSES[message]))
    refuses(load, f"frame './train/r_2': .*{message}", path)


def test_a_uniform_scale_of_a_pose_is_taken_out(copy):
    folder, load = copy("syn")
    reference = load()
    matrix = json.loads((folder / "transforms_train.json").read_text())["frames"][0]["transform_matrix"]
    scaled = np.array(matrix) * [2.0, 2.0, 2.0, 1.0]
    edit_json(
        folder / "transforms_train.json",
        lambda content: content["frames"][0].update(transform_matrix=scaled.tolist()),
    )
    np.testing.assert_allclose(load().c2w.numpy(), reference.c2w.numpy(), atol=1e-6)


@pytest.mark.parametrize("dataset", ["nsvf", "tt"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0", "holds 3 numbers, expected at least 12"),
        (" ".join("1" * 13), "holds 13 numbers, expected a 4x4 pose"),
        (" ".join(["nan"] * 16), "holds NaN or inf"),
        (" ".join(["0"] * 16), "no rotation"),
        ("one two", "no number"),
    ],
)
def test_a_bad_pose_file_is_named(copy, dataset, text, message):
    folder, load = copy(dataset)
    path = next((folder / "pose").glob("0_*1.txt"))
    path.write_text(text)
    refuses(load, message, path)


@pytest.mark.parametrize("dataset", ["nsvf", "tt"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0 0 1 1", "holds 5 numbers, expected at least 6"),
        ("0 0 0 1 0 1 0.1", "box has no volume"),
        ("1 1 1 -1 -1 -1", "box has no volume"),
        ("0 0 0 1 1 nan", "NaN"),
    ],
)
def test_a_bad_bbox_is_named_and_scene_bbox_does_without_it(copy, dataset, text, message):
    folder, load = copy(dataset)
    (folder / "bbox.txt").write_text(text)
    refuses(load, message, folder / "bbox.txt")
    assert load(scene_bbox=[-1, -1, -1, 1, 1, 1]).aabb.tolist() == [[-1] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("dataset", "text", "message"),
    [
        ("nsvf", "0 400 400 0", "focal length is 0, must be positive"),
        ("nsvf", "", "holds 0 numbers"),
        ("tt", "-5 0 9 0 5 9 0 0 1", "focal length is -5, must be positive"),
        ("tt", "5 0 9 0 5 9 0 0 1 1", "expected a 3x3 or 4x4 matrix"),
    ],
)
def test_bad_intrinsics_are_named(copy, dataset, text, message):
    folder, load = copy(dataset)
    (folder / "intrinsics.txt").write_text(text)
    refuses(load, message, folder / "intrinsics.txt")


def spoil(row, column, value):
    def change(table):
        table[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:, :15], "has shape .10, 15., expected .images, 17."),
        (lambda table: table[0], "has shape .17,., expected"),
        (lambda table: table[:0], "has shape .0, 17., expected"),
        (spoil(3, 7, np.nan), "holds NaN"),
        (spoil(3, 15, 0.0), "near bound is not positive"),
        (spoil(3, 16, 0.5), "not below its far bound"),
        (spoil(0, 14, 0.0), "focal length is not positive"),
        (lambda table: table[:8], "holds 10 images but .*poses_bounds.npy has 8 poses"),
        (lambda table: table.astype(object), "no plain array of numbers"),
        (lambda table: table.astype(str), "something that is no number"),
    ],
)
def test_bad_poses_bounds_are_named(copy, change, message):
    folder, load = copy("llff")
    path = folder / "poses_bounds.npy"
    np.save(path, change(np.load(path)), allow_pickle=True)
    refuses(load, message, "poses_bounds.npy")


def test_poses_bounds_that_is_no_array_file_is_named(copy):
    folder, load = copy("llff")
    (folder / "poses_bounds.npy").write_bytes(b"\x93NUMPY")
    refuses(load, "no plain array of numbers", folder / "poses_bounds.npy")


def test_one_llff_view_leaves_nothing_to_train_on(copy):
    folder, load = copy("llff")
    np.save(folder / "poses_bounds.npy", np.load(folder / "poses_bounds.npy")[:1])
    for path in sorted((folder / "images_4").iterdir())[1:]:
        path.unlink()
    refuses(load, "none is left for training; at least 2", "poses_bounds.npy")
