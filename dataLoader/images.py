"""Image files -> one uint8 tensor: headers first, then decoding in parallel straight into its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import SceneError
from utils.parallel import in_threads

# What Pillow raises for damaged files, by format and by where the damage lies.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageInfo:
    """What all images of a set share: width and height in pixels, channels (4 if any of them has alpha)."""

    width: int
    height: int
    channels: int


def probe_images(paths: Sequence[Path]) -> ImageInfo:
    """Size and channels from the headers of `paths` (at least one), decoding nothing.

    SceneError for a file that is missing or no image, and for two sizes, naming the first two files that differ.
    """
    first_size, has_alpha = None, False
    for path in paths:
        size, alpha = _read_header(path)
        first_size = first_size or size
        if size != first_size:
            raise SceneError(
                f"{path}: is {size[0]}x{size[1]} but {paths[0]} is {first_size[0]}x{first_size[1]}; "
                "bring all images of the scene to one size"
            )
        has_alpha = has_alpha or alpha
    return ImageInfo(*first_size, channels=4 if has_alpha else 3)


def decode_images(
    paths: Sequence[Path], size: tuple[int, int], channels: int, progress: bool = False, label: str = "images"
) -> Tensor:
    """Pixels [M, H, W, channels] uint8 of `paths`, resized (LANCZOS) to size = (W, H) where it differs.

    Alpha is straight; images without it are opaque. Orientation tags are not applied, because poses refer to the
    stored pixels. SceneError for a file that cannot be decoded.
    """
    images = torch.empty(len(paths), size[1], size[0], channels, dtype=torch.uint8)
    decode = partial(_decode_into, images.numpy(), paths, size, "RGBA" if channels == 4 else "RGB")
    in_threads(decode, len(paths), label, "image", progress)
    return images


def _read_header(path: Path) -> tuple[tuple[int, int], bool]:
    try:
        with Image.open(path) as image:
            return image.size, _has_alpha(image)
    except FileNotFoundError as error:
        raise SceneError(f"{path}: image is missing; restore it from the data set") from error
    except DECODING_ERRORS as error:
        raise SceneError(f"{path}: is no image that can be read ({_one_line(error)}); restore the file") from error


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _decode_into(pixels: np.ndarray, paths: Sequence[Path], size: tuple[int, int], mode: str, index: int) -> None:
    try:
        with Image.open(paths[index]) as image:
            picture = _to_mode(image, mode)
    except DECODING_ERRORS as error:
        raise SceneError(
            f"{paths[index]}: image cannot be decoded, perhaps cut short ({_one_line(error)}); restore the file"
        ) from error
    if picture.size != size:
        # For RGBA, Pillow premultiplies before it resizes, so the colour of transparent pixels does not bleed in.
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    pixels[index] = np.asarray(picture)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip at 255 instead of scaling.
        grey = np.clip(np.rint(np.asarray(image, dtype=np.float64) / 257.0), 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point images are not supported; convert it to 8-bit PNG")
    elif image.mode != mode and _has_alpha(image):
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
