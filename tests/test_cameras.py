"""Pixels to rays: the reference's rays, derivatives in pixel position, and the colours under pixels."""

from dataclasses import replace

import pytest
import torch

from components.cameras import cast_rays, image_rays, pinhole_directions, rays_of, to_ndc
from components.pixel_sets import pixel_batch
from components.types import PixelBatch, Scene
from tests.helpers import golden

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0]))


def small_scene(seed=0, n_images=3, height=5, width=7, channels=3, **changes) -> Scene:
    """Random pictures from cameras at random places about 4 from the origin, which they look at."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.nn.functional.normalize(torch.randn(n_images, 3, generator=generator), dim=-1) * 4
    forward = -torch.nn.functional.normalize(position, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.randn(n_images, 3, generator=generator)))
    c2w = torch.stack([right, torch.linalg.cross(forward, right), forward, position], dim=-1)
    intrinsics = torch.tensor([1.1 * width, 1.2 * width, 0.5 * width, 0.45 * height])
    values = {
        "name": "small",
        "dataset": "syn",
        "split": "train",
        "images": torch.randint(0, 256, (n_images, height, width, channels), generator=generator, dtype=torch.uint8),
        "c2w": c2w,
        "intrinsics": intrinsics * (1 + 0.05 * torch.arange(n_images)[:, None]),
        "aabb": torch.tensor([[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]]),
        "near": 2.0,
        "far": 6.0,
        "white_background": True,
        "random_background": False,
        "ndc": False,
        "image_paths": tuple(f"{i}.png" for i in range(n_images)),
        "render_path": torch.zeros(0, 3, 4),
    }
    return Scene(**{**values, **changes})


def golden_scene(**changes) -> Scene:
    """A scene of one 20 x 30 picture, the size of the goldens."""
    return small_scene(n_images=1, height=20, width=30, **changes)


def test_rays_through_pixel_centres_equal_the_reference():
    arrays = golden("cameras")
    height, width, focal = arrays["hwf"].tolist()
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    rays = image_rays(golden_scene(), arrays["c2w"], intrinsics)
    torch.testing.assert_close(rays.origins, arrays["opencv_normalized"][:, :3], **TOLERANCE)
    torch.testing.assert_close(rays.directions, arrays["opencv_normalized"][:, 3:], **TOLERANCE)


def test_rays_with_a_principal_point_and_two_focal_lengths_equal_the_reference():
    arrays = golden("cameras")
    rays = image_rays(golden_scene(), arrays["c2w"], torch.tensor([37.5, 41.25, 14.2, 9.1]))
    expected = arrays["opencv_center_14.2_9.1_fy_41.25"]
    torch.testing.assert_close(rays.origins, expected[:, :3], **TOLERANCE)
    torch.testing.assert_close(rays.directions, expected[:, 3:], **TOLERANCE)


def test_ndc_rays_equal_the_reference():
    arrays = golden("cameras")
    c2w = arrays["c2w_ndc"].clone()
    c2w[:, :3] = c2w[:, :3] @ OPENGL_TO_OPENCV  # the golden pose has OpenGL's camera axes
    rays = image_rays(golden_scene(ndc=True), c2w, torch.tensor([37.5, 37.5, 15.0, 10.0]))
    torch.testing.assert_close(rays.origins, arrays["opengl_ndc"][:, :3], **TOLERANCE)
    torch.testing.assert_close(rays.directions, arrays["opengl_ndc"][:, 3:], **TOLERANCE)


def test_the_ndc_warp_maps_the_near_plane_to_minus_one_and_infinity_to_one():
    generator = torch.Generator().manual_seed(0)
    origins = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 0.2
    directions = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 0.3
    directions[:, 2] = -1.0
    rays = to_ndc(origins, directions, 30, 20, torch.tensor(37.5, dtype=torch.float64), 1.0)
    minus_one = torch.full((50,), -1.0, dtype=torch.float64)
    torch.testing.assert_close(rays.origins[:, 2], minus_one)
    torch.testing.assert_close((rays.origins + rays.directions)[:, 2], -minus_one)
    # A point of the ray lies on the warped ray: project it by hand.
    world = origins + 7.3 * directions
    warped = torch.stack([-37.5 / 15 * world[:, 0] / world[:, 2], -37.5 / 10 * world[:, 1] / world[:, 2]], -1)
    warped = torch.cat([warped, 1 + 2 / world[:, 2:]], -1)
    t = (warped - rays.origins)[:, 2:] / rays.directions[:, 2:]
    torch.testing.assert_close(rays.origins + t * rays.directions, warped)


def test_the_ndc_warp_takes_the_x_focal_length_on_both_axes():
    c2w = torch.cat([OPENGL_TO_OPENCV, torch.zeros(3, 1)], dim=1)
    xy, intrinsics = torch.tensor([[20.0, 14.0]]), torch.tensor([40.0, 50.0, 15.0, 10.0])
    rays = rays_of(xy, c2w, intrinsics, 30, 20, ndc=True)
    # At depth 1 the ray passes 5/40 right of and 4/50 below the axis.
    expected = [40 / 15 * 5 / 40, -40 / 10 * 4 / 50, -1.0]
    assert rays.origins[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ndc", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_derivatives_in_pixel_position_match_finite_differences(ndc, seed):
    generator = torch.Generator().manual_seed(seed)
    c2w = golden("cameras")["c2w_ndc" if ndc else "c2w"].double().clone()
    if ndc:
        c2w[:, :3] = c2w[:, :3] @ OPENGL_TO_OPENCV.double()
    intrinsics = torch.tensor([37.5, 41.25, 14.2, 9.1], dtype=torch.float64)
    xy = torch.rand(4, 2, generator=generator, dtype=torch.float64) * torch.tensor([30.0, 20.0])

    def run(xy):
        rays = rays_of(xy, c2w, intrinsics, 30, 20, ndc)
        return rays.origins, rays.directions

    assert torch.autograd.gradcheck(run, xy.requires_grad_())


@pytest.mark.parametrize("seed", range(3))
def test_pinhole_rays_have_unit_length_start_at_the_camera_and_project_back_to_their_pixels(seed):
    scene = small_scene(seed)
    image = torch.tensor([0, 1, 2, 1])
    xy = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([7.0, 5.0])
    rays = cast_rays(scene, PixelBatch(image, xy))
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(4))
    assert torch.equal(rays.origins, scene.c2w[image, :, 3])
    in_camera = (scene.c2w[image, :, :3].transpose(1, 2) @ rays.directions[..., None])[..., 0]
    assert (in_camera[:, 2] > 0).all()
    fx_fy, centre = scene.intrinsics[image].split(2, dim=-1)
    torch.testing.assert_close(in_camera[:, :2] / in_camera[:, 2:] * fx_fy + centre, xy, rtol=1e-4, atol=1e-4)


def test_x_points_right_and_y_down():
    directions = pinhole_directions(torch.tensor([[20.0, 5.0], [10.0, 9.0]]), torch.tensor([10.0, 8.0, 10.0, 5.0]))
    assert directions.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.5, 1.0]]


@pytest.mark.parametrize("ndc", [False, True])
def test_image_rays_are_the_rays_of_all_pixels_row_by_row(ndc):
    scene = small_scene(ndc=ndc)
    every = pixel_batch(torch.arange(scene.n_pixels), scene.height, scene.width)
    cast = cast_rays(scene, every)
    for i in range(scene.n_images):
        rays = image_rays(scene, scene.c2w[i], scene.intrinsics[i])
        part = cast[every.image_id == i]
        torch.testing.assert_close(rays.origins, part.origins, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rays.directions, part.directions, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("white", [True, False])
def test_colours_are_blended_on_the_background(channels, white):
    scene = small_scene(channels=channels, white_background=white)
    every = pixel_batch(torch.arange(scene.n_pixels), scene.height, scene.width)
    colours = scene.colors(every)
    assert (colours.shape, colours.dtype) == ((scene.n_pixels, 3), torch.float32)
    for index, value in enumerate(scene.images.reshape(-1, channels).tolist()):
        alpha = value[3] / 255 if channels == 4 else 1.0
        expected = [v / 255 * alpha + (1 - alpha) * white for v in value[:3]]
        assert colours[index].tolist() == pytest.approx(expected, abs=1e-6)
    whole = torch.stack([scene.image_rgb(i) for i in range(scene.n_images)])
    assert torch.equal(whole.reshape(-1, 3), colours)


def test_colours_are_those_of_the_pixel_under_a_position_and_of_the_nearest_one_beyond_the_border():
    scene = small_scene()
    xy = torch.tensor([[2.01, 3.99], [2.99, 3.01], [-0.4, 9.0], [7.0, 5.0], [6.99, -3.0]])
    rows, columns = [3, 3, 4, 4, 0], [2, 2, 0, 6, 6]
    colours = scene.colors(PixelBatch(torch.full((5,), 1), xy))
    assert torch.equal(colours, scene.images[1, rows, columns].float() / 255)


def test_colours_are_the_same_however_the_images_lie_in_memory():
    scene = small_scene(channels=4)
    images = scene.images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not images.is_contiguous()
    every = pixel_batch(torch.arange(scene.n_pixels), scene.height, scene.width)
    assert torch.equal(replace(scene, images=images).colors(every), scene.colors(every))


def test_colours_pass_no_gradient_to_positions():
    xy = torch.rand(4, 2).requires_grad_()
    assert not small_scene().colors(PixelBatch(torch.zeros(4, dtype=torch.int64), xy)).requires_grad


def test_a_scene_is_immutable_and_counts_its_pixels():
    scene = small_scene()
    assert (scene.n_images, scene.height, scene.width, scene.n_pixels) == (3, 5, 7, 105)
    with pytest.raises(AttributeError):
        scene.near = 1.0
    moved = scene.to("cpu")
    assert torch.equal(moved.images, scene.images)
    assert replace(scene, near=3.0).near == 3.0
