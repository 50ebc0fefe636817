"""The user's own photographs (own_data/SCENE): transforms_{train,test}.json, or one transforms.json as instant-ngp
and nerfstudio write it, of which every 8th frame, in the order of the file paths, is for testing.

Intrinsics may be shared or per frame: fl_x, fl_y or camera_angle_x, camera_angle_y, and cx, cy, for images of
w x h pixels; they are scaled where the image files have another size. Poses have OpenGL axes.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.types import Scene
from dataLoader.assemble import Cameras, LoadOptions, Volume, assemble_scene, choose_box, reduced_size
from dataLoader.checks import WHERE_DATA_COMES_FROM, field_of_view, finite_number, positive_number, read_frames
from dataLoader.images import ImageInfo, probe_images
from dataLoader.llff import split_indices
from dataLoader.paths import circle_around
from dataLoader.syn import BOX, frame_images, frame_poses
from utils.errors import SceneError

FOLDER, MARKERS = "own_data", ("transforms_train.json", "transforms.json")
NEAR, FAR = 0.1, 100.0
PERSPECTIVE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "RADIAL", "SIMPLE_RADIAL")
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")
MAX_ASPECT_ERROR = 0.02


def load(folder: Path, split: str, options: LoadOptions) -> Scene:
    """The scene in `folder`, from its two transforms files or its single one."""
    transforms, shared, frames, training_frames, training_file = _read_split(folder, split)
    _check_camera_model(shared, frames, transforms)
    box = choose_box(BOX, options)
    poses = frame_poses(frames, transforms)
    render_path = circle_around(frame_poses(training_frames, training_file), box)
    paths, kept = frame_images(frames, folder, transforms, options.skip_missing_frames)
    info = probe_images(paths)
    intrinsics = np.stack([_intrinsics(shared | frames[i], info, transforms, frames[i]["file_path"]) for i in kept])
    cameras = Cameras(paths, poses[kept], intrinsics, info)
    size = reduced_size(info.width, info.height, options.downsample)
    return assemble_scene(
        folder, "own_data", split, cameras, Volume(box, NEAR, FAR), render_path, size, options.progress
    )


def _read_split(folder: Path, split: str) -> tuple[Path, dict, list[dict], list[dict], Path]:
    """(file, shared keys, the split's frames, the training frames, their file)."""
    train, test, single = (folder / f"transforms{suffix}.json" for suffix in ("_train", "_test", ""))
    if train.is_file() or test.is_file():
        chosen = train if split == "train" else test
        shared, frames = read_frames(chosen)
        return chosen, shared, frames, read_frames(train)[1], train
    if not single.is_file():
        raise SceneError(
            f"{folder}: has neither transforms_train.json and transforms_test.json nor transforms.json; "
            f"{WHERE_DATA_COMES_FROM}"
        )
    shared, frames = read_frames(single)
    # Both tools write frames in any order; sorting makes the split the same for all of them.
    frames = sorted(frames, key=lambda frame: frame["file_path"])
    training = [frames[i] for i in split_indices(len(frames), "train", single)]
    chosen_frames = [frames[i] for i in split_indices(len(frames), split, single)]
    return single, shared, chosen_frames, training, single


def _check_camera_model(shared: dict, frames: Sequence[dict], transforms: Path) -> None:
    """SceneError for a lens that is no perspective one; a warning for distortion, which is not modelled."""
    for camera in (shared, *frames):
        model = camera.get("camera_model", "PINHOLE")
        if str(model).upper() not in PERSPECTIVE_MODELS or camera.get("is_fisheye"):
            name = "fisheye" if camera.get("is_fisheye") else model
            raise SceneError(
                f"{transforms}: camera model '{name}' is not supported; undistort the images to a pinhole camera "
                "first (colmap image_undistorter) and write the transforms again"
            )
    if any(camera.get(key) for camera in (shared, *frames) for key in DISTORTION_KEYS):
        warnings.warn(
            f"{transforms}: has lens distortion ({', '.join(DISTORTION_KEYS)}), which is ignored; for sharp results "
            "undistort the images first with `colmap image_undistorter`",
            stacklevel=2,
        )


def _intrinsics(camera: dict, info: ImageInfo, transforms: Path, frame: str) -> np.ndarray:
    """(fx, fy, cx, cy) [4] in pixels of the image files, from one frame's keys (its own before the shared ones)."""
    where = f"{transforms}: frame '{frame}':"
    width = positive_number(camera.get("w", info.width), f"{where} 'w'")
    height = positive_number(camera.get("h", info.height), f"{where} 'h'")
    x, y = info.width / width, info.height / height
    if abs(x / y - 1) > MAX_ASPECT_ERROR:
        raise SceneError(
            f"{where} w x h is {width:g}x{height:g} but its image is {info.width}x{info.height}; "
            "the aspect ratios must agree, do not crop or turn the images"
        )
    fx = _focal(camera, "fl_x", "camera_angle_x", width, where)
    if fx is None:
        raise SceneError(f"{where} neither 'fl_x' nor 'camera_angle_x' is given; add one of them")
    fy = _focal(camera, "fl_y", "camera_angle_y", height, where) or fx
    cx = finite_number(camera.get("cx", width / 2), f"{where} 'cx'")
    cy = finite_number(camera.get("cy", height / 2), f"{where} 'cy'")
    return np.array([fx * x, fy * y, cx * x, cy * y])


def _focal(camera: dict, length_key: str, angle_key: str, extent: float, where: str) -> float | None:
    if camera.get(length_key) is not None:
        return positive_number(camera[length_key], f"{where} '{length_key}'")
    if camera.get(angle_key) is not None:
        return 0.5 * extent / math.tan(0.5 * field_of_view(camera[angle_key], f"{where} '{angle_key}'"))
    return None
