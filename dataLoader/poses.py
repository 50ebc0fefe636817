"""Averaging and recentring of forward-facing poses, as LLFF's loaders do it."""

import numpy as np


def normalized(vector: np.ndarray) -> np.ndarray:
    """`vector` [..., 3] divided by its length."""
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def average_pose(c2w: np.ndarray) -> np.ndarray:
    """The mean camera [3, 4] of OpenGL poses c2w [M, 3, 4].

    Its x axis is the negative of the usual one (TensoRF's rule), so the frame is left-handed.
    """
    z = normalized(c2w[:, :, 2].mean(0))
    x = normalized(np.cross(z, c2w[:, :, 1].mean(0)))
    y = np.cross(x, z)
    return np.column_stack([x, y, z, c2w[:, :, 3].mean(0)])


def recentre(c2w: np.ndarray) -> np.ndarray:
    """Poses [M, 3, 4] seen from their mean camera. The world is mirrored in x, because that camera is left-handed."""
    average = np.vstack([average_pose(c2w), [0, 0, 0, 1]])
    bottom = np.tile(np.array([[[0.0, 0, 0, 1]]]), (len(c2w), 1, 1))
    return (np.linalg.inv(average) @ np.concatenate([c2w, bottom], axis=1))[:, :3]


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Camera [3, 4] (OpenCV axes) at `position` [3] that looks at `target` [3], with the world's z upwards."""
    z = normalized(target - position)
    x = normalized(np.cross(z, [0.0, 0.0, 1.0]))
    return np.column_stack([x, np.cross(z, x), z, position])
