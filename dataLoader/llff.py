"""Forward-facing scenes (nerf_llff_data/SCENE): poses_bounds.npy and images_4 (or another images folder).

A row of poses_bounds.npy is a 3x5 matrix (columns: down, right, back, position, [height, width, focal]) and the
nearest and farthest depth that the camera sees.
"""

import re
from pathlib import Path
from typing import IO

import numpy as np

from dataLoader.assemble import OPENGL_TO_OPENCV, Cameras, LoadOptions, SplitPlan, Volume, choose_box, reduced_size
from dataLoader.checks import IMAGE_SUFFIXES, MAX_COORDINATE, list_folder, pose_matrix, require_file
from dataLoader.images import probe_images, read_header
from dataLoader.paths import spiral_path
from dataLoader.poses import recentre
from dataLoader.problems import Problems
from utils.errors import SceneError
from utils.files import open_regular, reason

FOLDER, MARKERS = "nerf_llff_data", ("poses_bounds.npy",)
NEAR, FAR, BOUND_FACTOR, TEST_EVERY = 0.0, 1.0, 0.75, 8
BOX = np.array([[-1.5, -1.67, -1.0], [1.5, 1.67, 1.0]])
MAX_ASPECT_ERROR, MAX_VIEWS = 0.02, 100_000


def read(folder: Path, split: str, options: LoadOptions, problems: Problems) -> SplitPlan | None:
    """A split of the scene in `folder`, recentred and scaled so that the nearest bound lies at 1/0.75; every 8th image
    is test."""
    table = problems.attempt("poses", _read_poses_bounds, folder / "poses_bounds.npy")
    if table is None:
        return None
    poses = table[:, :15].reshape(-1, 3, 5)
    full_height, full_width, focal = poses[0, :, 4]
    box = problems.attempt("options", choose_box, BOX, options)
    size = problems.attempt("options", reduced_size, full_width, full_height, options.downsample)
    paths = size and problems.attempt("files", _choose_images, folder, full_width, size[0], problems)
    chosen = problems.attempt("poses", split_indices, len(table), split, folder / "poses_bounds.npy")
    opengl = _opengl(poses, problems)
    if paths and len(paths) != len(table):
        problems.add(
            "files",
            f"{paths[0].parent}: holds {len(paths)} images but {folder / 'poses_bounds.npy'} has {len(table)} poses; "
            "keep exactly the images that the poses were made from",
        )
    # If their number is wrong, all images there are: what else is wrong with them is told too.
    used = [paths[i] for i in chosen] if paths and chosen and len(paths) == len(table) else paths
    info = probe_images(used, problems) if used else None
    if info and abs(full_width / full_height * info.height / info.width - 1) > MAX_ASPECT_ERROR:
        problems.add(
            "intrinsics",
            f"{folder / 'poses_bounds.npy'}: is for images of {full_width:g}x{full_height:g} but those in "
            f"{paths[0].parent} are {info.width}x{info.height}; do not crop or turn them",
        )
    if problems:
        return None
    c2w, bounds = _normalise(opengl, table[:, 15:])
    if info.width <= size[0] or info.height <= size[1]:
        size = info.width, info.height
    x, y = info.width / full_width, info.height / full_height
    intrinsics = np.tile([focal * x, focal * y, info.width / 2, info.height / 2], (len(chosen), 1))
    cameras = Cameras([paths[i] for i in chosen], (c2w * OPENGL_TO_OPENCV)[chosen], intrinsics, info)
    volume = Volume(box, NEAR, FAR, white_background=False, random_background=True, ndc=True)
    return SplitPlan(folder, "llff", split, cameras, volume, spiral_path(c2w, bounds), size)


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
        with open_regular(require_file(path)) as file:
            shape, fortran, kind = _read_npy_header(file)
            # Before a byte is reserved for what the header says.
            if len(shape) != 2 or shape[1] != 17 or not 0 < shape[0] <= MAX_VIEWS:
                raise SceneError(f"{path}: has shape {shape}, expected (images, 17); restore the file")
            if kind.hasobject:
                raise ValueError("it holds objects")
            if kind.kind not in "fiu":
                raise SceneError(f"{path}: holds something that is no number; make the poses again")
            table = np.frombuffer(file.read(shape[0] * 17 * kind.itemsize), kind)
            table = table.reshape(shape, order="F" if fortran else "C")
    except (OSError, ValueError, EOFError) as error:
        raise SceneError(f"{path}: is no plain array of numbers ({reason(error)}); restore the file") from error
    table = table.astype(np.float64)
    if not np.isfinite(table).all() or np.abs(table).max() > MAX_COORDINATE:
        raise SceneError(f"{path}: holds NaN, inf or numbers beyond {MAX_COORDINATE:g}; make the poses again")
    if (table[:, [4, 9, 14]] <= 0).any():
        raise SceneError(f"{path}: height, width or focal length is not positive; make the poses again")
    if (table[:, 15] <= 0).any() or (table[:, 16] <= table[:, 15]).any():
        raise SceneError(f"{path}: a near bound is not positive or not below its far bound; make the poses again")
    return table


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is stored by columns, type) of a .npy file; ValueError for anything else."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except Exception as error:  # the header is Python's text, whose parser fails in many ways
        raise ValueError(f"its header is damaged: {reason(error)}") from error


def _opengl(poses: np.ndarray, problems: Problems) -> np.ndarray | None:
    """Poses [M, 3, 4] (OpenGL axes) from [M, 3, 5] (down, right, back); None if one of them is none."""
    opengl = np.concatenate([poses[..., 1:2], -poses[..., 0:1], poses[..., 2:4]], axis=-1)
    read = [
        problems.attempt("poses", pose_matrix, pose, f"poses_bounds.npy: image {i}") for i, pose in enumerate(opengl)
    ]
    return None if any(pose is None for pose in read) else np.stack(read)


def _normalise(opengl: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recentred, scaled poses [M, 3, 4] (OpenGL axes) and bounds [M, 2]."""
    scale = bounds.min() * BOUND_FACTOR
    c2w = recentre(opengl)
    c2w[..., 3] /= scale
    return c2w, bounds / scale


def _choose_images(folder: Path, full_width: float, target_width: int, problems: Problems) -> list[Path]:
    """The images of the folder (images, images_N) that is smallest but not below the target width.

    If all are smaller, the largest of them, with a note: pixels are never invented by upsampling.
    """
    widths = {}
    for candidate in list_folder(folder):
        if candidate.is_dir() and re.fullmatch(r"images(_\d+)?", candidate.name):
            files = [path for path in list_folder(candidate) if path.suffix.lower() in IMAGE_SUFFIXES]
            if files:
                widths[read_header(files[0])[0][0]] = files
    if not widths:
        raise SceneError(f"{folder}: has no images_4, images_8 or images folder with images; restore one of them")
    large_enough = [width for width in widths if width >= target_width]
    if large_enough:
        return widths[min(large_enough)]
    largest = max(widths)
    problems.note(
        f"{widths[largest][0].parent}: images are only {largest} px wide (factor {full_width / largest:.3g} of the "
        f"full size), not {target_width}; they are used as they are"
    )
    return widths[largest]
