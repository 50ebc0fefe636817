"""NeRF's synthetic scenes (nerf_synthetic/SCENE): transforms_{split}.json with OpenGL poses, RGBA images.

Also what the demo scene is written in.
"""

import math
from pathlib import Path

import numpy as np

from dataLoader.assemble import Cameras, LoadOptions, SplitPlan, Volume, choose_box, reduced_size
from dataLoader.checks import field_of_view
from dataLoader.frames import frame_images, poses_of, read_frames
from dataLoader.images import probe_images
from dataLoader.paths import circle_around
from dataLoader.problems import Problems
from utils.errors import SceneError

FOLDER, MARKERS = "nerf_synthetic", ("transforms_train.json",)
NEAR, FAR = 2.0, 6.0
BOX = np.array([[-1.5] * 3, [1.5] * 3])


def read(folder: Path, split: str, options: LoadOptions, problems: Problems) -> SplitPlan | None:
    """A split of the scene in `folder`; focal = W/2 / tan(camera_angle_x / 2), principal point at the centre."""
    transforms, training_file = folder / f"transforms_{split}.json", folder / "transforms_train.json"
    content, frames = read_frames(transforms, problems)
    training = frames if split == "train" else read_frames(training_file, problems)[1]
    if not frames or not training:
        return None
    angle = problems.attempt("intrinsics", _angle, content, transforms)
    box = problems.attempt("options", choose_box, BOX, options)
    paths, frames = frame_images(frames, folder, transforms, options.skip_missing_frames, problems)
    info = probe_images(paths, problems)
    size = info and problems.attempt("options", reduced_size, info.width, info.height, options.downsample)
    if problems:
        return None
    focal = 0.5 * info.width / math.tan(0.5 * angle)
    intrinsics = np.tile([focal, focal, info.width / 2, info.height / 2], (len(paths), 1))
    cameras = Cameras(paths, poses_of(frames), intrinsics, info)
    # The video's circle is as wide as the training cameras stand.
    path = circle_around(poses_of(training), box)
    return SplitPlan(folder, "syn", split, cameras, Volume(box, NEAR, FAR), path, size)


def _angle(content: dict, transforms: Path) -> float:
    if "camera_angle_x" not in content:
        raise SceneError(f"{transforms}: 'camera_angle_x' is missing; add the horizontal angle of view in radians")
    return field_of_view(content["camera_angle_x"], f"{transforms}: 'camera_angle_x'")
