"""Pictures and videos: rounding to 8 bit, colours for depths and counts, files."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import RunFolderError
from utils.run_folder import naming_os_errors

# The mean absolute error that error maps show as bright.
BRIGHT_ERROR = 0.2
# Height of a line of text, pixels.
CAPTION = 20


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] as 8 bit, rounded and clipped (NaN becomes 0); uint8 passes unchanged."""
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    return (np.clip(np.nan_to_num(image, nan=0.0), 0.0, 1.0) * 255.0).round().astype(np.uint8)


def save_png(path: Path, image: np.ndarray) -> None:
    """Save a picture [H, W, 3] or [H, W], uint8 or float in [0, 1], and make its folder. Raises RunFolderError."""
    path = Path(path)
    with naming_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(image)).save(path)


def depth_range(depth: np.ndarray, opacity: np.ndarray, near: float, far: float) -> tuple[float, float]:
    """The 2nd and 98th percentile of the depth [H, W] of pixels that are more opaque than not, a tenth wider at
    either end and within [near, far]; (near, far) if there are none or they are all alike."""
    solid = depth[(opacity > 0.5) & np.isfinite(depth)]
    if solid.size == 0:
        return near, far
    low, high = np.percentile(solid, [2.0, 98.0])
    margin = 0.1 * (high - low)
    low, high = max(float(low - margin), near), min(float(high + margin), far)
    return (low, high) if high - low > 1e-6 * (far - near) else (near, far)


def depth_to_color(depth: np.ndarray, near: float, far: float, opacity: np.ndarray | None = None) -> np.ndarray:
    """Depth [H, W] as uint8 colours [H, W, 3] of the TURBO map, red at `near`, blue at `far` and beyond.

    opacity: [H, W] in [0, 1]; what is transparent fades to white.
    """
    nearness = (far - np.nan_to_num(depth, nan=far)) / max(far - near, 1e-12)
    color = _color_map(nearness, cv2.COLORMAP_TURBO)
    if opacity is None:
        return color
    weight = np.clip(opacity, 0.0, 1.0)[..., None]
    return to_uint8(weight * (color / 255.0) + (1.0 - weight))


def heat_map(counts: np.ndarray) -> np.ndarray:
    """Counts [H, W] >= 0 as uint8 colours [H, W, 3]: black for none, bright from the 99th percentile of the pixels
    that have any."""
    counts = np.asarray(counts, np.float64)
    positive = counts[counts > 0]
    brightest = np.percentile(positive, 99.0) if positive.size else 1.0
    return _color_map(counts / brightest, cv2.COLORMAP_INFERNO)


def error_map(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean |image - truth| over the channels of pictures [H, W, 3] (uint8, or float in [0, 1]) as uint8 colours:
    black for none, bright for BRIGHT_ERROR and more, whatever the picture, so that maps can be compared."""
    difference = to_uint8(image).astype(np.float64) - to_uint8(truth).astype(np.float64)
    return _color_map(np.abs(difference).mean(-1) / 255.0 / BRIGHT_ERROR, cv2.COLORMAP_INFERNO)


def side_by_side(images: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures [H, W_i, 3] of one height as one uint8 picture, left to right."""
    return np.concatenate([to_uint8(image) for image in images], axis=1)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """A picture [H, W, 3] under a line of text, as uint8 [H + CAPTION, W, 3]; text that is too long is cut."""
    strip = np.full((CAPTION, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (4, CAPTION - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, to_uint8(image)])


@contextmanager
def open_video(path: Path, fps: int) -> Iterator["VideoFile"]:
    """An mp4 (H.264) that takes one frame at a time. Raises RunFolderError if it cannot be written."""
    import imageio

    path = Path(path)
    with naming_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # ffmpeg runs as a process of its own and reports an unwritable file late and at length; ask first.
        path.open("wb").close()
    writer = imageio.get_writer(
        str(path), fps=fps, codec="libx264", quality=8, macro_block_size=1, ffmpeg_log_level="quiet"
    )
    try:
        yield VideoFile(path, writer)
    finally:
        writer.close()
    if path.stat().st_size == 0:
        path.unlink()
    elif not _is_whole_mp4(path):  # ffmpeg buffers, and nobody hears how it ended
        raise RunFolderError(f"cannot write {path} (ffmpeg did not finish it): free some space, or check ffmpeg")


def _is_whole_mp4(path: Path) -> bool:
    """Whether a file ends where its last box does, and has the one that is written at the end (ISO/IEC 14496-12)."""
    position, kinds, size = 0, [], path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8:
                return False
            kinds.append(head[4:8])
            position += length
    return position == size and b"moov" in kinds


class VideoFile:
    """A video being written, see `open_video`."""

    def __init__(self, path: Path, writer):
        self._path = path
        self._writer = writer

    def add(self, frame: np.ndarray) -> None:
        """Append a frame [H, W, 3], uint8 or float in [0, 1]; odd sizes repeat their last row or column, because
        H.264 stores colours at half resolution."""
        frame = to_uint8(frame)
        height, width = frame.shape[:2]
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            self._writer.append_data(frame)
        except (RuntimeError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RunFolderError(f"cannot write {self._path} ({reason}): check ffmpeg and the free space") from error


def save_video(path: Path, frames: Iterable[np.ndarray], fps: int = 30) -> None:
    """Save frames [H, W, 3] of one size, uint8 or float in [0, 1], as mp4. Raises RunFolderError."""
    with open_video(path, fps) as video:
        for frame in frames:
            video.add(frame)


def _color_map(values: np.ndarray, table: int) -> np.ndarray:
    """Values [H, W] in [0, 1] (clipped) through one of OpenCV's colour tables, as RGB."""
    return cv2.applyColorMap(to_uint8(values), table)[..., ::-1].copy()
