"""The pictures that a run leaves as numbers, views.npz, read back for figures."""

import zipfile
from pathlib import Path

import numpy as np

from utils.files import open_regular

# By name: dimensions of the array, and whether its elements are bytes. depth_limits are (near, far).
ARRAYS = {
    **{"rgb": (3, True), "truth": (3, True), "photo": (3, True)},
    **{"depth": (2, False), "opacity": (2, False), "draws": (2, False), "depth_limits": (1, False)},
}
MAX_BYTES = 2**30


def read_views(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a views.npz. ValueError or OSError if it is damaged, or no file of ours."""
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if sum(part.file_size for part in archive.infolist()) > MAX_BYTES:
                    raise ValueError("it unpacks to more than any picture needs")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                views = {name: arrays[name] for name in ARRAYS}
        except Exception as error:  # of zipfile, zlib and numpy, by where the damage lies
            raise ValueError(f"{type(error).__name__}: {error}") from error
    for name, (dimensions, bytes_) in ARRAYS.items():
        values = views[name]
        if values.ndim != dimensions or not values.size or (values.dtype == np.uint8) != bytes_:
            raise ValueError(f"{name} is of another kind")
        if not bytes_ and (values.dtype.kind not in "fiu" or not np.isfinite(values).all()):
            raise ValueError(f"{name} holds something else than numbers")
    if {views[name].shape[2] for name in ("rgb", "truth", "photo")} != {3} or views["depth_limits"].size != 2:
        raise ValueError("its pictures are none")
    if len({views[name].shape[:2] for name in ("rgb", "truth", "depth", "opacity")}) > 1:
        raise ValueError("its pictures differ in size")
    return views
