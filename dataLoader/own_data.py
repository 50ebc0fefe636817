"""The user's own photographs (own_data/SCENE): transforms_{train,test}.json, or one transforms.json as instant-ngp
and nerfstudio write it, of which every 8th frame, in the order of the file paths, is for testing.

Intrinsics may be shared or per frame: fl_x, fl_y or camera_angle_x, camera_angle_y, and cx, cy, for images of
w x h pixels; they are scaled where the image files have another size. Poses have OpenGL axes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataLoader.assemble import Cameras, LoadOptions, SplitPlan, Volume, choose_box, reduced_size
from dataLoader.checks import WHERE_DATA_COMES_FROM, field_of_view, finite_number, positive_number, shown
from dataLoader.frames import Frame, frame_images, poses_of, read_frames
from dataLoader.images import ImageInfo, probe_images
from dataLoader.llff import split_indices
from dataLoader.paths import circle_around
from dataLoader.problems import Problems
from dataLoader.syn import BOX
from utils.errors import SceneError
from utils.files import is_regular

FOLDER, MARKERS = "own_data", ("transforms_train.json", "transforms.json")
NEAR, FAR = 0.1, 100.0
PERSPECTIVE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "RADIAL", "SIMPLE_RADIAL")
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")
CAMERA_KEYS = ("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy")
MAX_ASPECT_ERROR = 0.02


def read(folder: Path, split: str, options: LoadOptions, problems: Problems) -> SplitPlan | None:
    """A split of the scene in `folder`, from its two transforms files or its single one."""
    transforms, shared, frames, training = _read_split(folder, split, problems)
    if not frames or not training:
        return None
    problems.attempt("intrinsics", _check_camera_model, shared, frames, transforms, problems)
    box = problems.attempt("options", choose_box, BOX, options)
    paths, frames = frame_images(frames, folder, transforms, options.skip_missing_frames, problems)
    info = probe_images(paths, problems)
    size = info and problems.attempt("options", reduced_size, info.width, info.height, options.downsample)
    if info is None:
        return None
    intrinsics = _all_intrinsics(shared, frames, info, transforms, problems)
    if problems:
        return None
    cameras = Cameras(paths, poses_of(frames), intrinsics, info)
    path = circle_around(poses_of(training), box)
    return SplitPlan(folder, "own_data", split, cameras, Volume(box, NEAR, FAR), path, size)


def _read_split(folder: Path, split: str, problems: Problems) -> tuple[Path, dict, list[Frame], list[Frame]]:
    """(file, shared keys, the split's frames, the training frames)."""
    train, test, single = (folder / f"transforms{suffix}.json" for suffix in ("_train", "_test", ""))
    if is_regular(train) or is_regular(test):
        chosen = train if split == "train" else test
        shared, frames = read_frames(chosen, problems)
        return chosen, shared, frames, frames if split == "train" else read_frames(train, problems)[1]
    if not is_regular(single):
        problems.add(
            "files",
            f"{folder}: has neither transforms_train.json and transforms_test.json nor transforms.json; "
            f"{WHERE_DATA_COMES_FROM}",
        )
        return single, {}, [], []
    shared, frames = read_frames(single, problems)
    # Both tools write frames in any order; sorting makes the split the same for all of them.
    frames = sorted(frames, key=lambda frame: frame.file_path)
    splits = {name: problems.attempt("frames", split_indices, len(frames), name, single) for name in ("train", split)}
    chosen_frames, training = ([frames[i] for i in splits[name] or ()] for name in (split, "train"))
    return single, shared, chosen_frames, training


def _check_camera_model(shared: dict, frames: Sequence[Frame], transforms: Path, problems: Problems) -> None:
    """SceneError for a lens that is no perspective one; a note for distortion, which is not modelled."""
    cameras = (shared, *(frame.keys for frame in frames))
    for camera in cameras:
        model = camera.get("camera_model", "PINHOLE")
        if str(model).upper() not in PERSPECTIVE_MODELS or camera.get("is_fisheye"):
            name = "fisheye" if camera.get("is_fisheye") else model
            raise SceneError(
                f"{transforms}: camera model {shown(name)} is not supported; undistort the images to a pinhole camera "
                "first (colmap image_undistorter) and write the transforms again"
            )
    if any(camera.get(key) for camera in cameras for key in DISTORTION_KEYS):
        problems.note(
            f"{transforms}: has lens distortion ({', '.join(DISTORTION_KEYS)}), which is ignored; for sharp results "
            "undistort the images first with `colmap image_undistorter`"
        )


def _all_intrinsics(
    shared: dict, frames: Sequence[Frame], info: ImageInfo, transforms: Path, problems: Problems
) -> np.ndarray | None:
    """[M, 4]; None if any is faulty. What frames have in common is read, and its faults are told, once."""
    known, chosen = {}, []
    for frame in frames:
        keys = shared | frame.keys
        camera = {key: keys[key] for key in CAMERA_KEYS if key in keys}
        if repr(camera) not in known:
            known[repr(camera)] = problems.attempt("intrinsics", _intrinsics, camera, info, transforms, frame.file_path)
        chosen.append(known[repr(camera)])
    return None if any(numbers is None for numbers in chosen) else np.stack(chosen)


def _intrinsics(camera: dict, info: ImageInfo, transforms: Path, frame: str) -> np.ndarray:
    """(fx, fy, cx, cy) [4] in pixels of the image files, from one frame's keys (its own before the shared ones)."""
    where = f"{transforms}: frame {shown(frame)}:"
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
