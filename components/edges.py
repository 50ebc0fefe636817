"""Edges of images: what guides EGRA, expansive supervision and the rebirth of soft mining's walkers.

Letters: H rows, W columns, o Otsu's threshold, k factor on it, alpha the wanted share of edge pixels.

Otsu's threshold, Canny and the dilation are OpenCV's, so that the maps equal the reference's bit for bit (on x86 with
the pinned version); Sobel is kornia's. The maps and numbers are held to tests/golden/edges.npz.
"""

import cv2
import numpy as np
import torch
from kornia.filters import spatial_gradient
from torch import Tensor
from torch.nn.functional import pad

EGRA_THRESHOLDS = (30, 40)
# The reference's search: steps at most, how far from alpha is near enough, and how hard it pulls.
SEARCH_STEPS, SEARCH_TOLERANCE, SEARCH_GAIN = 100, 0.2, 15.0
# The largest gradient that Canny can see in 8-bit grey: |dx| + |dy|, each 4 * 255 at most.
LARGEST_GRADIENT = 2040
GREY = (0.2989, 0.587, 0.114)
# One 8-bit step of blue, the smallest change of grey there is, has a Sobel gradient of at least 0.114/255 = 4.5e-4.
SMALLEST_STEP = 1e-4
SMALLEST_MAGNITUDE, NO_DIVISION_BY_ZERO = 1e-5, 1e-7


def grey_8bit(image: np.ndarray) -> np.ndarray:
    """Grey [H, W] uint8 of an image [H, W, 3 or 4] uint8; RGBA is blended on white in float and truncated."""
    if image.shape[-1] == 4:
        values = image.astype(np.float32) / np.float32(255.0)
        rgb, alpha = values[..., :3], values[..., 3:]
        image = ((rgb * alpha + (1 - alpha)) * 255).astype(np.uint8)
    return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


def egra_edges(grey: np.ndarray) -> np.ndarray:
    """EGRA's edges [H, W] bool of grey [H, W] uint8: Canny with thresholds 30 and 40."""
    return cv2.Canny(grey, *EGRA_THRESHOLDS) > 0


def otsu_threshold(grey: np.ndarray) -> float:
    """Otsu's threshold of grey [H, W] uint8, 0 to 255."""
    return cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]


def search_edges(grey: np.ndarray, alpha: float) -> np.ndarray:
    """The reference's search for a Canny map [H, W] bool whose area is within 20 % of alpha.

    Canny(0.5 o, k o) from k = 1 on, k *= 1 + 15 (area - alpha). Fine edges are often too few whatever k is; then k
    runs to 0, or changes sign, and the map after 100 steps is what counts (section 3.2 of arXiv:2409.08056 and code).
    """
    otsu, k = otsu_threshold(grey), 1.0
    areas: dict[float, float] = {}
    for _ in range(SEARCH_STEPS):
        kind, edges = _kind_of_threshold(k * otsu), None
        if kind not in areas:
            edges = cv2.Canny(grey, 0.5 * otsu, k * otsu)
            areas[kind] = np.count_nonzero(edges) / edges.size
        area = areas[kind]
        if abs(area - alpha) <= SEARCH_TOLERANCE * alpha:
            break
        last, k = k, k * (1 + SEARCH_GAIN * (area - alpha))
    else:
        k = last
    return (cv2.Canny(grey, 0.5 * otsu, k * otsu) if edges is None else edges) > 0


def _kind_of_threshold(value: float) -> float:
    """Thresholds of one kind give one map: Canny compares whole gradients, 0..2040, with the threshold's floor.

    From 2^31 on the floor overflows, in the reference too, so those are a kind of their own.
    """
    if value >= 2**31:
        return np.inf
    return np.floor(np.clip(value, -1, LARGEST_GRADIENT + 1))


def bisect_edges(grey: np.ndarray, alpha: float) -> np.ndarray:
    """A Canny map [H, W] bool whose area comes as near to alpha as an upper threshold can bring it.

    The lower threshold is 0.5 o as in `search_edges`. A higher upper threshold never has more edges (below the lower
    one the two change roles, as in OpenCV), so bisection finds where the area crosses alpha; if even 0 has too few
    edges, that map is the nearest.
    """
    lower = 0.5 * otsu_threshold(grey)
    upper, beyond = 0, LARGEST_GRADIENT + 1
    enough, too_few = cv2.Canny(grey, lower, upper) > 0, np.zeros(grey.shape, dtype=bool)
    while beyond - upper > 1 and enough.mean() > alpha:
        middle = (upper + beyond) // 2
        edges = cv2.Canny(grey, lower, middle) > 0
        if edges.mean() > alpha:
            upper, enough = middle, edges
        else:
            beyond, too_few = middle, edges
    return min(enough, too_few, key=lambda edges: abs(edges.mean() - alpha))


def dilate(edges: np.ndarray) -> np.ndarray:
    """Edges [H, W] bool, thickened by a 2 x 2 rectangle."""
    return cv2.dilate(edges.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_RECT, (2, 2))) > 0


def thin_out(index: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """At most `most` of the indices [N], a random choice in ascending order."""
    if len(index) <= most:
        return index
    return np.sort(generator.choice(index, most, replace=False))


def sobel_magnitude(rgb: Tensor, zero_padding: bool = False) -> Tensor:
    """[N, H, W] length of the unnormalised 3 x 3 Sobel gradient of the grey of rgb [N, H, W, 3] in [0, 1].

    Borders are replicated; `zero_padding` is the reference's way, which makes the picture's border an edge.
    """
    red, green, blue = rgb.unbind(-1)
    grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]
    if zero_padding:
        gradient = spatial_gradient(pad(grey, (1, 1, 1, 1)), normalized=False)[..., 1:-1, 1:-1]
    else:
        gradient = spatial_gradient(grey, normalized=False)
    return torch.hypot(*gradient[:, 0].unbind(1))


def largest_magnitude(magnitude: Tensor) -> Tensor:
    """The maximum (scalar) of an image's magnitude [H, W]; infinite for a blank image, whose rounding is no edge."""
    largest = magnitude.max()
    return torch.where(largest < SMALLEST_STEP, torch.inf, largest)


def edge_density(magnitude: Tensor, largest: Tensor) -> Tensor:
    """Unnormalised probability of rebirth: magnitude [..., W] over `largest` (broadcast), within [1e-5, 1].

    largest: the maximum of the image; the reference takes that of the column, a quirk.
    """
    return (magnitude / (largest + NO_DIVISION_BY_ZERO)).clamp(SMALLEST_MAGNITUDE, 1.0)
