"""Forward-facing scenes (nerf_llff_data/SCENE): poses_bounds.npy and images_4 (or another images folder).

A row of poses_bounds.npy is a 3x5 matrix (columns: down, right, back, position, [height, width, focal]) and the
nearest and farthest depth that the camera sees.
"""

import re
import warnings
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
from dataLoader.checks import IMAGE_SUFFIXES, pose_matrix, require_file
from dataLoader.images import probe_images
from dataLoader.paths import spiral_path
from dataLoader.poses import recentre
from utils.errors import SceneError

FOLDER, MARKERS = "nerf_llff_data", ("poses_bounds.npy",)
NEAR, FAR, BOUND_FACTOR, TEST_EVERY = 0.0, 1.0, 0.75, 8
BOX = np.array([[-1.5, -1.67, -1.0], [1.5, 1.67, 1.0]])


def load(folder: Path, split: str, options: LoadOptions) -> Scene:
    """The scene in `folder`, recentred and scaled so that the nearest bound lies at 1/0.75; every 8th image is test."""
    table = _read_poses_bounds(folder / "poses_bounds.npy")
    poses = table[:, :15].reshape(-1, 3, 5)
    full_height, full_width, focal = poses[0, :, 4]
    size = reduced_size(full_width, full_height, options.downsample)
    paths = _choose_images(folder, full_width, size[0])
    if len(paths) != len(table):
        raise SceneError(
            f"{paths[0].parent}: holds {len(paths)} images but {folder / 'poses_bounds.npy'} has {len(table)} poses; "
            "keep exactly the images that the poses were made from"
        )
    c2w, bounds = _normalise(poses, table[:, 15:])
    chosen = split_indices(len(table), split, folder / "poses_bounds.npy")
    info = probe_images([paths[i] for i in chosen])
    if info.width <= size[0] or info.height <= size[1]:
        size = info.width, info.height
    x, y = info.width / full_width, info.height / full_height
    intrinsics = np.tile([focal * x, focal * y, info.width / 2, info.height / 2], (len(chosen), 1))
    cameras = Cameras([paths[i] for i in chosen], (c2w * OPENGL_TO_OPENCV)[chosen], intrinsics, info)
    volume = Volume(choose_box(BOX, options), NEAR, FAR, white_background=False, random_background=True, ndc=True)
    return assemble_scene(folder, "llff", split, cameras, volume, spiral_path(c2w, bounds), size, options.progress)


def split_indices(count: int, split: str, path: Path) -> list[int]:
    """Indices of a split where every 8th view (0, 8, ...) is for testing; SceneError if that leaves one empty."""
    if count < 2:
        raise SceneError(
            f"{path}: has {count} view, and every {TEST_EVERY}th (0, {TEST_EVERY}, ...) is for testing, so none is "
            "left for training; at least 2 are needed"
        )
    return [i for i in range(count) if (i % TEST_EVERY == 0) == (split == "test")]


def _read_poses_bounds(path: Path) -> np.ndarray:
    try:
        table = np.load(require_file(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SceneError(
            f"{path}: is no plain array of numbers ({' '.join(str(error).split())}); restore the file"
        ) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 17 or not len(table):
        raise SceneError(f"{path}: has shape {getattr(table, 'shape', '?')}, expected (images, 17); restore the file")
    if table.dtype.kind not in "fiu" or not np.isfinite(table).all():
        raise SceneError(f"{path}: holds NaN, inf or something that is no number; make the poses again")
    table = table.astype(np.float64)
    if (table[:, [4, 9, 14]] <= 0).any():
        raise SceneError(f"{path}: height, width or focal length is not positive; make the poses again")
    if (table[:, 15] <= 0).any() or (table[:, 16] <= table[:, 15]).any():
        raise SceneError(f"{path}: a near bound is not positive or not below its far bound; make the poses again")
    return table


def _normalise(poses: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recentred, scaled poses [M, 3, 4] (OpenGL axes) and bounds [M, 2] from poses [M, 3, 5] (down, right, back)."""
    opengl = np.concatenate([poses[..., 1:2], -poses[..., 0:1], poses[..., 2:4]], axis=-1)
    checked = np.stack([pose_matrix(pose, f"poses_bounds.npy: image {i}") for i, pose in enumerate(opengl)])
    scale = bounds.min() * BOUND_FACTOR
    c2w = recentre(checked)
    c2w[..., 3] /= scale
    return c2w, bounds / scale


def _choose_images(folder: Path, full_width: float, target_width: int) -> list[Path]:
    """The images of the folder (images, images_N) that is smallest but not below the target width.

    If all are smaller, the largest of them, with a warning: pixels are never invented by upsampling.
    """
    widths = {}
    for candidate in sorted(folder.iterdir()):
        if candidate.is_dir() and re.fullmatch(r"images(_\d+)?", candidate.name):
            files = sorted(path for path in candidate.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if files:
                widths[probe_images(files[:1]).width] = files
    if not widths:
        raise SceneError(f"{folder}: has no images_4, images_8 or images folder with images; restore one of them")
    large_enough = [width for width in widths if width >= target_width]
    if large_enough:
        return widths[min(large_enough)]
    largest = max(widths)
    warnings.warn(
        f"{widths[largest][0].parent}: images are only {largest} px wide (factor {full_width / largest:.3g} of the "
        f"full size), not {target_width}; they are used as they are",
        stacklevel=2,
    )
    return widths[largest]
