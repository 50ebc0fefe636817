"""Image files -> one uint8 tensor: headers first, then decoding in parallel straight into its place."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataLoader.image_ends import missing_end
from dataLoader.problems import Problems
from utils.errors import SceneError
from utils.files import open_regular
from utils.parallel import in_threads

# The kinds of IMAGE_SUFFIXES and no others, whatever a file is called: some of Pillow's readers start programs.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# Pixel formats whose colours are clear; not floats, 32-bit integers, CMYK and LAB, which need more than a conversion.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B", "I;16L")
# More pixels than any camera's picture has.
MAX_PIXELS = 2**27
# What Pillow raises for damaged files, by format and by where the damage lies.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, ZeroDivisionError, MemoryError, NotImplementedError, RuntimeError, AssertionError),
    Image.DecompressionBombError,
)
# Else Python prints the log of a library that nobody set up.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class ImageInfo:
    """What all images of a set share: width and height in pixels, channels (4 if any of them has alpha)."""

    width: int
    height: int
    channels: int


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings about files are nothing to the user: what matters is checked here, and told in full."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def probe_images(paths: Sequence[Path], problems: Problems) -> ImageInfo | None:
    """Size and channels from the headers of `paths`, decoding nothing; None if there is not one good header.

    A file that is missing, no image, visibly cut short or of another size than most is a problem that names it.
    """
    headers = {path: problems.attempt("images", read_header, path) for path in dict.fromkeys(paths)}
    headers = {path: header for path, header in headers.items() if header is not None}
    if not headers:
        return None
    size = Counter(size for size, _ in headers.values()).most_common(1)[0][0]
    example = next(path for path, header in headers.items() if header[0] == size)
    for path, (other, _) in headers.items():
        if other != size:
            problems.add(
                "images",
                f"{path}: is {other[0]}x{other[1]} but {example} is {size[0]}x{size[1]}; "
                "bring all images of the scene to one size",
            )
    return ImageInfo(*size, channels=4 if any(alpha for _, alpha in headers.values()) else 3)


def read_header(path: Path) -> tuple[tuple[int, int], bool]:
    """((width, height), whether it has alpha) of an image file; SceneError if it cannot be one that is used here."""
    try:
        with open_regular(path) as file:
            with Image.open(file, formats=FORMATS) as image:
                fault = _fault(image)
                found = image.size, _has_alpha(image)
            fault = fault or missing_end(file, *found[0])
    except FileNotFoundError as error:
        raise SceneError(f"{path}: image is missing; restore it from the data set") from error
    except DECODING_ERRORS as error:
        raise SceneError(f"{path}: is no image that can be read ({_one_line(error)}); restore the file") from error
    if fault:
        raise SceneError(f"{path}: {fault}")
    return found


def decode_images(
    paths: Sequence[Path], size: tuple[int, int], channels: int, progress: bool = False, label: str = "images"
) -> Tensor:
    """Pixels [M, H, W, channels] uint8 of `paths`, resized (LANCZOS) to size = (W, H) where it differs.

    Alpha is straight; images without it are opaque. Orientation tags are not applied, because poses refer to the
    stored pixels. SceneError for a file that cannot be decoded.
    """
    images = torch.empty(len(paths), size[1], size[0], channels, dtype=torch.uint8)
    decode = partial(_decode_into, images.numpy(), paths, size, "RGBA" if channels == 4 else "RGB")
    with quiet_pillow():
        in_threads(decode, len(paths), label, "image", progress)
    return images


def _fault(image: Image.Image) -> str | None:
    """What keeps an image from being used, and the remedy; None for a good one."""
    if image.width * image.height > MAX_PIXELS:
        return f"says it has {image.width}x{image.height} pixels, more than any photograph; restore or shrink the file"
    if image.mode not in MODES:
        return f"holds {image.mode} pixels, which are not supported; convert it to 8-bit RGB or RGBA"
    if image.mode.startswith("I") and "transparency" in image.info:
        return "holds 16-bit grey with a transparent colour, which is not supported; convert it to RGBA"
    # Phones' MPO files hold a preview behind the photograph; the photograph is what is read.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "holds several pictures; save the one that belongs to the pose as a file of its own"
    return None


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _decode_into(pixels: np.ndarray, paths: Sequence[Path], size: tuple[int, int], mode: str, index: int) -> None:
    try:
        with open_regular(paths[index]) as file, Image.open(file, formats=FORMATS) as image:
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
    elif image.mode != mode and _has_alpha(image):
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
