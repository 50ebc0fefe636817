"""Scenes that NSVF published: Synthetic_NSVF/SCENE and TanksAndTemple/SCENE (format `tt`).

Both hold rgb/ and pose/ (4x4, OpenCV axes), file names that start with 0_ (train), 1_ (validation), 2_ (test),
bbox.txt and intrinsics.txt; they differ in the intrinsics, the box, near and far, and the video's path.
"""

from pathlib import Path

import numpy as np

from components.types import Scene
from dataLoader.assemble import Cameras, LoadOptions, Volume, assemble_scene, reduced_size
from dataLoader.checks import (
    IMAGE_SUFFIXES,
    WHERE_DATA_COMES_FROM,
    drop_or_refuse_missing,
    option_box,
    pose_matrix,
    read_box,
    read_numbers,
)
from dataLoader.images import probe_images
from dataLoader.paths import circle_path, orbit_path
from utils.errors import SceneError

NSVF_FOLDER, TT_FOLDER, MARKERS = "Synthetic_NSVF", "TanksAndTemple", ("bbox.txt", "pose")
NSVF_NEAR, NSVF_FAR, NSVF_FOCAL_WIDTH, NSVF_PATH_RADIUS = 0.5, 6.0, 800, 4.0
TT_NEAR, TT_FAR, TT_BOX_SCALE, TT_SIZE = 0.01, 6.0, 1.2, (1920, 1080)


def load_nsvf(folder: Path, split: str, options: LoadOptions) -> Scene:
    """Synthetic_NSVF: one focal length, given for images 800 px wide; principal point at the centre."""
    box = _box(folder, 1.0, options)
    intrinsics_file = folder / "intrinsics.txt"
    focal = _positive(read_numbers(intrinsics_file, at_least=1)[0], intrinsics_file)
    paths, poses = _read_split(folder, split, options)
    info = probe_images(paths)
    scaled = focal * info.width / NSVF_FOCAL_WIDTH
    intrinsics = np.array([scaled, scaled, info.width / 2, info.height / 2])
    cameras = Cameras(paths, poses, np.tile(intrinsics, (len(paths), 1)), info)
    volume = Volume(box, NSVF_NEAR, NSVF_FAR)
    size = reduced_size(info.width, info.height, options.downsample)
    path = circle_path(NSVF_PATH_RADIUS)
    return assemble_scene(folder, "nsvf", split, cameras, volume, path, size, options.progress)


def load_tt(folder: Path, split: str, options: LoadOptions) -> Scene:
    """TanksAndTemple: intrinsics are a 3x3 or 4x4 matrix for 1920x1080, the box of bbox.txt is widened by 1.2."""
    box = _box(folder, TT_BOX_SCALE, options)
    matrix = _read_intrinsics_matrix(folder / "intrinsics.txt")
    paths, poses = _read_split(folder, split, options)
    info = probe_images(paths)
    x, y = info.width / TT_SIZE[0], info.height / TT_SIZE[1]
    intrinsics = np.array([matrix[0, 0] * x, matrix[1, 1] * y, matrix[0, 2] * x, matrix[1, 2] * y])
    cameras = Cameras(paths, poses, np.tile(intrinsics, (len(paths), 1)), info)
    volume = Volume(box, TT_NEAR, TT_FAR)
    size = reduced_size(info.width, info.height, options.downsample)
    path = orbit_path(poses, box)
    return assemble_scene(folder, "tt", split, cameras, volume, path, size, options.progress)


def _box(folder: Path, scale: float, options: LoadOptions) -> np.ndarray:
    """The box [2, 3]; with --scene_bbox the file need not exist."""
    if options.scene_bbox is not None:
        return option_box(options.scene_bbox)
    return read_box(folder / "bbox.txt") * scale


def _read_split(folder: Path, split: str, options: LoadOptions) -> tuple[list[Path], np.ndarray]:
    """Image files and poses [M, 3, 4] of a split, sorted by name; SceneError for one without the other."""
    images = {path.stem: path for path in _files(folder / "rgb", IMAGE_SUFFIXES)}
    poses = {path.stem: path for path in _files(folder / "pose", (".txt",))}
    stems = set(images) | set(poses)
    prefixes = ("0_",) if split == "train" else ("2_", "1_")
    chosen = next((found for p in prefixes if (found := sorted(s for s in stems if s.startswith(p)))), [])
    if not chosen:
        wanted = " or ".join(prefixes)
        raise SceneError(f"{folder / 'rgb'}: no image for split '{split}'; names must start with {wanted}")
    without = [f"pose of {s}" for s in chosen if s not in poses] + [f"image {s}" for s in chosen if s not in images]
    drop_or_refuse_missing(without, f"{folder}: of {len(chosen)} {split} views", options.skip_missing_frames)
    kept = [stem for stem in chosen if stem in images and stem in poses]
    if not kept:
        raise SceneError(f"{folder}: no {split} view has both an image in rgb/ and a pose in pose/; restore them")
    return [images[stem] for stem in kept], np.stack([_read_pose(poses[stem]) for stem in kept])


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise SceneError(f"{folder}: folder is missing; {WHERE_DATA_COMES_FROM}")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def _read_pose(path: Path) -> np.ndarray:
    numbers = read_numbers(path, at_least=12)
    if len(numbers) not in (12, 16):
        raise SceneError(f"{path}: holds {len(numbers)} numbers, expected a 4x4 pose; restore the file")
    return pose_matrix(numbers.reshape(-1, 4), str(path))


def _read_intrinsics_matrix(path: Path) -> np.ndarray:
    numbers = read_numbers(path, at_least=9)
    if len(numbers) not in (9, 16):
        raise SceneError(f"{path}: holds {len(numbers)} numbers, expected a 3x3 or 4x4 matrix; restore the file")
    matrix = numbers.reshape(3, 3) if len(numbers) == 9 else numbers.reshape(4, 4)
    _positive(matrix[0, 0], path)
    _positive(matrix[1, 1], path)
    return matrix


def _positive(focal: float, path: Path) -> float:
    if focal <= 0:
        raise SceneError(f"{path}: focal length is {focal:g}, must be positive; restore the file")
    return float(focal)
