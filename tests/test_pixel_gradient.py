"""d loss / d pixel position, soft mining's drift, against finite differences through the whole renderer (float64)."""

from dataclasses import replace

import pytest
import torch

from components.cameras import cast_rays
from components.types import PixelBatch
from models import build_field
from models.alpha_mask import AlphaMask
from tests.helpers import random_field
from tests.test_cameras import small_scene

N_RAYS, STEP = 24, 1e-6


def case(seed: int, model_name: str, ndc: bool, masked: bool):
    """(field, scene, image_id, xy) in float64; smooth densities, no colour threshold."""
    small = random_field(seed, model_name, ndc=ndc, masked=False, grid=(7, 8, 6))
    # No sample may come or go as a ray moves: every one is coloured.
    field = build_field(replace(small.config, weight_threshold=-1.0, density_shift=-2.0), small.aabb, (7, 8, 6), seed)
    with torch.no_grad():
        for name, values in small.named_parameters():
            dict(field.named_parameters())[name].copy_(values)
    field = field.double()
    if masked:
        volume = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
        field.alpha_mask = AlphaMask(volume, field.aabb)
    scene = small_scene(seed, n_images=2, height=9, width=13, ndc=ndc)
    if ndc:  # forward-facing: near the origin, looking along -z (OpenCV axes: y and z point the other way)
        c2w = torch.tensor([[1.0, 0, 0, 0.1], [0, -1, 0, -0.2], [0, 0, -1, 0.3]]).expand(2, 3, 4).clone()
        c2w[1, :, 3] += 0.15
        scene = replace(scene, c2w=c2w)
    scene = replace(scene, c2w=scene.c2w.double(), intrinsics=scene.intrinsics.double())
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(N_RAYS, 2, generator=generator, dtype=torch.float64) * torch.tensor([13.0, 9.0])
    return field, scene, torch.arange(N_RAYS) % 2, xy


def ray_errors(field, scene, image_id, xy, detach_samples=False) -> torch.Tensor:
    """[N] squared errors against a fixed target, with a fixed jitter."""
    rays = cast_rays(scene, PixelBatch(image_id, xy, detach_samples))
    n_samples = 40
    shape = (1, n_samples) if scene.ndc else (len(rays), 1)
    jitter = torch.full(shape, 0.37, dtype=torch.float64)
    rgb = field.render(rays, 1.0, jitter, n_samples).rgb
    target = torch.linspace(0, 1, 3 * len(rays), dtype=torch.float64).view(-1, 3)
    return (rgb - target).square().mean(-1)


def differences(field, scene, image_id, xy) -> torch.Tensor:
    """[N, 2] central differences; a ray's error depends on its own position alone."""
    columns = []
    for axis in range(2):
        move = torch.zeros(2, dtype=torch.float64)
        move[axis] = STEP
        with torch.no_grad():
            ahead, behind = (ray_errors(field, scene, image_id, xy + sign * move) for sign in (1, -1))
        columns.append((ahead - behind) / (2 * STEP))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ndc", [False, True])
@pytest.mark.parametrize("model_name", ["TensorVMSplit", "TensorCP"])
def test_the_gradient_in_pixel_position_is_true(model_name, ndc, masked):
    for seed in range(3):
        field, scene, image_id, xy = case(seed, model_name, ndc, masked)
        xy.requires_grad_()
        errors = ray_errors(field, scene, image_id, xy)
        errors.sum().backward()
        expected = differences(field, scene, image_id, xy.detach())
        assert (expected.abs() > 1e-4).any(dim=1).sum() > N_RAYS // 3, "the test must have something to see"
        torch.testing.assert_close(xy.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ndc", [False, True])
def test_the_gradient_through_the_view_direction_alone_is_another_one(ndc):
    field, scene, image_id, xy = case(0, "TensorVMSplit", ndc, masked=False)
    xy.requires_grad_()
    ray_errors(field, scene, image_id, xy, detach_samples=True).sum().backward()
    partial, whole = xy.grad.clone(), differences(field, scene, image_id, xy.detach())
    assert partial.abs().max() > 0
    assert (partial - whole).abs().max() > 0.5 * whole.abs().max()


@pytest.mark.parametrize("detach_samples", [False, True])
def test_neither_gradient_changes_what_is_rendered_or_what_the_field_learns(detach_samples):
    field, scene, image_id, xy = case(1, "TensorVMSplit", False, masked=True)
    grads = []
    for position in (xy.clone(), xy.clone().requires_grad_()):
        field.zero_grad(set_to_none=True)
        errors = ray_errors(field, scene, image_id, position, detach_samples)
        errors.mean().backward()
        grads.append([errors.detach(), *(p.grad for p in field.parameters())])
    for without, with_gradient in zip(*grads, strict=True):
        torch.testing.assert_close(with_gradient, without, rtol=1e-12, atol=1e-15)
