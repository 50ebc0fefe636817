import numpy as np
import pytest
from plyfile import PlyData

from utils.errors import RunFolderError, UserError
from utils.mesh import export_mesh

AABB = np.array([[-1.0, -2.0, 0.5], [2.0, 1.0, 2.5]])
SHAPE = (49, 43, 37)
CENTRE, RADIUS = np.array([0.6, -0.7, 1.4]), 0.7


def sphere():
    """RADIUS minus the distance to CENTRE, on the grid points."""
    axes = [np.linspace(AABB[0, i], AABB[1, i], SHAPE[i]) for i in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return RADIUS - np.linalg.norm(points - CENTRE, axis=-1)


def read(path):
    ply = PlyData.read(str(path))
    assert not ply.text
    vertices = np.stack([ply["vertex"][axis] for axis in "xyz"], -1).astype(np.float64)
    return vertices, np.stack(ply["face"]["vertex_indices"])


def test_an_off_centre_sphere_in_a_box_with_unequal_sides_comes_out_in_world_coordinates(tmp_path):
    export_mesh(tmp_path / "mesh.ply", sphere(), AABB, 0.0)
    vertices, _ = read(tmp_path / "mesh.ply")
    assert len(vertices) > 1000
    assert np.abs(np.linalg.norm(vertices - CENTRE, axis=-1) - RADIUS).max() < 3e-3
    assert np.allclose(vertices.max(0), CENTRE + RADIUS, atol=0.02)


def test_faces_look_outwards_and_enclose_the_volume_of_the_sphere(tmp_path):
    export_mesh(tmp_path / "mesh.ply", sphere(), AABB, 0.0)
    vertices, faces = read(tmp_path / "mesh.ply")
    a, b, c = (vertices[faces[:, i]] - CENTRE for i in range(3))
    normals = np.cross(b - a, c - a)
    solid = np.linalg.norm(normals, axis=-1) > 1e-8
    assert (np.einsum("ij,ij->i", normals, a + b + c)[solid] > 0).all()
    enclosed = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
    assert enclosed == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.01)


@pytest.mark.parametrize("level", [5.0, -9.0])
def test_a_level_that_nothing_crosses_is_told_with_the_range_of_the_volume(tmp_path, level):
    with pytest.raises(UserError, match=r"no surface .*runs from .* to 0\.6"):
        export_mesh(tmp_path / "mesh.ply", sphere(), AABB, level)
    assert not (tmp_path / "mesh.ply").exists()


def test_an_empty_volume_has_no_surface(tmp_path):
    with pytest.raises(UserError, match="no surface"):
        export_mesh(tmp_path / "mesh.ply", np.zeros((4, 4, 4)), AABB, 0.0)


def test_a_mesh_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"mesh\.ply"):
        export_mesh(tmp_path / "missing" / "mesh.ply", sphere(), AABB, 0.0)
