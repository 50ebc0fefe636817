"""NeRF's synthetic scenes (nerf_synthetic/SCENE): transforms_{split}.json with OpenGL poses, RGBA images.

Also what the demo scene is written in, and the parsing of frames that own_data shares.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.types import Scene
from dataLoader.assemble import (
    OPENGL_TO_OPENCV,
    Cameras,
    LoadOptions,
    Volume,
    assemble_scene,
    choose_box,
    reduced_size,
)
from dataLoader.checks import (
    IMAGE_SUFFIXES,
    drop_or_refuse_missing,
    field_of_view,
    pose_matrix,
    read_frames,
    require_file,
)
from dataLoader.images import probe_images
from dataLoader.paths import circle_around
from utils.errors import SceneError

FOLDER, MARKERS = "nerf_synthetic", ("transforms_train.json",)
NEAR, FAR = 2.0, 6.0
BOX = np.array([[-1.5] * 3, [1.5] * 3])


def load(folder: Path, split: str, options: LoadOptions) -> Scene:
    """The scene in `folder`; focal = W/2 / tan(camera_angle_x / 2), principal point at the centre."""
    transforms = folder / f"transforms_{split}.json"
    content, frames = read_frames(transforms)
    if "camera_angle_x" not in content:
        raise SceneError(f"{transforms}: 'camera_angle_x' is missing; add the horizontal angle of view in radians")
    angle = field_of_view(content["camera_angle_x"], f"{transforms}: 'camera_angle_x'")
    box = choose_box(BOX, options)
    render_path = circle_around(training_poses(folder / "transforms_train.json"), box)
    poses = frame_poses(frames, transforms)
    paths, kept = frame_images(frames, folder, transforms, options.skip_missing_frames)
    info = probe_images(paths)
    focal = 0.5 * info.width / math.tan(0.5 * angle)
    intrinsics = np.tile([focal, focal, info.width / 2, info.height / 2], (len(paths), 1))
    cameras = Cameras(paths, poses[kept], intrinsics, info)
    size = reduced_size(info.width, info.height, options.downsample)
    return assemble_scene(folder, "syn", split, cameras, Volume(box, NEAR, FAR), render_path, size, options.progress)


def training_poses(transforms: Path) -> np.ndarray:
    """Poses [M, 3, 4] (OpenCV axes) of the training cameras; the video's circle is as wide as they stand."""
    _, frames = read_frames(require_file(transforms))
    return frame_poses(frames, transforms)


def frame_poses(frames: Sequence[dict], transforms: Path) -> np.ndarray:
    """c2w [M, 3, 4] with OpenCV axes from the frames' OpenGL matrices; SceneError names the frame at fault."""
    poses = [pose_matrix(f["transform_matrix"], f"{transforms}: frame '{f['file_path']}'") for f in frames]
    return np.stack(poses) * OPENGL_TO_OPENCV


def frame_images(
    frames: Sequence[dict], folder: Path, transforms: Path, skip_missing: bool
) -> tuple[list[Path], list[int]]:
    """The image files that exist and the indices of their frames; SceneError lists the missing ones unless skipped."""
    paths = [image_path(folder, frame["file_path"]) for frame in frames]
    kept = [index for index, path in enumerate(paths) if path.is_file()]
    missing = [path for path in paths if not path.is_file()]
    drop_or_refuse_missing(missing, f"{transforms}: images of {len(paths)} frames", skip_missing)
    if not kept:
        raise SceneError(f"{transforms}: none of its {len(paths)} images exists; put them beside it")
    return [paths[index] for index in kept], kept


def image_path(folder: Path, file_path: str) -> Path:
    """Where a frame's image lies: relative to the scene's folder, '.png' if the name has no image extension."""
    path = folder / file_path
    if path.suffix.lower() in IMAGE_SUFFIXES or path.is_file():
        return path
    return path.with_name(path.name + ".png")
