"""The generated scene: its geometry against a slow twin, its files, and every format written and read back."""

import json

import numpy as np
import pytest
import torch

import dataLoader.demo as demo
from components.cameras import image_rays
from dataLoader import ensure_demo_scene, load_scene, scene_folder, scene_names
from dataLoader.demo import hemisphere, square_intrinsics
from dataLoader.demo_render import render_ground_truth, trace_colours
from dataLoader.demo_scene import demo_solids
from dataLoader.demo_shapes import BOX, CYLINDER, normals, trace
from dataLoader.demo_write import forward_cameras, write_demo_as
from utils.errors import OptionError, SceneError

FORMATS = ("syn", "nsvf", "tt", "llff", "own_data", "own_data_single")


def random_rays(count, seed):
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1) * 4
    targets = torch.rand(count, 3, generator=generator) * 1.6 - 0.8
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1)


def distances(points):
    """Slow twin: signed distance [N, P] of points [N, 3] to every solid, from its definition."""
    solids = demo_solids()
    offset = points[:, None] - solids.a
    y = (offset * solids.u).sum(-1)
    across = (offset - y[..., None] * solids.u).norm(dim=-1)
    clamped = y.clamp_min(0.0).minimum(solids.length)
    rounded = (offset - clamped[..., None] * solids.u).norm(dim=-1) - solids.radius
    flat = torch.maximum(across - solids.radius, (y - 0.5 * solids.length).abs() - 0.5 * solids.length)
    boxes = ((solids.frame.to(offset) @ offset[..., None]).squeeze(-1).abs() - solids.half).amax(-1)
    return torch.where(solids.kind == BOX, boxes, torch.where(solids.kind == CYLINDER, flat, rounded))


def trace_one_by_one(origins, directions):
    found = [trace(demo_solids(), o[None], d[None]) for o, d in zip(origins, directions, strict=True)]
    return torch.cat([t for t, _ in found]), torch.cat([index for _, index in found])


@pytest.mark.parametrize("seed", [0, 1])
def test_first_hits_lie_on_the_surface_and_nothing_lies_before_them(seed):
    origins, directions = random_rays(300, seed)
    t, index = trace_one_by_one(origins, directions)
    hit = index >= 0
    assert 0.2 < hit.float().mean() < 1
    points = origins + t.nan_to_num(posinf=0.0)[:, None] * directions
    on_surface = distances(points[hit]).gather(1, index[hit, None])
    assert on_surface.abs().max() < 1e-4
    for share in torch.linspace(0.3, 0.999, 150):
        before = origins + (share * t.nan_to_num(posinf=8.0))[:, None] * directions
        assert distances(before).min() > -1e-4


def test_rays_that_are_traced_together_give_what_they_give_alone():
    rays = image_rays_of(hemisphere(5, 0.2)[3], 24)
    together, alone = trace(demo_solids(), *rays), trace_one_by_one(*rays)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=1e-5)
    assert (together[1] == alone[1]).float().mean() > 0.999


def image_rays_of(c2w, size):
    class Square:
        height = width = size
        ndc = False

    rays = image_rays(Square, c2w, square_intrinsics(size))
    return rays.origins, rays.directions


def test_normals_are_the_gradient_of_the_distance():
    origins, directions = random_rays(400, 2)
    t, index = trace_one_by_one(origins, directions)
    hit = index >= 0
    points = (origins + t.nan_to_num(posinf=0.0)[:, None] * directions)[hit].double().requires_grad_()
    distances(points).gather(1, index[hit, None]).sum().backward()
    agree = (normals(demo_solids(), points.detach().float(), index[hit]) * points.grad).sum(-1)
    # On an edge the distance has no gradient, so that a point in a hundred may differ.
    assert (agree > 0.999).float().mean() > 0.99


def test_all_solids_fit_into_the_box_and_between_near_and_far():
    solids = demo_solids()
    middle = 0.5 * (solids.a + solids.b)
    # A flat cylinder reaches beyond its axis' ends only sideways.
    sideways = torch.where((solids.kind == CYLINDER)[:, None], 1 - solids.u.square(), torch.ones(3)).sqrt()
    extent = torch.maximum(solids.a.abs(), solids.b.abs()) + solids.radius[:, None] * sideways
    assert extent[solids.kind != BOX].max() <= 1.2
    assert (middle[solids.kind == BOX].abs() + solids.bound[solids.kind == BOX, None]).max() <= 1.2


def test_alpha_is_straight_and_depth_is_infinite_exactly_where_the_pixels_centre_is_empty():
    rgba, depth = render_ground_truth(hemisphere(9, 0.0)[4], square_intrinsics(120), 120, 120)
    alpha = rgba[..., 3]
    assert rgba.min() >= 0
    assert rgba.max() <= 1
    assert (alpha[depth.isinf()] < 1).all()
    assert (alpha[depth.isfinite()] > 0).all()
    partly = (alpha > 0) & (alpha < 1)
    assert 0.01 < partly.float().mean() < 0.15
    # Straight colours on the rim are as bright as inside; colours times alpha would be darker by about a half.
    assert rgba[partly][:, :3].mean() > 0.7 * rgba[alpha == 1][:, :3].mean()
    assert depth[depth.isfinite()].min() > 2
    assert depth[depth.isfinite()].max() < 6


def test_antialiasing_of_edges_only_is_close_to_antialiasing_of_every_pixel(monkeypatch):
    camera = hemisphere(9, 0.0)[6], square_intrinsics(128), 128, 128
    quick, _ = render_ground_truth(*camera)
    monkeypatch.setattr("dataLoader.demo_render.MIN_ADAPTIVE_WIDTH", 1000)
    full, _ = render_ground_truth(*camera)
    mse = (quick[..., :3] * quick[..., 3:] - full[..., :3] * full[..., 3:]).square().mean()
    assert -10 * mse.log10() > 38


def written(tmp_path, dataset, resolution=32, n_train=6, n_test=2):
    name = dataset.removesuffix("_single")
    write_demo_as(dataset, scene_folder(name, tmp_path, "shapes_x"), resolution, n_train, n_test)
    factor = 4 if dataset == "llff" else 1
    return [load_scene(name, tmp_path, "shapes_x", split, factor, progress=False) for split in ("train", "test")]


@pytest.mark.parametrize("dataset", [name for name in FORMATS if name != "llff"])
def test_tracing_the_rays_of_a_written_scene_gives_its_pixels(tmp_path, dataset):
    for scene in written(tmp_path, dataset):
        assert scene.images.shape[-1] == 4
        for i in range(scene.n_images):
            rgba, depth = render_ground_truth(scene.c2w[i], scene.intrinsics[i], scene.width, scene.height)
            stored = scene.images[i].float() / 255
            error = (stored * stored[..., 3:] - rgba * rgba[..., 3:]).abs()
            assert error.mean() < 2e-3
            rays = image_rays(scene, scene.c2w[i], scene.intrinsics[i])
            along = trace_colours(rays.origins, rays.directions)[1].reshape(depth.shape)
            seen = depth.isfinite() & along.isfinite()
            assert seen.sum() > 0.1 * depth.numel()
            assert (along - depth)[seen].abs().median() < 1e-5
            assert scene.near < depth[seen].min()
            assert depth[seen].max() < scene.far
            points = rays.origins + along.reshape(-1, 1).nan_to_num(posinf=0.0) * rays.directions
            inside = (points >= scene.aabb[0]).all(-1) & (points <= scene.aabb[1]).all(-1)
            assert inside[seen.flatten()].all()


def test_a_written_forward_facing_scene_has_its_surfaces_on_the_pixels_ndc_rays(tmp_path):
    count = 9
    train, test = written(tmp_path, "llff", n_train=7, n_test=2)
    assert (train.n_images, test.n_images) == (7, 2)
    cameras = forward_cameras(count)
    intrinsics = train.intrinsics[0]
    loaded = {0: (test, 0), 8: (test, 1)} | {i: (train, i - 1) for i in range(1, 8)}
    # The loaded world is the written one moved, mirrored and scaled: found from the cameras' axes and positions.
    moved = torch.stack([scene.c2w[k] for scene, k in (loaded[i] for i in range(count))])
    rotation = moved[0, :, :3] @ cameras[0, :, :3].T
    spread = (moved[:, :, 3] - moved[0, :, 3]).norm(dim=-1).sum()
    scale = spread / (cameras[:, :, 3] - cameras[0, :, 3]).norm(dim=-1).sum()
    torch.testing.assert_close(rotation @ cameras[:, :, :3], moved[:, :, :3], rtol=0, atol=1e-4)
    for i in range(count):
        scene, k = loaded[i]
        rgba, depth = render_ground_truth(cameras[i], intrinsics, scene.width, scene.height)
        torch.testing.assert_close(scene.image_rgb(k), rgba[..., :3] * rgba[..., 3:], rtol=0, atol=0.01)
        in_camera = camera_points(depth, intrinsics)
        points = in_camera @ cameras[i, :, :3].T + cameras[i, :, 3]
        points = scale * (points - cameras[0, :, 3]) @ rotation.T + moved[0, :, 3]
        rays = image_rays(scene, scene.c2w[k], scene.intrinsics[k])
        seen = depth.isfinite().flatten()
        x, y, z = points[seen].unbind(-1)
        scale_x, scale_y = -2 * intrinsics[0] / scene.width, -2 * intrinsics[0] / scene.height
        warped = torch.stack([scale_x * x / z, scale_y * y / z, 1 + 2 / z], -1)  # near plane at 1
        t = (warped[:, 2] - rays.origins[seen, 2]) / rays.directions[seen, 2]
        expected = rays.origins[seen] + t[:, None] * rays.directions[seen]
        torch.testing.assert_close(warped, expected, rtol=0, atol=2e-3)
        assert t.min() > 0
        assert t.max() < 1


def camera_points(depth, intrinsics):
    row, column = torch.meshgrid(torch.arange(depth.shape[0]), torch.arange(depth.shape[1]), indexing="ij")
    xy = torch.stack([column, row], -1).reshape(-1, 2) + 0.5
    rays = torch.cat([(xy - intrinsics[2:]) / intrinsics[:2], torch.ones(len(xy), 1)], -1)
    rays = torch.nn.functional.normalize(rays, dim=-1)
    return rays * depth.reshape(-1, 1).nan_to_num(posinf=0.0)


def test_scene_is_generated_once_and_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "N_TRAIN", 3)
    monkeypatch.setattr(demo, "N_TEST", 2)
    one, two = (ensure_demo_scene(tmp_path / name, 16, progress=False) for name in "ab")
    assert one == tmp_path / "a" / "demo" / "shapes_16"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 7
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    monkeypatch.setattr(demo, "write_syn", lambda *_: pytest.fail("generated again"))
    assert ensure_demo_scene(tmp_path / "a", 16, progress=False) == one
    scene = load_scene("demo", tmp_path / "a", "shapes_16", "test", 1, progress=False)
    assert scene.images.shape == (2, 16, 16, 4)
    assert (scene.name, scene.near, scene.far, scene.white_background) == ("shapes_16", 2.0, 6.0, True)
    assert json.loads((one / "transforms_test.json").read_text())["camera_angle_x"] == pytest.approx(0.6911112)


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(folder, *_):
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_syn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_scene(tmp_path, 16, progress=False)
    assert list((tmp_path / "demo").iterdir()) == []


def test_shapes_means_the_default_resolution_and_other_names_are_refused(tmp_path):
    assert scene_folder("demo", tmp_path, "shapes") == tmp_path / "demo" / "shapes_200"
    assert scene_names("demo", tmp_path) == ["shapes_200"]
    with pytest.raises(OptionError, match="--nerf_scene lego: the demo has one scene"):
        load_scene("demo", tmp_path, "lego", "train", 1)
    with pytest.raises(OptionError, match="resolution must lie between"):
        load_scene("demo", tmp_path, "shapes_2", "train", 1)


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match=r"cannot be created .*--data_folder"):
        ensure_demo_scene(tmp_path / "file", 16, progress=False)


def test_training_and_test_cameras_differ_and_see_the_scene_from_radius_4():
    train, test = hemisphere(100, 0.0), hemisphere(25, 0.5)
    np.testing.assert_allclose(train[:, :, 3].norm(dim=-1), 4, rtol=1e-5)
    assert torch.cdist(train[:, :, 3], test[:, :, 3]).min() > 0.05
    assert train[:, 2, 3].min() < 0
    assert train[:, 2, 3].max() > 3.5
