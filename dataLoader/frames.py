"""Frames of a transforms.json, as NeRF's synthetic scenes and the user's photographs have them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataLoader.assemble import OPENGL_TO_OPENCV
from dataLoader.checks import IMAGE_SUFFIXES, missing_message, pose_matrix, read_json, shown
from dataLoader.problems import Problems
from utils.files import is_regular


@dataclass(frozen=True)
class Frame:
    """A frame: the image's name as written, its pose [3, 4] (OpenCV axes), and all its keys."""

    file_path: str
    pose: np.ndarray
    keys: dict


def read_frames(path: Path, problems: Problems) -> tuple[dict, list[Frame]]:
    """(the object in a transforms file, its good frames); each bad one is a problem that names it."""
    content = problems.attempt("files", read_json, path)
    if content is None:
        return {}, []
    entries = content.get("frames")
    if not isinstance(entries, list) or not entries:
        problems.add("files", f"{path}: 'frames' is missing, empty or no list; write one entry an image")
        return content, []
    read = [_read_frame(entry, index, path, problems) for index, entry in enumerate(entries)]
    return content, [frame for frame in read if frame is not None]


def _read_frame(entry: object, index: int, path: Path, problems: Problems) -> Frame | None:
    if not isinstance(entry, dict):
        problems.add("frames", f"{path}: frame {index} is no object; give it 'file_path' and 'transform_matrix'")
    elif not isinstance(entry.get("file_path"), str):
        problems.add("frames", f"{path}: frame {index} lacks a text 'file_path'; name its image there")
    elif "transform_matrix" not in entry:
        problems.add("frames", f"{path}: frame {shown(entry['file_path'])} lacks 'transform_matrix'; add its 4x4 pose")
    else:
        where = f"{path}: frame {shown(entry['file_path'])}"
        pose = problems.attempt("poses", pose_matrix, entry["transform_matrix"], where)
        return None if pose is None else Frame(entry["file_path"], pose * OPENGL_TO_OPENCV, entry)
    return None


def frame_images(
    frames: Sequence[Frame], folder: Path, transforms: Path, skip_missing: bool, problems: Problems
) -> tuple[list[Path], list[Frame]]:
    """The image files that exist and their frames; the missing ones are a problem unless skipped, and so is an image
    that is there twice with two poses."""
    paths = [image_path(folder, frame.file_path) for frame in frames]
    missing = [path for path in paths if not is_regular(path)]
    if missing and not skip_missing:
        problems.add("images", missing_message(missing, f"{transforms}: images of {len(paths)} frames"))
    kept = {}
    for path, frame in zip(paths, frames, strict=True):
        if path in missing:
            continue
        first = kept.setdefault(path, frame)
        if first is not frame and not np.allclose(first.pose, frame.pose):
            problems.add("frames", f"{transforms}: {path} is there twice with different poses; keep the right one")
        elif first is not frame:
            problems.note(f"{transforms}: {path} is there twice; one is used")
    if not kept:
        problems.add("images", f"{transforms}: none of its {len(paths)} images exists; put them beside it")
    return list(kept), list(kept.values())


def image_path(folder: Path, file_path: str) -> Path:
    """Where a frame's image lies: relative to the scene's folder, '.png' if the name has no image extension."""
    path = folder / file_path
    if path.suffix.lower() in IMAGE_SUFFIXES or is_regular(path):
        return path
    return path.with_name(path.name + ".png") if path.name else path


def poses_of(frames: Sequence[Frame]) -> np.ndarray:
    """c2w [M, 3, 4] of M >= 1 frames."""
    return np.stack([frame.pose for frame in frames])
