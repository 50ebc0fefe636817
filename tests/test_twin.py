"""The packed path equals the dense twin, forward and backward: random fields, masks, rays that miss or start inside."""

import pytest
import torch

from components.marching import box_intersection, inside_box, march_box
from components.types import Rays
from models.growth import rays_meet_mask
from tests.helpers import random_field, random_rays
from tests.reference import dense_filter, dense_render

CASES = [
    {"model_name": model, "ndc": ndc, "masked": masked}
    for model in ("TensorVMSplit", "TensorCP")
    for ndc in (False, True)
    for masked in (False, True)
]


def case_id(case):
    return "-".join([case["model_name"][6:], "ndc" if case["ndc"] else "box", "mask" if case["masked"] else "nomask"])


def jitter_for(field, n_rays, n_samples, seed):
    return field.draw_jitter(n_rays, n_samples, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("seed", range(3))
def test_packed_rendering_and_gradients_equal_the_dense_twin(case, seed):
    field, rays = random_field(seed, **case), random_rays(seed, 200, case["ndc"])
    n_samples = 61
    jitter = jitter_for(field, 200, n_samples, seed) if seed else None
    outputs, gradients = [], []
    for render in (field.render, lambda *a: dense_render(field, *a)):
        field.zero_grad()
        out = render(rays, 1.0, jitter, n_samples)
        (out.rgb * torch.linspace(-1, 1, 600).view(200, 3)).sum().backward()
        outputs.append(out)
        gradients.append({n: p.grad.clone() for n, p in field.named_parameters() if p.grad is not None})
    packed, dense = outputs
    assert (packed.n_live, packed.n_colour) == (dense.n_density, dense.n_colour)
    assert packed.n_live > 300
    assert packed.n_colour > 100
    torch.testing.assert_close(packed.rgb, dense.rgb, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(packed.opacity, dense.opacity, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(packed.depth, dense.depth, rtol=1e-4, atol=2e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max().item()
        # This loss's colour errors cancel, and the twin's own rounding of such sums is 8e-5 of them on some CPUs.
        share = 2e-4 if name.startswith("renderModule.mlp.4") else 1e-5
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=share * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("shading", ["MLP_Fea", "MLP", "MLP_PE", "SH", "RGB"])
def test_every_shading_trains_in_the_packed_path_as_in_the_twin(shading):
    field, rays = random_field(7, shading=shading), random_rays(7, 100)
    packed, dense = field.render(rays, 0.0), dense_render(field, rays, 0.0)
    torch.testing.assert_close(packed.rgb, dense.rgb, rtol=1e-4, atol=2e-6)
    packed.rgb.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in field.parameters() if p.grad is not None)


def test_rays_that_miss_the_box_show_the_background_at_far():
    field = random_field(0)
    rays = Rays(torch.full((5, 3), 9.0), torch.nn.functional.normalize(torch.rand(5, 3) + 0.1, dim=-1))
    out = field.render(rays, torch.tensor([0.25, 0.5, 0.75]))
    assert out.n_live == 0
    torch.testing.assert_close(out.rgb, torch.tensor([0.25, 0.5, 0.75]).expand(5, 3))
    torch.testing.assert_close(out.depth, torch.full((5,), field.config.far))


def test_no_rays_render_to_nothing():
    field = random_field(0)
    assert field.render(Rays(torch.zeros(0, 3), torch.zeros(0, 3)), 1.0).rgb.shape == (0, 3)


def test_an_opaque_field_keeps_finite_gradients():
    field, rays = random_field(3), random_rays(3, 50)
    with torch.no_grad():
        for plane in field.density_plane:
            plane.abs_().mul_(1e4)
        for line in field.density_line:
            line.abs_().mul_(1e4)
    out = field.render(rays, 1.0)
    out.rgb.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in field.parameters() if p.grad is not None)
    assert out.opacity.max() <= 1.0 + 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_candidates_never_lose_a_sample_inside_the_box(seed):
    rays = random_rays(seed, 500)
    aabb = torch.tensor([[-1.0, -0.7, -0.9], [0.8, 1.1, 0.4]])
    step, n_samples = 0.037, 90
    jitter = torch.rand(500, 1, generator=torch.Generator().manual_seed(seed))
    t_enter = box_intersection(rays, aabb)[0].clamp(0.2, 5.0)
    t = t_enter[:, None] + step * (torch.arange(n_samples)[None] + jitter)
    points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
    expected = inside_box(points.view(-1, 3), aabb).view(500, n_samples)
    samples = march_box(rays, aabb, 0.2, 5.0, step, n_samples, jitter)
    assert torch.equal(torch.bincount(samples.ray, minlength=500), expected.sum(1))
    assert torch.equal(samples.t, t[expected])


@pytest.mark.parametrize("seed", range(3))
def test_ray_filtering_equals_the_dense_twin(seed):
    field, rays = random_field(seed), random_rays(seed, 400)
    field.alpha_mask.cells &= torch.rand(field.alpha_mask.cells.shape).lt(0.2).to(torch.uint8) * 255
    volume = torch.rand(7, 6, 8, generator=torch.Generator().manual_seed(seed)) < 0.02
    field.alpha_mask = type(field.alpha_mask)(volume, field.aabb)
    expected = dense_filter(field, rays)
    assert torch.equal(rays_meet_mask(field, rays), expected)
    assert 0 < expected.sum() < 400


def test_gradients_reach_pixel_positions_only_when_rays_ask_for_them():
    field, rays = random_field(2), random_rays(2, 30)
    directions = rays.directions.clone().requires_grad_(True)
    field.render(Rays(rays.origins, directions), 1.0).rgb.sum().backward()
    assert torch.isfinite(directions.grad).all()
    assert directions.grad.abs().max() > 0
    assert not march_box(rays, field.aabb, 0.3, 6.0, field.step, 40).position.requires_grad
