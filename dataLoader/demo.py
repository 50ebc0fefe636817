"""The demo scene on disk: our own shapes, ray traced on first use, in the format of NeRF's synthetic scenes.

It needs no download, its true depth is known (`demo_render`), and it is the same on every machine.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataLoader.demo_render import render_ground_truth
from dataLoader.poses import look_at
from utils.errors import OptionError, SceneError

FOLDER, DEFAULT_RESOLUTION = "demo", 200
N_TRAIN, N_TEST = 100, 25
CAMERA_RADIUS, CAMERA_ANGLE_X = 4.0, 0.6911112070083618
LOWEST, HIGHEST = -0.08, 0.95  # sine of the cameras' elevation
MIN_RESOLUTION, MAX_RESOLUTION = 8, 4096
GOLDEN_ANGLE = math.pi * (3.0 - math.sqrt(5.0))


def scene_name(resolution: int) -> str:
    """The folder's name of the demo scene at `resolution` pixels a side."""
    return f"shapes_{resolution}"


def full_name(scene: str) -> str:
    """`shapes` means the default resolution; any other name stays."""
    return scene_name(DEFAULT_RESOLUTION) if scene == "shapes" else scene


def ensure_named_scene(data_folder: str | Path, scene: str, progress: bool = True) -> Path:
    """Make `shapes` or `shapes_R` if it is not there yet; OptionError for another name that is not on disk."""
    match = re.fullmatch(r"shapes_(\d+)", full_name(scene))
    if match is None:
        folder = Path(data_folder) / FOLDER / scene
        if scene and folder.is_dir():
            return folder
        raise OptionError(
            f"--nerf_scene {scene}: the demo has one scene; for images of R x R pixels give --demo --demo_resolution R"
        )
    return ensure_demo_scene(data_folder, int(match[1]), progress)


def ensure_demo_scene(data_folder: str | Path, resolution: int = DEFAULT_RESOLUTION, progress: bool = True) -> Path:
    """The demo scene's folder, data_folder/demo/shapes_{resolution}, generated if it is not there yet.

    It is written to a temporary folder and renamed at the end, so that an interrupted run leaves nothing half done.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise OptionError(
            f"--demo_resolution {resolution}: resolution must lie between {MIN_RESOLUTION} and {MAX_RESOLUTION}"
        )
    folder = Path(data_folder) / FOLDER / scene_name(resolution)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}_", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            write_syn(made, resolution, N_TRAIN, N_TEST, progress)
            _publish(made, folder)
    except OSError as error:
        raise SceneError(
            f"{folder}: cannot be created ({error.strerror}); choose a --data_folder with space that can be written"
        ) from error
    return folder


def write_syn(folder: Path, resolution: int, n_train: int, n_test: int, progress: bool = False) -> None:
    """Write the demo scene to `folder` as transforms_{train,test}.json and RGBA images."""
    intrinsics = square_intrinsics(resolution)
    for split, cameras in (("train", hemisphere(n_train, 0.0)), ("test", hemisphere(n_test, 0.5))):
        paths = [folder / split / f"r_{i}.png" for i in range(len(cameras))]
        frames = [(f"./{split}/r_{i}", pose) for i, pose in enumerate(cameras)]
        write_json(folder / f"transforms_{split}.json", {"camera_angle_x": CAMERA_ANGLE_X}, frames)
        render_files(paths, cameras, intrinsics, (resolution, resolution), progress=progress, label=f"demo {split}")


def square_intrinsics(resolution: int) -> Tensor:
    """(fx, fy, cx, cy) [4] of the demo's square images."""
    focal = 0.5 * resolution / math.tan(0.5 * CAMERA_ANGLE_X)
    return torch.tensor([focal, focal, resolution / 2, resolution / 2])


def hemisphere(count: int, phase: float) -> Tensor:
    """Cameras [count, 3, 4] (OpenCV axes) on a spiral over the upper hemisphere, some just below the horizon, that
    look at the origin; another phase (0 to 1) gives other cameras."""
    poses = []
    for i in range(count):
        sine = LOWEST + (HIGHEST - LOWEST) * (i + 0.25 + 0.5 * phase) / count
        cosine, angle = math.sqrt(1.0 - sine * sine), GOLDEN_ANGLE * i + 2.0 * phase
        position = CAMERA_RADIUS * np.array([cosine * math.cos(angle), cosine * math.sin(angle), sine])
        poses.append(look_at(position, np.zeros(3)))
    return torch.from_numpy(np.stack(poses)).float()


def write_json(path: Path, shared: dict, frames: Sequence[tuple[str, Tensor]], extras: Sequence[dict] = ()) -> None:
    """A transforms file: shared keys, and (file_path, c2w [3, 4] OpenCV) a frame, written with OpenGL axes; extras
    are further keys of each frame."""
    entries = []
    for i, (file_path, c2w) in enumerate(frames):
        opengl = (c2w.double() * torch.tensor([1.0, -1.0, -1.0, 1.0])).tolist()
        entry = {"file_path": file_path, "transform_matrix": [*opengl, [0.0, 0.0, 0.0, 1.0]]}
        entries.append(entry | (extras[i] if extras else {}))
    path.write_text(json.dumps(shared | {"frames": entries}, indent=1))


def render_files(
    paths: Sequence[Path],
    c2w: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    *,
    black: bool = False,
    progress: bool = False,
    label: str = "demo",
) -> list[Tensor]:
    """Render cameras c2w [M, 3, 4] with intrinsics [4] or [M, 4] at size (W, H) into PNG files (RGBA, or RGB on
    black); returns the depth [H, W] of each."""
    intrinsics = intrinsics.expand(len(c2w), 4)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)

    def render(i: int) -> Tensor:
        rgba, depth = render_ground_truth(c2w[i], intrinsics[i], *size)
        pixels = rgba[..., :3] * rgba[..., 3:] if black else rgba
        Image.fromarray((pixels * 255).round().byte().numpy()).save(paths[i], compress_level=4)
        return depth

    n_threads = torch.get_num_threads()
    # One view a thread: single operations on a few thousand rays are too short to be worth splitting.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            views = pool.map(render, range(len(paths)))
            return list(tqdm(views, total=len(paths), desc=label, unit="view", leave=False, disable=not progress))
    finally:
        torch.set_num_threads(n_threads)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process was quicker: its scene is the same, ours is not needed.
        if not folder.is_dir():
            raise
