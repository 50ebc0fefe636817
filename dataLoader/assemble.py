"""What every loader makes: a split whose headers and poses were read, and from it the Scene."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from components.types import Scene
from dataLoader.checks import option_box
from dataLoader.images import ImageInfo, decode_images
from utils.errors import OptionError

# From OpenGL's camera axes (x right, y up, z backward) to OpenCV's (x right, y down, z forward).
OPENGL_TO_OPENCV = np.array([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class LoadOptions:
    """What the user chose for loading: downsample >= 1; scene_bbox, six numbers or None; the switch."""

    downsample: float
    scene_bbox: Sequence[float] | None = None
    skip_missing_frames: bool = False


@dataclass(frozen=True)
class Cameras:
    """Cameras of one split: image files, c2w [M, 3, 4] (OpenCV axes), intrinsics [M, 4] in pixels of `info`'s size."""

    paths: Sequence[Path]
    c2w: np.ndarray
    intrinsics: np.ndarray
    info: ImageInfo


@dataclass(frozen=True)
class Volume:
    """How rays cross a scene: box [2, 3], near and far, and the background (see `components.types.Scene`)."""

    aabb: np.ndarray
    near: float
    far: float
    white_background: bool = True
    random_background: bool = False
    ndc: bool = False


@dataclass(frozen=True)
class SplitPlan:
    """A split before its pixels are decoded. render_path: [P, 3, 4] (OpenCV axes); size: (W, H) to decode at."""

    folder: Path
    dataset: str
    split: str
    cameras: Cameras
    volume: Volume
    render_path: np.ndarray
    size: tuple[int, int]

    @property
    def n_pixels(self) -> int:
        """Pixels of all images at the size they are decoded at."""
        return len(self.cameras.paths) * self.size[0] * self.size[1]

    @property
    def n_bytes(self) -> int:
        """What the decoded pixels take."""
        return self.n_pixels * self.cameras.info.channels

    def __str__(self) -> str:
        info = self.cameras.info
        shrunk = "" if self.size == (info.width, info.height) else f", used at {self.size[0]}x{self.size[1]}"
        kind = "RGBA" if info.channels == 4 else "RGB"
        return f"{self.split}: {len(self.cameras.paths)} images, {info.width}x{info.height} {kind}{shrunk}"


def choose_box(default: np.ndarray, options: LoadOptions) -> np.ndarray:
    """The scene's box [2, 3]: --scene_bbox if given, else the format's."""
    return default if options.scene_bbox is None else option_box(options.scene_bbox)


def reduced_size(width: int, height: int, downsample: float) -> tuple[int, int]:
    """(W, H) divided by `downsample` and rounded down; OptionError if it is below 1 or leaves no pixel."""
    if not (downsample >= 1 and downsample < float("inf")):
        raise OptionError(f"--downsample_train/--downsample_test {downsample:g}: must be a number >= 1")
    size = int(width / downsample), int(height / downsample)
    if min(size) < 1:
        raise OptionError(
            f"--downsample_train/--downsample_test {downsample:g}: leaves no pixel of {width}x{height}; choose less"
        )
    return size


def assemble_scene(plan: SplitPlan, progress: bool) -> Scene:
    """Decode the images at the plan's size and scale the intrinsics with them; everything else is checked before."""
    cameras, volume, size = plan.cameras, plan.volume, plan.size
    scale = np.array([size[0] / cameras.info.width, size[1] / cameras.info.height] * 2)
    label = f"{plan.folder.name}: {plan.split} images"
    return Scene(
        name=plan.folder.name,
        dataset=plan.dataset,
        split=plan.split,
        images=decode_images(cameras.paths, size, cameras.info.channels, progress, label),
        c2w=torch.from_numpy(cameras.c2w).float(),
        intrinsics=torch.from_numpy(cameras.intrinsics * scale).float(),
        aabb=torch.from_numpy(volume.aabb).float(),
        near=volume.near,
        far=volume.far,
        white_background=volume.white_background,
        random_background=volume.random_background,
        ndc=volume.ndc,
        image_paths=tuple(str(path) for path in cameras.paths),
        render_path=torch.from_numpy(plan.render_path).float(),
    )
