"""Camera paths for videos. All poses are [P, 3, 4], camera to world, OpenCV axes.

Letters: a, th angles in radians, r radius, C centre; x, y, z the camera's axes in the world, p its position.
"""

import numpy as np

from dataLoader.poses import average_pose, normalized

CIRCLE_POSES, CIRCLE_ELEVATION = 40, np.radians(-30.0)
ORBIT_POSES, ORBIT_RADIUS, ORBIT_HEIGHT = 200, 1.2, 0.2
SPIRAL_POSES, SPIRAL_TURNS = 120, 2
SPIRAL_PERCENTILE, SPIRAL_NEAR, SPIRAL_FAR, SPIRAL_FAR_SHARE = 90, 0.9, 5.0, 0.75


def circle_path(radius: float, centre: np.ndarray | None = None) -> np.ndarray:
    """A circle [40, 3, 4] 30 degrees above the xy plane that looks at `centre` (the origin by default).

    TensoRF's path for NSVF (radius 4 there), with the flip to OpenCV axes that it forgets.
    """
    flip = np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    cos, sin = np.cos(CIRCLE_ELEVATION), np.sin(CIRCLE_ELEVATION)
    tilt = np.array([[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]])
    poses = []
    for th in np.linspace(-np.pi, np.pi, CIRCLE_POSES + 1)[:-1]:
        turn = np.array([[np.cos(th), 0, -np.sin(th)], [0, 1, 0], [np.sin(th), 0, np.cos(th)]])
        axes = flip @ turn @ tilt
        position = axes @ np.array([0, 0, radius])
        poses.append(np.column_stack([axes * [1.0, -1.0, -1.0], position]))
    path = np.stack(poses)
    if centre is not None:
        path[:, :, 3] += centre
    return path


def circle_around(c2w: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The circle [40, 3, 4] around the centre of `box` [2, 3] at the mean distance of the cameras c2w [M, 3, 4]."""
    centre = box.mean(0)
    radius = np.linalg.norm(c2w[:, :, 3] - centre, axis=-1).mean()
    return circle_path(radius, centre)


def orbit_path(c2w: np.ndarray, box: np.ndarray) -> np.ndarray:
    """TensoRF's path for Tanks and Temples: a circle [200, 3, 4] around the centre of `box` [2, 3], upright as the
    mean y axis of the cameras c2w [M, 3, 4]."""
    centre = box.mean(0)
    radius = ORBIT_RADIUS * np.linalg.norm(box[1] - centre)
    up = c2w[:, :, 1].mean(0)
    poses = []
    for a in 2 * np.pi * np.arange(ORBIT_POSES) / ORBIT_POSES:
        position = np.array([radius * np.cos(a), -ORBIT_HEIGHT * up[1], radius * np.sin(a)])
        z = normalized(-position)
        x = normalized(np.cross(up, z))
        y = normalized(np.cross(z, x))
        poses.append(np.column_stack([x, y, z, position + centre]))
    return np.stack(poses)


def spiral_path(c2w: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """LLFF's spiral [120, 3, 4] before the mean camera, as in TensoRF.

    c2w [M, 3, 4]: recentred and scaled poses with OPENGL axes; bounds [M, 2]: near and far, scaled alike.
    The path is returned with OpenCV axes, like all others.
    """
    average = average_pose(c2w)
    up = normalized(c2w[:, :, 1].sum(0))
    near, far = bounds.min() * SPIRAL_NEAR, bounds.max() * SPIRAL_FAR
    focal = 1.0 / ((1.0 - SPIRAL_FAR_SHARE) / near + SPIRAL_FAR_SHARE / far)
    radii = np.percentile(np.abs(c2w[:, :, 3]), SPIRAL_PERCENTILE, axis=0)
    target = average @ np.array([0.0, 0.0, -focal, 1.0])
    poses = []
    for th in np.linspace(0, 2 * np.pi * SPIRAL_TURNS, SPIRAL_POSES + 1)[:-1]:
        offset = radii * np.array([np.cos(th), -np.sin(th), -np.sin(th / SPIRAL_TURNS)])
        position = average @ np.append(offset, 1.0)
        z = normalized(position - target)
        x = normalized(np.cross(up, z))
        y = normalized(np.cross(z, x))
        poses.append(np.column_stack([x, -y, -z, position]) * np.array([-1.0, 1.0, 1.0, 1.0]))
    return np.stack(poses)
