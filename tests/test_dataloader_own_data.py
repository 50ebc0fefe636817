"""own_data: what instant-ngp and nerfstudio write, and what photographs need."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataLoader import load_scene
from utils.errors import SceneError


def pose(i=0):
    matrix = np.eye(4)
    matrix[:3, 3] = [0.1 * i, 0.2, 3.0]
    return matrix.tolist()


def write(tmp_path, frames, shared, size=(8, 6), name="transforms.json"):
    """A scene whose frames are (file_path, extra keys); images are made unless the keys say missing."""
    folder = tmp_path / "own_data" / "mine"
    entries = []
    for i, (file_path, extra) in enumerate(frames):
        image = folder / (file_path if "." in Path(file_path).name else file_path + ".png")
        image.parent.mkdir(parents=True, exist_ok=True)
        if not extra.pop("missing", False):
            Image.fromarray(np.full((size[1], size[0], 3), 10 * i, np.uint8)).save(image)
        entries.append({"file_path": file_path, "transform_matrix": pose(i)} | extra)
    (folder / name).write_text(json.dumps(shared | {"frames": entries}))
    return tmp_path


def load(folder, split="train", downsample=1, **options):
    return load_scene("own_data", folder, "mine", split, downsample, progress=False, **options)


def numbered(count, suffix=".jpg"):
    return [(f"images/{i:04d}{suffix}", {}) for i in range(count)]


SHARED = {"fl_x": 10.0, "fl_y": 11.0, "cx": 4.1, "cy": 2.9, "w": 8, "h": 6}


def test_a_single_file_gives_every_8th_frame_in_path_order_to_the_test_split(tmp_path):
    frames = numbered(18)
    write(tmp_path, frames[::-1], SHARED | {"aabb_scale": 16, "k1": 0.0, "camera_model": "OPENCV"})
    test, train = load(tmp_path, "test"), load(tmp_path, "train")
    assert [Path(path).name for path in test.image_paths] == ["0000.jpg", "0008.jpg", "0016.jpg"]
    assert train.n_images == 15
    assert test.c2w[0, 0, 3].item() == pytest.approx(1.7)
    assert train.intrinsics[0].tolist() == pytest.approx([10.0, 11.0, 4.1, 2.9])


def test_opengl_poses_become_opencv_poses(tmp_path):
    write(tmp_path, numbered(3), SHARED)
    scene = load(tmp_path)
    torch.testing.assert_close(scene.c2w[0, :, :3], torch.diag(torch.tensor([1.0, -1.0, -1.0])))


def test_intrinsics_of_a_frame_win_over_the_shared_ones(tmp_path):
    frames = numbered(3)
    frames[2][1].update(fl_x=20.0, cx=3.0)
    write(tmp_path, frames, SHARED)
    scene = load(tmp_path)
    assert scene.intrinsics[0].tolist() == pytest.approx([10.0, 11.0, 4.1, 2.9])
    assert scene.intrinsics[1].tolist() == pytest.approx([20.0, 11.0, 3.0, 2.9])


def test_intrinsics_are_scaled_to_images_of_another_size_and_downsampled(tmp_path):
    write(tmp_path, numbered(3), {"fl_x": 40.0, "fl_y": 44.0, "cx": 16.4, "cy": 11.6, "w": 32, "h": 24})
    assert load(tmp_path).intrinsics[0].tolist() == pytest.approx([10.0, 11.0, 4.1, 2.9])
    assert load(tmp_path, downsample=2).intrinsics[0].tolist() == pytest.approx([5.0, 5.5, 2.05, 1.45])


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({"camera_angle_x": np.pi / 2}, [4.0, 4.0, 4.0, 3.0]),
        ({"camera_angle_x": np.pi / 2, "camera_angle_y": np.pi / 2}, [4.0, 3.0, 4.0, 3.0]),
        ({"fl_x": 9.0}, [9.0, 9.0, 4.0, 3.0]),
    ],
)
def test_angles_and_missing_keys_fall_back_to_a_centred_square_pixel_camera(tmp_path, shared, expected):
    write(tmp_path, numbered(3), shared)
    assert load(tmp_path).intrinsics[0].tolist() == pytest.approx(expected)


def test_a_path_without_extension_means_png_and_dots_in_names_are_kept(tmp_path):
    write(tmp_path, [("images/a", {}), ("images/b", {}), ("images/c.1.png", {})], SHARED)
    assert [Path(path).name for path in load(tmp_path).image_paths] == ["b.png", "c.1.png"]


def test_missing_images_are_listed_and_skipped_on_request(tmp_path):
    frames = numbered(12)
    for i in (1, 2, 3, 4, 5):
        frames[i][1]["missing"] = True
    write(tmp_path, frames, SHARED)
    with pytest.raises(SceneError, match=r"5 missing: .*0001.jpg.*0003.jpg and 2 more.*--skip_missing_frames"):
        load(tmp_path)
    scene = load(tmp_path, skip_missing_frames=True)
    assert [Path(path).name for path in scene.image_paths] == [f"{i:04d}.jpg" for i in (6, 7, 9, 10, 11)]
    assert scene.c2w[0, 0, 3].item() == pytest.approx(0.6)


def test_distortion_is_a_warning_that_names_the_remedy(tmp_path):
    write(tmp_path, numbered(3), SHARED | {"k1": 0.05, "p2": -0.001})
    with pytest.warns(UserWarning, match="colmap image_undistorter"):
        load(tmp_path)


@pytest.mark.parametrize("extra", [{"camera_model": "OPENCV_FISHEYE"}, {"is_fisheye": True}])
def test_other_lenses_are_refused(tmp_path, extra):
    write(tmp_path, numbered(3), SHARED | extra)
    with pytest.raises(SceneError, match=r"transforms.json: camera model .* is not supported"):
        load(tmp_path)


def test_images_of_another_shape_than_w_by_h_are_refused(tmp_path):
    write(tmp_path, numbered(3), SHARED | {"w": 6, "h": 8})
    with pytest.raises(SceneError, match="aspect ratios must agree"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fl_x": 0.0}, "'fl_x' must be positive"),
        ({"fl_x": "ten"}, "'fl_x' must be a finite number"),
        ({"fl_x": None}, "neither 'fl_x' nor 'camera_angle_x'"),
        ({"cx": float("nan")}, "'cx' must be a finite number"),
        ({"w": -8}, "'w' must be positive"),
    ],
)
def test_bad_intrinsics_name_file_frame_and_key(tmp_path, change, message):
    write(tmp_path, numbered(3), SHARED | change)
    with pytest.raises(SceneError, match=message) as caught:
        load(tmp_path)
    assert "transforms.json: frame 'images/0001.jpg'" in str(caught.value)


def test_a_single_frame_leaves_nothing_to_train_on(tmp_path):
    write(tmp_path, numbered(1), SHARED)
    for split in ("train", "test"):
        with pytest.raises(SceneError, match="none is left for training; at least 2"):
            load(tmp_path, split)


def test_a_folder_without_transforms_names_both_spellings(tmp_path):
    (tmp_path / "own_data" / "mine").mkdir(parents=True)
    with pytest.raises(SceneError, match=r"transforms_train.json and transforms_test.json nor transforms.json"):
        load(tmp_path)
