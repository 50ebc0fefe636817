"""Expansive supervision: anchors on the edges, sources for the rest, and a loss that expands the sources' error.

Letters: alpha share of anchors among pixels, t step, T steps of the run, c factor on the sources' error,
N_a, N_s anchors and sources of a step. Section 3 of arXiv:2409.08056 and its code; tests/golden/losses.npz.
"""

import numpy as np

from components.edges import bisect_edges, dilate, search_edges, thin_out

ALPHA = 0.25


def anchor_pixels(grey: np.ndarray, search: str, generator: np.random.Generator) -> np.ndarray:
    """Flat indices [N] int64, ascending, of an image's anchors: dilated edges, thinned out to alpha of the pixels.

    grey: [H, W] uint8. search: `reference` dilates what its search ended on, once, so that images whose fine edges
    are few have fewer anchors than alpha; `bisect` dilates as often as alpha needs, if there is an edge at all.
    """
    anchors = dilate(search_edges(grey, ALPHA) if search == "reference" else bisect_edges(grey, ALPHA))
    while search == "bisect" and anchors.mean() < ALPHA:
        thicker = dilate(anchors)
        if np.array_equal(thicker, anchors):  # blank, or against the border that OpenCV's rectangle grows towards
            break
        anchors = thicker
    return thin_out(np.flatnonzero(anchors), int(ALPHA * grey.size), generator)


def source_factor(step: int, n_iters: int) -> float:
    """c(t) = c0 + (1 - c0) t/T with c0 = (1 - alpha)/alpha: sources stand for all non-anchors at first."""
    first = (1 - ALPHA) / ALPHA
    return first + (1 - first) * min(step / n_iters, 1.0)


def group_weights(n_anchors: int, n_sources: int, lamda_a: float, lamda_s: float, c: float) -> tuple[float, float]:
    """(weight of an anchor, of a source) whose mean over all rays is lamda_a*MSE_anchor + lamda_s*c*MSE_source.

    A group without rays adds nothing.
    """
    n_rays = n_anchors + n_sources
    return lamda_a * n_rays / max(n_anchors, 1), lamda_s * c * n_rays / max(n_sources, 1)
