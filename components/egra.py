"""EGRA: rays where the edges of the images are (Gai et al. 2023, "EGRA-NeRF", as in ES's code).

Letters: H, W rows and columns, E edge map, p weight of an edge pixel.

Within an image the probability of a pixel is proportional to E*p + (1 - p)*4096/640000. It takes only two values, so
drawing needs no array over pixels: with the edges' extra share one of the edge pixels, else any pixel.
"""

import numpy as np

EDGE_WEIGHT = 0.0025
BASE_WEIGHT = (1 - EDGE_WEIGHT) * 4096 / 640000
# Every edge pixel moves by one of these along the row-major index, so that rays fall beside the edge as well.
SHIFTS = (6, 7, 8, 9)


def egra_probability(edges: np.ndarray) -> np.ndarray:
    """[H, W] float64, sum 1, of edges [H, W] bool (already shifted)."""
    weight = edges * EDGE_WEIGHT + BASE_WEIGHT
    return weight / weight.sum()


def edge_share(n_edges, n_pixels):
    """The probability with which the edges' extra mass is drawn from, elementwise: n_edges of n_pixels are edges."""
    extra = EDGE_WEIGHT * n_edges
    return extra / (extra + BASE_WEIGHT * n_pixels)


def shift_edges(index: np.ndarray, n_pixels: int, generator: np.random.Generator) -> np.ndarray:
    """Flat indices [N'] (ascending, each once) of edges [N] of an image after moving each by U{6..9}, modulo H*W."""
    shifts = generator.integers(SHIFTS[0], SHIFTS[-1] + 1, len(index))
    moved = np.zeros(n_pixels, dtype=bool)
    moved[(index + shifts) % n_pixels] = True
    return np.flatnonzero(moved)
