"""Camera paths for videos: the reference's numbers, and that every camera looks at the scene."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataLoader import load_scene
from dataLoader.paths import circle_path
from dataLoader.poses import look_at

GOLDEN = Path(__file__).parent / "golden"
FLIP = np.array([1.0, -1.0, -1.0, 1.0])


def load(dataset, name, split="test", **options):
    return load_scene(dataset, GOLDEN / "scenes", name, split, 4 if dataset == "llff" else 1, progress=False, **options)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("dataset", "name", "key", "flip"),
    [("nsvf", "Tiny", "nsvf", FLIP), ("tt", "Tiny", "tankstemple", 1.0), ("llff", "tiny", "llff", FLIP)],
)
def test_path_equals_the_references(dataset, name, key, flip, split):
    with np.load(GOLDEN / "scenes.npz") as golden:
        expected, length = golden[f"{key}/{split}/render_path"], int(golden[f"{key}/{split}/render_path_len"])
    path = load(dataset, name, split).render_path
    assert path.dtype == torch.float32
    assert path.shape == (length, 3, 4)
    np.testing.assert_allclose(path[:8].numpy(), expected[:, :3] * flip, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dataset", "name"), [("syn", "tiny"), ("nsvf", "Tiny"), ("tt", "Tiny"), ("own_data", "tiny")])
def test_every_camera_of_a_path_is_a_rotation_and_looks_at_the_centre(dataset, name):
    scene = load(dataset, name)
    axes, position = scene.render_path[..., :3], scene.render_path[..., 3]
    torch.testing.assert_close(axes.transpose(1, 2) @ axes, torch.eye(3).expand_as(axes), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(axes), torch.ones(len(axes)), rtol=0, atol=1e-5)
    towards = torch.nn.functional.normalize(scene.aabb.mean(0) - position, dim=-1)
    # The circle of nsvf is about the origin, not the box's centre, as in the reference.
    assert ((axes[..., 2] * towards).sum(-1) > 0.95).all()


def test_syn_circle_has_the_mean_radius_of_the_training_cameras_for_both_splits():
    train, test = load("syn", "tiny", "train"), load("syn", "tiny", "test")
    torch.testing.assert_close(train.render_path, test.render_path)
    radius = train.c2w[:, :, 3].norm(dim=-1).mean()
    torch.testing.assert_close(test.render_path[:, :, 3].norm(dim=-1), radius.expand(40))


def test_circle_follows_the_box_of_own_data():
    scene = load("own_data", "tiny", scene_bbox=[0, 0, 0, 1, 2, 3])
    middle = scene.render_path[:, :, 3].mean(0)
    torch.testing.assert_close(middle[:2], torch.tensor([0.5, 1.0]), rtol=0, atol=1e-4)


def test_circle_stands_upright_30_degrees_above_the_ground():
    path = circle_path(4.0)
    np.testing.assert_allclose(path[:, 2, 3], 2.0, atol=1e-9)
    np.testing.assert_allclose(path[:, 2, 0], 0.0, atol=1e-9)
    assert (path[:, 2, 1] < 0).all()


def test_look_at_puts_the_target_on_the_optical_axis_and_up_upwards():
    pose = look_at(np.array([1.0, -2.0, 0.5]), np.array([0.2, 0.3, 0.1]))
    in_camera = pose[:, :3].T @ (np.array([0.2, 0.3, 0.1]) - pose[:, 3])
    np.testing.assert_allclose(in_camera[:2], 0, atol=1e-12)
    assert in_camera[2] > 0
    assert pose[2, 1] < 0
    np.testing.assert_allclose(np.linalg.det(pose[:, :3]), 1)
