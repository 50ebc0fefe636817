"""Reading small text files of a data set, with errors that name the file and say what to do."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import OptionError, SceneError
from utils.files import MAX_TEXT_BYTES, is_regular, parse_json, read_bounded, reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
WHERE_DATA_COMES_FROM = "data/README.md says where the data sets come from and how their folders look"
MIN_DETERMINANT = 1e-6
ROTATION_TOLERANCE = 0.05
# World units: beyond, float32 rays have no digits left for a scene.
MAX_COORDINATE = 1e9
# A pose, a box or intrinsics.
MAX_NUMBERS_BYTES = 2**20


def first_few(names: Sequence[object], count: int = 3) -> str:
    """The first names of a long list, for a message of one line."""
    shown = ", ".join(str(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def shown(value: object) -> str:
    """A value from a file, for a message: not more than a few words of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def require_file(path: Path) -> Path:
    """`path` if it is a file, else SceneError."""
    if not is_regular(path):
        what = "is no regular file" if path.exists() else "file is missing"
        raise SceneError(f"{path}: {what}; {WHERE_DATA_COMES_FROM}")
    return path


def list_folder(folder: Path) -> list[Path]:
    """What lies in a folder, by name; SceneError if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SceneError(f"{folder}: cannot be read ({reason(error)}); check its permissions") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file of the data set; SceneError if it is missing, no text, or larger than `limit` bytes."""
    try:
        return read_bounded(require_file(path), limit).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SceneError(f"{path}: cannot be read as text ({reason(error)}); restore it from the data set") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; SceneError if it is missing, malformed or no object."""
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        line = f"line {error.lineno}: {error.msg}" if hasattr(error, "lineno") else reason(error)
        raise SceneError(f"{path}: not valid JSON ({line}); restore or correct the file") from error
    if not isinstance(content, dict):
        raise SceneError(
            f"{path}: holds a {type(content).__name__}, expected an object with 'frames'; correct the file"
        )
    return content


def finite_number(value: object, where: str) -> float:
    """`value` as a float if it is a finite number (no text, no truth value), else SceneError naming `where`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SceneError(f"{where} must be a finite number, got {shown(value)}; correct the file")
    return float(value)


def positive_number(value: object, where: str) -> float:
    """As `finite_number`, and above zero."""
    number = finite_number(value, where)
    if number <= 0:
        raise SceneError(f"{where} must be positive, got {number:g}; correct the file")
    return number


def field_of_view(value: object, where: str) -> float:
    """An angle of view in radians, between 0 and pi; SceneError otherwise."""
    angle = positive_number(value, where)
    if angle >= math.pi:
        raise SceneError(f"{where} must be below pi (it is in radians), got {angle:g}; correct the file")
    return angle


def read_numbers(path: Path, at_least: int) -> np.ndarray:
    """All numbers of a text file, [n] float64, n >= at_least; SceneError for other words, NaN or too few."""
    words = read_text(path, MAX_NUMBERS_BYTES).replace(",", " ").split()
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError as error:
        raise SceneError(
            f"{path}: holds something that is no number ({shown(str(error))}); restore the file"
        ) from error
    if len(numbers) < at_least:
        raise SceneError(f"{path}: holds {len(numbers)} numbers, expected at least {at_least}; restore the file")
    if not np.isfinite(numbers).all():
        raise SceneError(f"{path}: holds NaN or inf; restore the file")
    if len(numbers) and np.abs(numbers).max() > MAX_COORDINATE:
        raise SceneError(f"{path}: holds numbers beyond {MAX_COORDINATE:g}; restore the file")
    return numbers


def pose_matrix(values: object, where: str) -> np.ndarray:
    """A camera-to-world pose [3, 4] float64 from 3x4 or 4x4 numbers.

    A uniform scale of the axes is taken out, so that unit directions stay unit; SceneError, naming `where`, for a
    wrong shape, NaN, a singular or a skewed matrix.
    """
    try:
        matrix = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise SceneError(f"{where}: transform matrix is no 4x4 table of numbers; correct the pose") from error
    if matrix.shape not in ((4, 4), (3, 4)):
        raise SceneError(f"{where}: transform matrix has shape {matrix.shape}, expected 4x4; correct the pose")
    if not np.isfinite(matrix).all():
        raise SceneError(f"{where}: transform matrix holds NaN or inf; correct the pose or remove the frame")
    if np.abs(matrix).max() > MAX_COORDINATE:
        raise SceneError(f"{where}: transform matrix holds numbers beyond {MAX_COORDINATE:g}; correct the pose")
    pose = matrix[:3].copy()
    determinant = abs(np.linalg.det(pose[:, :3]))
    if determinant < MIN_DETERMINANT:
        raise SceneError(f"{where}: transform matrix is no rotation (determinant {determinant:.1e}); correct the pose")
    scale = determinant ** (1 / 3)
    if abs(scale - 1) > 1e-3:
        pose[:, :3] /= scale
    skew = np.abs(pose[:, :3].T @ pose[:, :3] - np.eye(3)).max()
    if skew > ROTATION_TOLERANCE:
        raise SceneError(f"{where}: axes of the transform matrix are not at right angles; correct the pose")
    return pose


def read_box(path: Path) -> np.ndarray:
    """The box [2, 3] of the first six numbers (min xyz, max xyz) of a bbox.txt; SceneError if it has no volume."""
    box = read_numbers(path, at_least=6)[:6].reshape(2, 3)
    if (box[1] <= box[0]).any():
        raise SceneError(f"{path}: box has no volume (min {box[0]}, max {box[1]}); write min xyz, then max xyz")
    return box


def option_box(numbers: Sequence[float]) -> np.ndarray:
    """The box [2, 3] of option --scene_bbox (min xyz, max xyz); OptionError if it is malformed."""
    box = np.array(numbers, dtype=np.float64)
    malformed = box.shape != (6,) or not np.isfinite(box).all() or (box[3:] <= box[:3]).any()
    if malformed or np.abs(box).max() > MAX_COORDINATE:
        raise OptionError(f"--scene_bbox {list(numbers)}: give six numbers, min x,y,z then a larger max x,y,z")
    return box.reshape(2, 3)


def missing_message(missing: Sequence[object], what: str) -> str:
    """That things are missing, which, and that option --skip_missing_frames does without them."""
    return f"{what}: {len(missing)} missing: {first_few(missing)}; add them, or pass --skip_missing_frames 1"
