"""A surface of constant density as a triangle mesh file."""

from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement
from skimage.measure import marching_cubes

from utils.errors import UserError
from utils.run_folder import atomic_file


def export_mesh(path: Path, volume: np.ndarray, aabb: np.ndarray, level: float) -> None:
    """Write the surface volume = level as a binary .ply in world coordinates, faces counter-clockwise seen from
    outside (where the volume is lower).

    volume: [X, Y, Z] float (density or alpha); point i of an axis with N points lies at
    aabb[0] + i / (N - 1) * (aabb[1] - aabb[0]). aabb: [2, 3], world units. The surface is open where it meets the box.
    Raises UserError if no surface crosses the level, RunFolderError if the file cannot be written.
    """
    volume, aabb = np.asarray(volume, np.float32), np.asarray(aabb, np.float64)
    lowest, highest = float(volume.min()), float(volume.max())
    if not lowest < level < highest:
        raise UserError(
            f"no surface for {path}: the volume runs from {lowest:.4g} to {highest:.4g} and never crosses {level:.4g}; "
            "train longer, or check that the scene lies in the box (--scene_bbox)"
        )
    spacing = (aabb[1] - aabb[0]) / (np.array(volume.shape) - 1)
    # With skimage's default the faces of a dense object would look inwards.
    vertices, faces, _, _ = marching_cubes(volume, level, spacing=tuple(spacing), gradient_direction="ascent")
    _write_ply(Path(path), vertices + aabb[0], faces)


def _write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    points = np.empty(len(vertices), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
    for axis, name in enumerate("xyz"):
        points[name] = vertices[:, axis]
    triangles = np.empty(len(faces), dtype=[("vertex_indices", "<i4", (3,))])
    triangles["vertex_indices"] = faces
    elements = [PlyElement.describe(points, "vertex"), PlyElement.describe(triangles, "face")]
    with atomic_file(path) as file:
        PlyData(elements, byte_order="<").write(file)
