"""Compositing of packed samples against a loop over every ray, forward and backward."""

import math

import pytest
import torch

from components.compositing import alpha_from_density, segment_sum, segmented_weights


def slow_weights(alpha, ray):
    """w of each sample by a product over its ray's earlier samples, differentiable."""
    weights, light, current = [], None, None
    for a, r in zip(alpha, ray.tolist(), strict=True):
        if r != current:
            light, current = torch.ones_like(a), r
        weights.append(a * light)
        light = light * (1.0 - a + 1e-10)
    return torch.stack(weights) if weights else alpha


def packed(seed, n_rays, most, dtype=torch.float64):
    """(alpha [K], ray [K]): up to `most` samples a ray, a third of the rays without any."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (n_rays,), generator=generator)
    counts[torch.rand(n_rays, generator=generator) < 1 / 3] = 0
    ray = torch.repeat_interleave(counts)
    alpha = torch.rand(len(ray), generator=generator, dtype=dtype).square()
    return alpha, ray


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_and_their_gradient_equal_the_loop(seed, dtype):
    alpha, ray = packed(seed, 30, 12, dtype)
    upstream = torch.randn(len(ray), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    ours, loop = alpha.clone().requires_grad_(), alpha.clone().requires_grad_()
    weights, expected = segmented_weights(ours, ray, 30), slow_weights(loop, ray)
    torch.testing.assert_close(weights, expected)
    (weights * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, loop.grad)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_weights_matches_finite_differences(seed):
    alpha, ray = packed(seed, 7, 5)
    alpha = (0.1 + 0.8 * alpha).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: segmented_weights(a, ray, 7), alpha)


def test_no_samples_have_no_weights():
    none = torch.zeros(0, requires_grad=True)
    ray = torch.zeros(0, dtype=torch.int64)
    weights = segmented_weights(none, ray, 5)
    assert weights.shape == (0,)
    weights.sum().backward()
    assert segment_sum(weights.detach(), ray, 5).tolist() == [0.0] * 5
    assert segment_sum(torch.zeros(0, 3), ray, 5).tolist() == [[0.0] * 3] * 5


@pytest.mark.parametrize("ray", [0, 3])
def test_the_weight_of_a_single_sample_is_its_alpha(ray):
    alpha = torch.tensor([0.3], requires_grad=True)
    weights = segmented_weights(alpha, torch.tensor([ray]), 4)
    weights.backward()
    assert weights.item() == alpha.item()
    assert alpha.grad.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_shows_behind_an_opaque_sample_and_gradients_stay_finite(dtype):
    alpha = torch.tensor([0.25, 1.0, 0.5, 1.0, 0.9, 1.0, 1.0, 0.2], dtype=dtype, requires_grad=True)
    ray = torch.tensor([0, 0, 0, 0, 0, 2, 2, 4])
    weights = segmented_weights(alpha, ray, 6)
    expected = torch.tensor([0.25, 0.75, 0, 0, 0, 1, 0, 0.2], dtype=dtype)
    torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-9)
    (weights * torch.arange(1, 9, dtype=dtype)).sum().backward()
    assert torch.isfinite(alpha.grad).all()
    # A ray does not see another one's opaque samples.
    assert alpha.grad[7] == 8.0


def test_gradients_through_opaque_samples_equal_the_loop():
    alpha = torch.tensor([0.25, 1.0, 0.5, 0.3], dtype=torch.float64)
    ray = torch.zeros(4, dtype=torch.int64)
    ours, loop = alpha.clone().requires_grad_(), alpha.clone().requires_grad_()
    upstream = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    (segmented_weights(ours, ray, 1) * upstream).sum().backward()
    (slow_weights(loop, ray) * upstream).sum().backward()
    # The light behind the opaque sample is 1e-10, of differences to 1 in float64: four digits are left.
    torch.testing.assert_close(ours.grad, loop.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_weights_of_a_ray_sum_to_at_most_one_and_to_one_minus_the_light_left(seed, dtype):
    alpha, ray = packed(seed, 400, 60, dtype)
    opacity = segment_sum(segmented_weights(alpha, ray, 400), ray, 400)
    assert (opacity >= 0).all()
    assert (opacity <= 1 + 1e-5).all()
    for r in range(0, 400, 37):
        left = math.prod(1.0 - a for a in alpha[ray == r].tolist())
        assert opacity[r].item() == pytest.approx(1.0 - left, abs=1e-5)


def test_a_ray_keeps_its_precision_among_a_million_samples():
    """The product runs as one sum over all rays: what came before a ray must not blur it."""
    n_rays, per_ray = 5000, 200
    alpha = torch.rand(n_rays * per_ray, generator=torch.Generator().manual_seed(0)) * 0.9
    ray = torch.arange(n_rays).repeat_interleave(per_ray)
    weights = segmented_weights(alpha, ray, n_rays)
    last = slice(-per_ray, None)
    torch.testing.assert_close(weights[last], slow_weights(alpha[last], ray[last]))


def test_rays_do_not_influence_each_other():
    alpha, ray = packed(1, 30, 12)
    alone = torch.cat([segmented_weights(alpha[ray == r], ray[ray == r] * 0, 1) for r in range(30)])
    torch.testing.assert_close(segmented_weights(alpha, ray, 30), alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,)])
@pytest.mark.parametrize("seed", range(2))
def test_segment_sums_equal_the_loop_forward_and_backward(shape, seed):
    alpha, ray = packed(seed, 20, 6)
    values = torch.randn(len(alpha), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values.requires_grad_()
    sums = segment_sum(values, ray, 20)
    for r in range(20):
        torch.testing.assert_close(sums[r], values[ray == r].sum(0))
    upstream = torch.arange(20.0 * max(1, math.prod(shape)), dtype=torch.float64).view(20, *shape)
    (sums * upstream).sum().backward()
    torch.testing.assert_close(values.grad, upstream[ray])


def test_alpha_grows_from_zero_to_one_with_density_and_distance():
    sigma = torch.tensor([0.0, 1.0, 1e6, 3.0])
    delta = torch.tensor([1.0, 0.5, 1.0, 0.0])
    assert alpha_from_density(sigma, delta).tolist() == pytest.approx([0.0, 1 - math.exp(-0.5), 1.0, 0.0])
