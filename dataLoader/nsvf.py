"""Scenes that NSVF published: Synthetic_NSVF/SCENE and TanksAndTemple/SCENE (format `tt`).

Both hold rgb/ and pose/ (4x4, OpenCV axes), file names that start with 0_ (train), 1_ (validation), 2_ (test),
bbox.txt and intrinsics.txt; they differ in the intrinsics, the box, near and far, and the video's path.
"""

from pathlib import Path

import numpy as np

from dataLoader.assemble import Cameras, LoadOptions, SplitPlan, Volume, reduced_size
from dataLoader.checks import (
    IMAGE_SUFFIXES,
    WHERE_DATA_COMES_FROM,
    list_folder,
    missing_message,
    option_box,
    pose_matrix,
    read_box,
    read_numbers,
)
from dataLoader.images import ImageInfo, probe_images
from dataLoader.paths import circle_path, orbit_path
from dataLoader.problems import Problems
from utils.errors import SceneError

NSVF_FOLDER, TT_FOLDER, MARKERS = "Synthetic_NSVF", "TanksAndTemple", ("bbox.txt", "pose")
NSVF_NEAR, NSVF_FAR, NSVF_FOCAL_WIDTH, NSVF_PATH_RADIUS = 0.5, 6.0, 800, 4.0
TT_NEAR, TT_FAR, TT_BOX_SCALE, TT_SIZE = 0.01, 6.0, 1.2, (1920, 1080)


def read_nsvf(folder: Path, split: str, options: LoadOptions, problems: Problems) -> SplitPlan | None:
    """Synthetic_NSVF: one focal length, given for images 800 px wide; principal point at the centre."""
    box = problems.attempt("files", _box, folder, 1.0, options)
    focal = problems.attempt("intrinsics", _read_focal, folder / "intrinsics.txt")
    paths, poses, info, size = _read_views(folder, split, options, problems)
    if problems:
        return None
    scaled = focal * info.width / NSVF_FOCAL_WIDTH
    intrinsics = np.array([scaled, scaled, info.width / 2, info.height / 2])
    cameras = Cameras(paths, poses, np.tile(intrinsics, (len(paths), 1)), info)
    return SplitPlan(
        folder, "nsvf", split, cameras, Volume(box, NSVF_NEAR, NSVF_FAR), circle_path(NSVF_PATH_RADIUS), size
    )


def read_tt(folder: Path, split: str, options: LoadOptions, problems: Problems) -> SplitPlan | None:
    """TanksAndTemple: intrinsics are a 3x3 or 4x4 matrix for 1920x1080, the box of bbox.txt is widened by 1.2."""
    box = problems.attempt("files", _box, folder, TT_BOX_SCALE, options)
    matrix = problems.attempt("intrinsics", _read_intrinsics_matrix, folder / "intrinsics.txt")
    paths, poses, info, size = _read_views(folder, split, options, problems)
    if problems:
        return None
    x, y = info.width / TT_SIZE[0], info.height / TT_SIZE[1]
    intrinsics = np.array([matrix[0, 0] * x, matrix[1, 1] * y, matrix[0, 2] * x, matrix[1, 2] * y])
    cameras = Cameras(paths, poses, np.tile(intrinsics, (len(paths), 1)), info)
    return SplitPlan(folder, "tt", split, cameras, Volume(box, TT_NEAR, TT_FAR), orbit_path(poses, box), size)


def _box(folder: Path, scale: float, options: LoadOptions) -> np.ndarray:
    """The box [2, 3]; with --scene_bbox the file need not exist."""
    if options.scene_bbox is not None:
        return option_box(options.scene_bbox)
    return read_box(folder / "bbox.txt") * scale


def _read_views(
    folder: Path, split: str, options: LoadOptions, problems: Problems
) -> tuple[list[Path], np.ndarray | None, ImageInfo | None, tuple[int, int] | None]:
    """(image files, poses [M, 3, 4], headers, size (W, H)) of a split, sorted by name."""
    images = problems.attempt("files", _files, folder / "rgb", IMAGE_SUFFIXES, problems)
    poses = problems.attempt("files", _files, folder / "pose", (".txt",), problems)
    stems = None if images is None or poses is None else _stems(folder, split, images, poses, options, problems)
    if not stems:
        return [], None, None, None
    read = [problems.attempt("poses", _read_pose, poses[stem]) for stem in stems]
    paths = [images[stem] for stem in stems]
    info = probe_images(paths, problems)
    size = info and problems.attempt("options", reduced_size, info.width, info.height, options.downsample)
    return paths, None if any(pose is None for pose in read) else np.stack(read), info, size


def _stems(folder: Path, split: str, images: dict, poses: dict, options: LoadOptions, problems: Problems) -> list[str]:
    """Names of the views of a split that have an image and a pose; one without the other is a problem."""
    prefixes = ("0_",) if split == "train" else ("2_", "1_")
    stems = set(images) | set(poses)
    chosen = next((found for p in prefixes if (found := sorted(s for s in stems if s.startswith(p)))), [])
    if not chosen:
        wanted = " or ".join(prefixes)
        problems.add("files", f"{folder / 'rgb'}: no image for split '{split}'; names must start with {wanted}")
        return []
    without = [f"pose of {s}" for s in chosen if s not in poses] + [f"image {s}" for s in chosen if s not in images]
    if without and not options.skip_missing_frames:
        problems.add("images", missing_message(without, f"{folder}: of {len(chosen)} {split} views"))
    kept = [stem for stem in chosen if stem in images and stem in poses]
    if not kept:
        problems.add("files", f"{folder}: no {split} view has both an image in rgb/ and a pose in pose/; restore them")
    return kept


def _files(folder: Path, suffixes: tuple[str, ...], problems: Problems) -> dict[str, Path]:
    """The files of a folder by their names without extension."""
    if not folder.is_dir():
        raise SceneError(f"{folder}: folder is missing; {WHERE_DATA_COMES_FROM}")
    files = {}
    for path in list_folder(folder):
        if path.suffix.lower() in suffixes and files.setdefault(path.stem, path) is not path:
            problems.add("files", f"{path}: there is {files[path.stem].name} too; keep one of them")
    return files


def _read_focal(path: Path) -> float:
    return _positive(read_numbers(path, at_least=1)[0], path)


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
