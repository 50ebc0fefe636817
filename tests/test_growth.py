"""Growth of a field: the alpha mask and its box, shrinking, upsampling, ray filtering; against slow loops."""

from dataclasses import replace

import pytest
import torch

from components.cameras import image_rays
from components.grids import grid_coordinates, step_length
from components.types import Rays
from models.alpha_mask import AlphaMask
from models.growth import dense_alpha, kept_pixels, rays_meet_mask, shrink, update_alpha_mask, upsample
from models.kernels import threads
from tests.helpers import random_field, random_rays
from tests.reference import activation, dense_filter, density_feature, sample_alpha
from tests.test_cameras import small_scene
from utils.errors import EmptyMaskError

MODELS = ["TensorVMSplit", "TensorCP"]


def all_factors(field):
    return [factor for kind in (field.density_factors(), field.appearance_factors()) for fs in kind for factor in fs]


def axis_points(field, grid):
    """World coordinates of the grid's points along each axis."""
    return [
        torch.linspace(*field.aabb[:, axis].double().tolist(), n, dtype=torch.float64) for axis, n in enumerate(grid)
    ]


def slow_alpha(field, grid):
    """alpha [Nx, Ny, Nz] of the grid's points by grid_sample, 0 where an existing mask is."""
    # Rounding decides which side of a mask's cell a shared grid point lies on, so both take the same coordinates.
    xyz = grid_coordinates(field.aabb, grid).reshape(-1, 3)
    position = (xyz - field.aabb[0]) / (field.aabb[1] - field.aabb[0]) * 2 - 1
    with torch.no_grad():
        alpha = 1 - torch.exp(-activation(field, density_feature(field, position)) * field.step)
    if field.alpha_mask is not None:
        volume = field.alpha_mask.volume[None, None].float()
        alpha[sample_alpha(volume, field.alpha_mask.aabb, xyz) <= 0] = 0.0
    return alpha.view(grid)


def slow_volume(alpha, threshold):
    """[Nz, Ny, Nx] bool: some neighbour among 3x3x3 reaches the threshold."""
    nx, ny, nz = alpha.shape
    volume = torch.zeros(nz, ny, nx, dtype=torch.bool)
    for x in range(nx):
        for y in range(ny):
            for z in range(nz):
                near = tuple(slice(max(i - 1, 0), i + 2) for i in (x, y, z))
                volume[z, y, x] = alpha[near].max() >= threshold
    return volume


def with_threshold(field, threshold):
    field.config = replace(field.config, alpha_threshold=threshold)
    return field


def middle_threshold(alpha, share):
    """A threshold that `share` of the points miss, halfway between two values: rounding cannot decide."""
    values = alpha.flatten().sort().values
    index = int(share * (len(values) - 1))
    assert values[index] < values[index + 1]
    return ((values[index] + values[index + 1]) / 2).item()


# --- the mask ---
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [(9, 7, 8), (19, 23, 15)])
def test_alpha_mask_and_box_equal_the_loop(model_name, masked, grid):
    field = random_field(2, model_name, masked=masked)
    alpha = slow_alpha(field, grid)
    torch.testing.assert_close(dense_alpha(field, grid)[0], alpha, rtol=1e-4, atol=1e-6)
    threshold = middle_threshold(alpha, 0.998)
    with_threshold(field, threshold)
    expected = slow_volume(alpha, threshold)
    assert 0 < expected.sum() < expected.numel()
    box = update_alpha_mask(field, grid)
    assert torch.equal(field.alpha_mask.volume, expected)
    assert field.alpha_mask.grid_size == grid
    assert torch.equal(field.alpha_mask.aabb, field.aabb)
    for axis, points in enumerate(axis_points(field, grid)):
        passing = points[expected.nonzero()[:, 2 - axis]]
        assert box[:, axis].tolist() == pytest.approx([passing.min().item(), passing.max().item()], abs=1e-6)


def test_a_second_mask_keeps_nothing_beyond_a_cell_of_the_first_one():
    field = with_threshold(random_field(2, masked=False), 1e-9)
    volume = torch.zeros(6, 6, 6, dtype=torch.bool)
    volume[2, 3, 1] = True  # z, y, x
    field.alpha_mask = AlphaMask(volume, field.aabb)
    update_alpha_mask(field, field.grid_size)
    # Grid points less than a cell of the old mask from its only point, and their pooled neighbours. No point lies
    # exactly a cell away: 18, 22 and 14 intervals an axis are no multiples of 5.
    alive = [
        [i for i in range(n) if abs(5 * i / (n - 1) - centre) < 1]
        for n, centre in zip(field.grid_size, (1, 3, 2), strict=True)
    ]
    x, y, z = (slice(indices[0] - 1, indices[-1] + 2) for indices in alive)
    expected = torch.zeros(15, 23, 19, dtype=torch.bool)
    expected[z, y, x] = True
    assert torch.equal(field.alpha_mask.volume, expected)


def test_the_mask_uses_the_step_length_without_the_distance_scale():
    field = random_field(2, masked=False)
    sparse, _ = dense_alpha(field, (5, 5, 5))
    field.config = replace(field.config, distance_scale=1.0)
    assert torch.equal(dense_alpha(field, (5, 5, 5))[0], sparse)
    field.step *= 2
    torch.testing.assert_close(1 - dense_alpha(field, (5, 5, 5))[0], (1 - sparse).square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_name", MODELS)
def test_a_mask_that_is_full_changes_nothing(model_name):
    field, rays = with_threshold(random_field(3, model_name, masked=False), 0.0), random_rays(3, 200)
    aabb, step, n_samples = field.aabb.clone(), field.step, field.n_samples
    before = {name: p.detach().clone() for name, p in field.named_parameters()}
    with torch.no_grad():
        expected = field.render(rays, 1.0)
    box = update_alpha_mask(field, field.grid_size)
    assert field.alpha_mask.volume.all()
    assert torch.equal(box, aabb)
    shrink(field, box)
    assert torch.equal(field.aabb, aabb)
    assert (field.step, field.n_samples) == (step, n_samples)
    assert all(torch.equal(p, before[name]) for name, p in field.named_parameters())
    with torch.no_grad():
        out = field.render(rays, 1.0)
    assert torch.equal(out.rgb, expected.rgb)
    assert torch.equal(out.depth, expected.depth)
    assert out.n_live == expected.n_live


def test_a_field_of_nan_is_not_mistaken_for_an_empty_scene():
    field = random_field(3, masked=False)
    with torch.no_grad():
        for factor in field.density_factors()[1]:
            factor.fill_(torch.nan)
    with pytest.raises(EmptyMaskError, match="lr_init"):
        update_alpha_mask(field, field.grid_size)


# --- shrinking ---
def random_box(field, seed):
    """Two corners anywhere in the field's box."""
    corners = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).sort(0).values
    return field.aabb[0] + corners * (field.aabb[1] - field.aabb[0])


def points_in(box, seed, n=200):
    return box[0] + torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * (box[1] - box[0])


def features(field, xyz):
    position = field.normalise(xyz)
    with torch.no_grad():
        return field.density_feature(position), field.appearance_feature(position)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_shrinking_to_any_box_keeps_the_field_inside(model_name, masked, seed):
    field = random_field(seed, model_name, masked=masked)  # the mask's grid is not the field's
    old, size, wanted = field.aabb.clone(), torch.tensor(field.grid_size), random_box(field, seed)
    units = (old[1] - old[0]) / (size - 1)
    before = {name: p.detach().clone() for name, p in field.named_parameters()}
    inside = points_in(old, seed + 50, 2000)
    expected = features(field, inside)

    slices = shrink(field, wanted)
    # On grid lines, and the nearest ones.
    lines = (field.aabb - old[0]) / units
    torch.testing.assert_close(lines, lines.round(), rtol=0, atol=1e-3)
    assert ((field.aabb - wanted).abs() <= units * 0.501).all() or min(field.grid_size) == 2
    first, last = lines.round().long()
    assert field.grid_size == tuple((last - first + 1).tolist())
    assert field.step == pytest.approx(units.mean().item() * field.config.step_ratio, rel=1e-4)
    # What was kept is what the slices say.
    after = dict(field.named_parameters())
    assert slices.keys() == {name for name in after if "_line." in name or "_plane." in name}
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name][slices.get(name, ...)])
    # And it is the same function of the world's points.
    kept = ((inside >= field.aabb[0]) & (inside <= field.aabb[1])).all(-1)
    for actual, whole in zip(features(field, inside[kept]), expected, strict=True):
        torch.testing.assert_close(actual, whole[kept], rtol=1e-3, atol=1e-3)
    assert_trainable_and_channels_last(field)


def assert_trainable_and_channels_last(field):
    for factor in all_factors(field):
        assert isinstance(factor, torch.nn.Parameter)
        assert factor.requires_grad
        assert factor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_a_field_shrunk_to_a_point_keeps_one_cell(model_name, share):
    field = random_field(1, model_name, masked=False)
    point = field.aabb[0] + share * (field.aabb[1] - field.aabb[0])
    whole = random_field(1, model_name, masked=False)
    shrink(field, torch.stack([point, point]))
    assert field.grid_size == (2, 2, 2)
    assert (field.aabb[1] > field.aabb[0]).all()
    inside = points_in(field.aabb, 3)
    for actual, expected in zip(features(field, inside), features(whole, inside), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def field_with_a_blob(model_name):
    """Density only around the grid points 6..11 x 8..13 x 4..9, zero elsewhere."""
    field = random_field(6, model_name, masked=False)
    field.config = replace(field.config, density_activation="relu", density_shift=0.0, distance_scale=5.0)
    with torch.no_grad():
        for factor in (*field.density_factors()[0], *field.density_factors()[1]):
            factor.abs_()
        for line, low, n in zip(field.density_factors()[1], (4, 8, 6), field.grid_size[::-1], strict=True):
            line[:, :, [i for i in range(n) if not low <= i < low + 6]] = 0.0
        for plane, (u, v) in zip(field.density_factors()[0], ((6, 8), (6, 4), (8, 4)), strict=False):
            outside = torch.ones(plane.shape[2:], dtype=torch.bool)
            outside[v : v + 6, u : u + 6] = False
            plane[:, :, outside] = 0.0
    return field


@pytest.mark.parametrize("model_name", MODELS)
def test_mask_and_shrinking_keep_the_renderings(model_name):
    """Rays that start inside the blob have the same samples before and after."""
    field = field_with_a_blob(model_name)
    aabb, size = field.aabb.clone(), torch.tensor(field.grid_size)
    point = aabb[0] + torch.tensor([8.4, 10.3, 6.6]) / (size - 1) * (aabb[1] - aabb[0])
    directions = random_rays(6, 300).directions
    rays = Rays(point - field.config.near * directions, directions)
    with torch.no_grad():
        expected = field.render(rays, 1.0)
    box = update_alpha_mask(field, field.grid_size)
    units = (aabb[1] - aabb[0]) / (size - 1)
    # The blob's points and one neighbour on either side.
    lines = torch.stack([aabb[0] + torch.tensor([5, 7, 3]) * units, aabb[0] + torch.tensor([12, 14, 10]) * units])
    torch.testing.assert_close(box, lines, rtol=0, atol=1e-5)
    shrink(field, box)
    assert field.grid_size == (8, 8, 8)
    with torch.no_grad():
        out = field.render(rays, 1.0)
    assert out.n_live < expected.n_live
    assert expected.opacity.max() > 0.5
    torch.testing.assert_close(out.rgb, expected.rgb, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(out.depth, expected.depth, rtol=1e-4, atol=1e-4)


# --- upsampling ---
@pytest.mark.parametrize("model_name", MODELS)
def test_doubling_the_grid_keeps_its_points_and_the_whole_function(model_name):
    field = random_field(4, model_name, masked=False, grid=(6, 9, 5))
    before = {name: p.detach().clone() for name, p in field.named_parameters()}
    inside = points_in(field.aabb, 4)
    expected = features(field, inside)
    upsample(field, (11, 17, 9))
    assert field.grid_size == (11, 17, 9)
    assert field.step == pytest.approx(step_length(field.aabb, (11, 17, 9), field.config.step_ratio))
    for name, parameter in field.named_parameters():
        every_second = parameter
        if "_line." in name:
            every_second = parameter[:, :, ::2]
        elif "_plane." in name:
            every_second = parameter[:, :, ::2, ::2]
        torch.testing.assert_close(every_second.detach(), before[name], rtol=1e-5, atol=1e-5)
    # Bilinear interpolation of bilinear interpolation: nothing has changed between the points either.
    for actual, whole in zip(features(field, inside), expected, strict=True):
        torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-4)
    assert_trainable_and_channels_last(field)


@pytest.mark.parametrize("model_name", MODELS)
def test_upsampling_keeps_box_mask_and_networks(model_name):
    field = random_field(4, model_name)
    aabb, volume, basis = field.aabb.clone(), field.alpha_mask.volume, field.basis_mat.weight
    upsample(field, (20, 30, 40))
    assert torch.equal(field.aabb, aabb)
    assert torch.equal(field.alpha_mask.volume, volume)
    assert field.basis_mat.weight is basis
    with torch.no_grad():
        assert torch.isfinite(field.render(random_rays(1, 20), 1.0).rgb).all()


# --- which pixels are kept ---
def field_and_scene(seed, shrunk=False, near=0.3):
    """A field with a sparse mask, in a smaller box than the mask's if `shrunk`, and pictures that look at it."""
    field = random_field(seed)
    field.config = replace(field.config, near=near)
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(7, 6, 8, generator=generator) < 0.01
    volume[3, 3, 4] = True
    field.alpha_mask = AlphaMask(volume, field.aabb)
    if shrunk:
        shrink(field, torch.tensor([[-0.9, -0.4, -0.6], [0.8, 1.1, 0.7]]))
    return field, small_scene(seed, n_images=3, height=9, width=11)


def slow_box_hit(origin, direction, aabb):
    """Whether a ray's line passes through the box, by a loop over its slabs."""
    enter, leave = -float("inf"), float("inf")
    for o, d, low, high in zip(origin, direction, *aabb, strict=True):
        bounds = sorted(((low - o) / d, (high - o) / d))
        enter, leave = max(enter, bounds[0]), min(leave, bounds[1])
    return leave > enter


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("near", [0.3, 3.9])  # before the box and in its middle
def test_pixels_kept_by_the_mask_equal_the_dense_filter_of_every_image(seed, shrunk, near):
    field, scene = field_and_scene(seed, shrunk, near)
    rays = [image_rays(scene, c2w, k) for c2w, k in zip(scene.c2w, scene.intrinsics, strict=True)]
    expected = torch.cat([dense_filter(field, r) for r in rays])
    kept = kept_pixels(field, scene, by_mask=True)
    assert 0 < expected.sum() < scene.n_pixels
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("seed", range(3))
def test_pixels_kept_by_the_box_equal_the_slab_loop(seed):
    field, scene = field_and_scene(seed)
    expected = []
    for c2w, intrinsics in zip(scene.c2w, scene.intrinsics, strict=True):
        rays = image_rays(scene, c2w, intrinsics)
        for origin, direction in zip(rays.origins.tolist(), rays.directions.tolist(), strict=True):
            expected.append(slow_box_hit(origin, direction, field.aabb.tolist()))
    assert 0 < sum(expected) < scene.n_pixels
    assert kept_pixels(field, scene, by_mask=False).tolist() == expected


@pytest.mark.parametrize("by_mask", [False, True])
def test_pixels_kept_are_a_subset_of_those_kept_before_whatever_the_chunk(by_mask, monkeypatch):
    field, scene = field_and_scene(1)
    every = kept_pixels(field, scene, by_mask)
    monkeypatch.setattr(threads, "_taken", 3)
    before = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(0)) < 0.5
    for chunk in (1 << 16, 10, 99):
        assert torch.equal(kept_pixels(field, scene, by_mask, chunk=chunk), every)
        assert torch.equal(kept_pixels(field, scene, by_mask, before, chunk), every & before)


def test_filtering_by_a_mask_needs_one():
    with pytest.raises(ValueError, match="alpha mask"):
        rays_meet_mask(random_field(0, masked=False), random_rays(0, 5))
