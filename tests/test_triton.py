"""Triton's kernels against the definitions: on a CUDA device (marked cuda then), or in Triton's interpreter on the CPU.

The interpreter takes some hundred microseconds an operation, so there tiles are wide, walks short and points few; and
it is sequential, so it cannot show races. The last test compiles every kernel for real GPUs, without one.
"""

import copy
import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch

from components.marching import Samples
from components.regularisers import build_regularisers
from components.types import Rays
from models import kernels
from models.kernels import foreach_l1, gather_lookups, torch_lookups, torch_rendering
from tests.helpers import ROOT, Waits, counted_in_mask, exact_products, random_field, random_rays
from tests.test_kernels import Case, assert_equal_up_to_rounding, assert_refuses_second_gradients

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from models.kernels import triton_common, triton_evaluation, triton_lookups, triton_network, triton_rendering

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = [pytest.mark.cuda] if ON_CUDA else []


@pytest.fixture(autouse=True)
def _without_tf32():
    with exact_products():
        yield


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    """For the interpreter: fewer operations a point, and blocks that a ray of the tests exceeds."""
    if not ON_CUDA:
        monkeypatch.setattr(triton_evaluation, "_SEGMENT", 16)
        monkeypatch.setattr(triton_lookups, "_LENGTH", 4)
        monkeypatch.setattr(triton_lookups, "_TILE", 8192)
        monkeypatch.setattr(triton_lookups, "_GRADIENT_TILE", 4096)
        monkeypatch.setattr(triton_rendering, "_BLOCK", 16)


# --- lookups ---
def moved(case, positions=True):
    """The case on DEVICE; with gradients of the points if `positions`."""
    for name in ("planes", "lines"):
        setattr(case, name, [x.detach().to(DEVICE).requires_grad_() for x in getattr(case, name)])
    case.basis = case.basis.detach().to(DEVICE).requires_grad_()
    case.xyz, case.upstream = case.xyz.to(DEVICE).requires_grad_(positions), case.upstream.to(DEVICE)
    case.leaves = [*case.planes, *case.lines, case.basis, *([case.xyz] if positions else [])]
    return case


def on_the_cpu(case):
    """A copy of a case, for the definition: only on a CPU is it known how torch rounds where a point lies."""
    twin = copy.copy(case)
    own = lambda x: x.detach().cpu().requires_grad_(x.requires_grad)  # noqa: E731
    twin.planes, twin.lines = list(map(own, case.planes)), list(map(own, case.lines))
    twin.basis, twin.xyz, twin.upstream = own(case.basis), own(case.xyz), case.upstream.cpu()
    twin.leaves = [*twin.planes, *twin.lines, twin.basis, *([twin.xyz] if case.xyz.requires_grad else [])]
    return twin


def check(case):
    twin = on_the_cpu(case)
    with torch.no_grad():
        ours, definition = case.outputs(triton_lookups), twin.outputs(torch_lookups)
    assert_equal_up_to_rounding([x.cpu() for x in ours], definition, torch.float32)
    ours = [x.cpu() for x in case.gradients(triton_lookups)]
    assert_equal_up_to_rounding(ours, twin.gradients(torch_lookups), torch.float32)


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize(
    ("n_points", "grid", "counts"),
    [
        (150, (9, 14, 6), (5, 8, 3)),
        (90, (2, 3, 31), (1, 2, 33)),
        (60, (400, 211, 37), (96, 3, 16)),
        (1, (5, 6, 7), (48, 1, 4)),
        (0, (5, 6, 7), (2, 3, 4)),
    ],
)
def test_values_and_gradients_equal_the_definition(model, n_points, grid, counts):
    check(moved(Case(model, n_points, n_points, grid, counts)))


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("seed", range(6) if ON_CUDA else range(1))
def test_values_and_gradients_equal_the_definition_for_random_shapes(model, seed):
    rng = random.Random(seed)
    grid = tuple(rng.choice([2, rng.randint(2, 400)]) for _ in range(3))
    counts = tuple(rng.choice([1, rng.randint(2, 96), rng.randint(2, 96)]) for _ in range(3))
    n_points = rng.randint(2, 50_000 if ON_CUDA else 40)
    check(moved(Case(model, seed, n_points, grid, counts)))


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_gradients_collected_along_rays_equal_the_definition(model, monkeypatch):
    monkeypatch.setattr(triton_lookups, "_LENGTH", 16)
    case = Case(model, 4, 200, (9, 14, 6), (4, 2, 3))
    generator = torch.Generator().manual_seed(4)
    # Four rays of 50 points, several a cell, that leave the grid and come back to cells they were in.
    start, end = (torch.rand(2, 4, 1, 3, generator=generator) * 2.4 - 1.2).unbind(0)
    case.xyz = (start + (end - start) * torch.linspace(0, 1, 50)[:, None].sin()).reshape(-1, 3)
    check(moved(case, positions=False))


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_the_memory_layout_and_chunk_borders_do_not_matter(model, monkeypatch):
    case = Case(model, 5, 70, (4, 3, 6), (5, 2, 3), channels_last=False)
    monkeypatch.setattr(triton_lookups, "_CHUNK_VALUES", 300)  # 30 or 60 points
    case.xyz, case.upstream = case.xyz.T.contiguous().T, case.upstream[:, :1].expand(-1, 8)
    check(moved(case, positions=False))


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_points_that_are_no_numbers_reach_no_memory_outside_the_factors(model):
    case = moved(Case(model, 14, 20, (9, 14, 6), (5, 8, 3)))
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38], device=DEVICE)
    with torch.no_grad():
        case.xyz[3:7, 1] = strange
        case.xyz[8:12] = strange[:, None]
    clean = moved(Case(model, 14, 20, (9, 14, 6), (5, 8, 3)))
    with torch.no_grad():
        clean.xyz[3:7, 1] = -1e4
        clean.xyz[8:12] = -1e4
    # They count as points far outside.
    assert_equal_up_to_rounding(case.outputs(triton_lookups), clean.outputs(torch_lookups), torch.float32)
    assert_equal_up_to_rounding(case.gradients(triton_lookups), clean.gradients(torch_lookups), torch.float32)


def test_gradients_of_gradients_are_refused():
    assert_refuses_second_gradients(moved(Case("VM", 3, 8, (3, 4, 5), (1, 2, 1)), positions=False), triton_lookups)
    samples = random_samples([2, 3])
    feature, colour = (torch.ones(*shape, device=DEVICE, requires_grad=True) for shape in ((5,), (5, 3)))
    weights = triton_rendering.ray_weights(feature, samples, "relu", 0.0, 3.0)
    for values in (weights, triton_rendering.composite(weights, samples, torch.arange(5, device=DEVICE), colour)[0]):
        (gradient,) = torch.autograd.grad(values.square().sum(), feature, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_double_precision_takes_the_way_of_torch(monkeypatch):
    case = moved(Case("VM", 3, 40, (5, 6, 7), (2, 3, 4), torch.float64))
    ours, gather = case.gradients(triton_lookups), case.gradients(gather_lookups)
    assert_equal_up_to_rounding(ours, gather, torch.float64)


@triton.jit
def _offsets(out, block, u, v, size, SIZE: tl.constexpr):
    """Numbers of block `block`'s first and last point, and of the rows at grid point (u, v)."""
    k = triton_common.numbered(block, SIZE)
    tl.store(out, tl.min(k, 0))
    tl.store(out + 1, tl.max(k, 0))
    us, vs = tl.zeros([2], tl.int32) + u, tl.zeros([2], tl.int32) + v
    where, _ = triton_lookups._row(us, vs, size, size, 96, 128)
    tl.store(out + 2, tl.min(tl.min(where, 1), 0))


def test_points_and_rows_beyond_two_to_the_31_have_their_numbers():
    # The kernels get all their offsets from these two, which no memory of this size is needed to ask.
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](out, 2**28, 70_000, 80_000, 100_000, SIZE=64)
    assert out.tolist() == [2**34, 2**34 + 63, (80_000 * 100_000 + 70_000) * 96]


@pytest.mark.skipif(not ON_CUDA, reason="too many points for the interpreter")
@pytest.mark.parametrize("model", ["VM", "CP"])
def test_more_points_than_single_precision_can_number_are_looked_up(model):
    n_points = 2**24 + 5
    case = moved(Case(model, 6, 1, (40, 33, 21), (2, 1, 3)), positions=False)
    case.xyz = torch.rand(n_points, 3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) * 2.2 - 1.1
    # Some points, of which the last ones have numbers that float32 cannot tell apart; only they have gradients.
    some = torch.arange(0, n_points, 15_000, device=DEVICE)
    some = torch.cat([some, torch.arange(2**24 - 3, n_points, device=DEVICE)]).unique()
    values = torch.randn(len(some), 8, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    few = moved(Case(model, 6, 1, (40, 33, 21), (2, 1, 3)), positions=False)
    few.xyz, few.upstream = case.xyz[some].requires_grad_(), values
    few = on_the_cpu(few)
    case.upstream = torch.zeros(n_points, 8, device=DEVICE).index_copy_(0, some, values)
    case.xyz.requires_grad_()
    case.leaves.append(case.xyz)
    with torch.no_grad():
        ours = [x[some].cpu() for x in case.outputs(triton_lookups)]
        assert_equal_up_to_rounding(ours, few.outputs(torch_lookups), torch.float32)
    ours = [x.cpu() for x in case.gradients(triton_lookups)]
    assert ours[-1].count_nonzero() <= 3 * len(some)
    ours[-1] = ours[-1][some.cpu()]
    assert_equal_up_to_rounding(ours, few.gradients(torch_lookups), torch.float32)


# --- marching ---
def scene(seed, masked=True, n=40):
    field, rays = random_field(seed, masked=masked).to(DEVICE), random_rays(seed, n)
    return field, Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE))


def marched(rendering, field, rays, jitter=None, n_samples=61, mask=None):
    return rendering.march_box(rays, field.aabb, 0.3, 6.0, field.step, n_samples, jitter, mask or field.alpha_mask)


def assert_same_samples(ours, expected):
    for name in ("ray", "t", "delta", "position", "offsets"):
        a, b = getattr(ours, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("jittered", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_samples", [7, 61])
def test_exactly_the_definitions_samples_are_kept(masked, jittered, n_samples):
    field, rays = scene(n_samples, masked)
    jitter = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE) if jittered else None
    ours = marched(triton_rendering, field, rays, jitter, n_samples)
    assert len(ours) > 50
    assert_same_samples(ours, marched(torch_rendering, field, rays, jitter, n_samples))


@pytest.mark.skipif(not ON_CUDA, reason="too many candidates for the interpreter")
@pytest.mark.parametrize(("masked", "n_rays"), [(True, 100_000), (False, 800_000)])
def test_exactly_the_definitions_samples_are_kept_of_millions(masked, n_rays):
    field, rays = scene(1, masked, n_rays)
    jitter = torch.rand(n_rays, 1, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    ours = marched(triton_rendering, field, rays, jitter)
    assert masked or len(ours) > 2**24  # numbers beyond those that float32 can tell apart
    assert_same_samples(ours, marched(torch_rendering, field, rays, jitter))


@pytest.mark.parametrize("detached", [False, True])
def test_gradients_reach_the_rays_as_in_the_definition(detached):
    field, rays = scene(2, n=12)
    results = []
    for rendering in (triton_rendering, torch_rendering):
        own = Rays(rays.origins.clone().requires_grad_(), rays.directions.clone().requires_grad_(), detached)
        samples = marched(rendering, field, own)
        assert samples.t.requires_grad == samples.position.requires_grad == (not detached)
        assert not samples.delta.requires_grad
        results.append([samples.t.detach(), samples.position.detach()])
        if not detached:
            loss = (
                samples.t.sin() + (samples.position.cos() * samples.position.new_tensor([1.0, 2.0, 3.0])).sum(1)
            ).sum()
            results[-1] += torch.autograd.grad(loss, (own.origins, own.directions))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert_equal_up_to_rounding(results[0], results[1], torch.float32)


def marched_in_ndc(rendering, field, rays, jitter=None, n_samples=61, **more):
    return rendering.march_ndc(rays, field.aabb, 0.0, 1.0, n_samples, jitter, field.alpha_mask, **more)


def ndc_scene(seed, masked=True, n=40):
    field, rays = random_field(seed, ndc=True, masked=masked).to(DEVICE), random_rays(seed, n, ndc=True)
    return field, Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE))


@pytest.mark.parametrize("jittered", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_samples", [1, 61])
def test_exactly_the_definitions_samples_are_kept_in_ndc(masked, jittered, n_samples):
    field, rays = ndc_scene(n_samples, masked)
    jitter = torch.rand(1, n_samples, generator=torch.Generator().manual_seed(1)).to(DEVICE) if jittered else None
    ours, expected = (marched_in_ndc(r, field, rays, jitter, n_samples) for r in (triton_rendering, torch_rendering))
    assert len(ours) > n_samples
    assert_same_samples(ours, expected)
    roomy = marched_in_ndc(triton_rendering, field, rays, jitter, n_samples, capacity=len(ours) + 3)
    assert roomy.n_live == len(ours)
    for name in ("ray", "t", "delta", "position"):
        assert torch.equal(getattr(roomy, name)[: len(ours)], getattr(expected, name)), name


def test_a_jitter_for_each_ray_and_foreign_masks_take_the_definitions_way_in_ndc():
    field, rays = ndc_scene(3, n=5)
    jitter = torch.rand(5, 61, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, expected = (marched_in_ndc(r, field, rays, jitter) for r in (triton_rendering, torch_rendering))
    assert_same_samples(ours, expected)
    with pytest.raises(ValueError, match="one jitter"):
        marched_in_ndc(triton_rendering, field, rays, jitter, capacity=100)


@pytest.mark.parametrize("detached", [False, True])
def test_gradients_reach_the_rays_as_in_the_definition_in_ndc(detached):
    field, rays = ndc_scene(2, n=12)
    results = []
    for rendering in (triton_rendering, torch_rendering):
        own = Rays(rays.origins.clone().requires_grad_(), rays.directions.clone().requires_grad_(), detached)
        samples = marched_in_ndc(rendering, field, own)
        assert samples.delta.requires_grad
        assert samples.position.requires_grad == (not detached)
        feature = (2.0 * samples.position.sum(1).sin()).detach().requires_grad_()
        weights = rendering.ray_weights(feature, samples, "softplus", -2.0, 25.0)
        weighed = torch.linspace(-1, 1.5, len(samples), device=DEVICE)
        loss = (weights * weighed).sum() + (0 if detached else (samples.position.sin() * weighed[:, None]).sum())
        wanted = [feature, own.directions, *([] if detached else [own.origins])]
        results.append([samples.delta.detach(), weights.detach(), *torch.autograd.grad(loss, wanted)])
    assert_equal_up_to_rounding(*results, torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_samples_in_the_mask_are_those_of_the_definition(seed):
    field, rays = scene(seed, n=100)
    ours, expected = (counted_in_mask(rendering, field, rays) for rendering in (triton_rendering, torch_rendering))
    assert ours.dtype == expected.dtype == torch.int64
    assert torch.equal(ours, expected)
    assert (expected > 0).sum() > 10
    assert (expected == 0).sum() > 10
    assert counted_in_mask(triton_rendering, field, rays[:0]).shape == (0,)


def test_rays_that_miss_no_rays_and_foreign_masks():
    field, rays = scene(3, n=5)
    away = Rays(rays.origins * 0 + 9.0, rays.directions.abs() + 0.1)
    assert_same_samples(marched(triton_rendering, field, away), marched(torch_rendering, field, away))
    assert len(marched(triton_rendering, field, rays[:0])) == 0

    class Half:
        def occupied(self, xyz):
            return xyz[:, 0] > 0

    ours = marched(triton_rendering, field, rays, mask=Half())
    assert_same_samples(ours, marched(torch_rendering, field, rays, mask=Half()))
    ours, expected = (counted_in_mask(r, field, rays, Half()) for r in (triton_rendering, torch_rendering))
    assert torch.equal(ours, expected)


# --- weights ---
def random_samples(counts, seed=0):
    """Samples of rays with so many each."""
    generator = torch.Generator().manual_seed(seed)
    ray = torch.repeat_interleave(torch.tensor(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    t, delta = torch.rand(2, len(ray), generator=generator)
    xyz = torch.rand(len(ray), 3, generator=generator)
    return Samples(*(x.to(DEVICE) for x in (ray, t, delta, xyz, offsets)))


COUNTS = [0, 1, 15, 16, 17, 0, 40, 2, 0]


def weights_and_gradient(rendering, feature, samples, activation, shift=-2.0, scale=3.0):
    feature = feature.clone().requires_grad_()
    weights = rendering.ray_weights(feature, samples, activation, shift, scale)
    upstream = torch.linspace(-1, 1.5, len(samples), device=DEVICE)
    return weights.detach(), torch.autograd.grad(weights, feature, upstream)[0]


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_weights_and_their_gradient_equal_the_definition(activation, spread):
    samples = random_samples(COUNTS)
    feature = (torch.randn(len(samples), generator=torch.Generator().manual_seed(1)) * spread).to(DEVICE)
    ours = weights_and_gradient(triton_rendering, feature, samples, activation)
    assert_equal_up_to_rounding(
        ours, weights_and_gradient(torch_rendering, feature, samples, activation), torch.float32
    )


@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_opaque_samples_keep_weights_and_gradients_of_the_definition(activation):
    samples = random_samples([30, 20])
    feature = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    feature[[3, 4, 20, 41]] = 1e4
    ours = weights_and_gradient(triton_rendering, feature, samples, activation)
    expected = weights_and_gradient(torch_rendering, feature, samples, activation)
    assert_equal_up_to_rounding(ours, expected, torch.float32)
    assert ours[1].isfinite().all()


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("behind", [[], [0.5]])
@pytest.mark.parametrize("depth", [6.0, 8.0, 12.0, 16.0, 20.0])
def test_rays_of_opaque_samples_alone_have_the_gradients_of_the_definition(activation, behind, depth):
    # Of one ray, as its gradient is small beside others'. depth: sigma times the sample's length, here 0.5.
    density = 2 * torch.tensor([depth, *(depth + more for more in behind)], device=DEVICE)
    samples = random_samples([len(density)])
    samples = dataclasses.replace(samples, delta=torch.full_like(samples.delta, 0.02))
    feature = density + 1 if activation == "softplus" else density
    ours, expected = (
        weights_and_gradient(rendering, feature, samples, activation, -1.0, 25.0)
        for rendering in (triton_rendering, torch_rendering)
    )
    assert expected[1].any()
    for actual, definition in zip(ours, expected, strict=True):
        assert (actual - definition).abs().max() <= 1e-5 * definition.abs().max()


def test_faint_samples_are_as_exact_as_double_precision():
    samples = random_samples([50])
    feature = torch.linspace(-12, -6, 50, device=DEVICE)
    ours = triton_rendering.ray_weights(feature, samples, "softplus", -2.0, 1.0)
    double = dataclasses.replace(samples, delta=samples.delta.double())
    expected = torch_rendering.ray_weights(feature.double(), double, "softplus", -2.0, 1.0)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=0)


def test_a_ray_that_is_no_number_leaves_the_others_alone():
    samples = random_samples([3, 4, 5])
    feature = torch.zeros(12, device=DEVICE)
    feature[4] = float("nan")
    weights, gradient = weights_and_gradient(triton_rendering, feature, samples, "relu", 0.0)
    assert weights[4].isnan()
    for values in (weights, gradient):
        assert values[:3].isfinite().all()
        assert values[7:].isfinite().all()


def test_weights_fall_back_where_distances_ask_for_gradients_and_without_samples():
    samples = random_samples([4, 3])
    delta = samples.delta.clone().requires_grad_()
    feature = torch.ones(7, device=DEVICE)
    weights = triton_rendering.ray_weights(feature, dataclasses.replace(samples, delta=delta), "relu", 0.0, 1.0)
    assert torch.autograd.grad(weights.sum(), delta)[0].abs().max() > 0
    assert triton_rendering.ray_weights(feature[:0], random_samples([0, 0]), "relu", 0.0, 1.0).shape == (0,)


# --- compositing ---
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_composites_and_their_gradients_equal_the_definition(share):
    samples = random_samples(COUNTS)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(len(samples), generator=generator).to(DEVICE)
    coloured = (torch.rand(len(samples), generator=generator) < share).nonzero()[:, 0].to(DEVICE)
    colour = torch.rand(len(coloured), 3, generator=generator).to(DEVICE)
    results = []
    for rendering in (triton_rendering, torch_rendering):
        leaves = weights.clone().requires_grad_(), colour.clone().requires_grad_()
        rgb, opacity, distance = rendering.composite(leaves[0], samples, coloured, leaves[1])
        assert not distance.requires_grad
        gradients = torch.autograd.grad(rgb.sin().sum() + opacity.square().sum(), leaves)
        results.append([rgb.detach(), opacity.detach(), distance, *gradients])
    assert_equal_up_to_rounding(*results, torch.float32)


def test_nothing_composites_to_nothing():
    none = torch.zeros(0, device=DEVICE)
    rgb, opacity, distance = triton_rendering.composite(none, random_samples([0, 0]), none.long(), none.view(0, 3))
    assert not rgb.any()
    assert (rgb.shape, opacity.tolist(), distance.tolist()) == ((2, 3), [0.0] * 2, [0.0] * 2)


@pytest.mark.skipif(not ON_CUDA, reason="too many samples for the interpreter")
def test_more_samples_than_single_precision_can_number_are_weighed_and_composited():
    field, rays = scene(1, False, 800_000)
    samples = marched(triton_rendering, field, rays)
    assert len(samples) > 2**24 + 1000
    generator = torch.Generator(DEVICE).manual_seed(0)
    feature = torch.randn(len(samples), device=DEVICE, generator=generator)
    ours = weights_and_gradient(triton_rendering, feature, samples, "softplus")
    expected = weights_and_gradient(torch_rendering, feature, samples, "softplus")
    assert_equal_up_to_rounding(ours, expected, torch.float32)
    coloured = torch.arange(2**24 - 500, 2**24 + 500, device=DEVICE)
    colour = torch.rand(1000, 3, device=DEVICE, generator=generator)
    rgbs = [r.composite(expected[0], samples, coloured, colour) for r in (triton_rendering, torch_rendering)]
    assert_equal_up_to_rounding(*rgbs, torch.float32)


# --- evaluation: lookups and weights together, until a ray is opaque ---
def weighed(field, samples, fused, double=False):
    """Weights of the samples, by the kernel of evaluations or by the definition on the CPU, maybe in double
    precision."""
    activation = (field.config.density_activation, field.config.density_shift, field.config.distance_scale)
    planes, lines = field.density_factors()
    with torch.no_grad():
        if fused:
            return triton_evaluation.weights_until_opaque(planes, lines, samples, *activation).cpu()
        own = lambda x: x.detach().cpu().double() if double else x.detach().cpu()  # noqa: E731
        planes, lines, position = [own(x) for x in planes], [own(x) for x in lines], own(samples.position)
        definition = torch_lookups
        features = definition.vm_density(planes, lines, position) if planes else definition.cp_density(lines, position)
        parts = {name: getattr(samples, name).cpu() for name in ("ray", "offsets")}
        parts |= {name: own(getattr(samples, name)) for name in ("t", "delta")}
        return torch_rendering.ray_weights(features, Samples(position=position, **parts), *activation)


def opaque_case(model, density, scale, exact=False):
    """(field, samples): lines times `scale`, with which many rays become opaque if it is large. exact: all numbers are
    such that features have no rounding, in whatever order they are summed."""
    field = random_field(4, model, masked=False).to(DEVICE)
    field.config = dataclasses.replace(field.config, density_activation=density)
    with torch.no_grad():
        for factors in field.density_factors() if exact else []:
            for factor in factors:
                factor.copy_((2 * factor).round() / 2)
        for line in field.density_line:
            line.mul_(scale)
    rays = random_rays(4, 500 if ON_CUDA else 7)
    samples = marched(torch_rendering, field, Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE)))
    if exact:  # a quarter of a cell, as all numbers of cells are even
        assert all(n % 2 for n in field.grid_size)
        samples.position.copy_((4 * samples.position).round() / 4)
    assert samples.offsets.diff().max() > triton_evaluation._SEGMENT
    return field, samples


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
@pytest.mark.parametrize("density", ["softplus", "relu"])
@pytest.mark.parametrize(("scale", "exact"), [(0.03, False), (32.0, True)])
def test_weights_until_opaque_equal_the_definitions(model, density, scale, exact):
    field, samples = opaque_case(model, density, scale, exact)
    ours, expected = (weighed(field, samples, fused) for fused in (True, False))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    opaque = torch.zeros(samples.n_rays).index_add_(0, samples.ray.cpu(), expected) > 0.999
    assert opaque.any() if scale > 1 else not opaque.all()


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
@pytest.mark.parametrize("density", ["softplus", "relu"])
def test_weights_until_opaque_are_as_exact_as_the_definition_where_features_are_in_the_hundreds(model, density):
    # There the order of a feature's sum alone changes weights by 1e-4: torch's grid_sample and its gathers differ so.
    field, samples = opaque_case(model, density, 30.0)
    exact = weighed(field, samples, False, double=True).float()
    ours, single = ((weighed(field, samples, fused) - exact).abs().max() for fused in (True, False))
    assert ours < 2 * single + 2e-6


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_nothing_is_weighed_behind_an_opaque_sample_nor_looked_up_in_the_segments_behind_it(model):
    field, rays = scene(4, masked=False, n=10)
    field = random_field(4, model, masked=False).to(DEVICE)
    field.config = dataclasses.replace(field.config, density_activation="relu")
    with torch.no_grad():
        for factors in field.density_factors():
            for factor in factors:
                factor.fill_(5.0)
    samples = marched(torch_rendering, field, rays)
    first = samples.offsets[:-1][samples.offsets.diff() > triton_evaluation._SEGMENT]
    assert len(first)
    samples.position[first + triton_evaluation._SEGMENT] = float("nan")  # it would show
    samples.delta[first + triton_evaluation._SEGMENT] = float("nan")
    weights = weighed(field, samples, True)
    assert (weights[first] > 0.99999).all()
    assert not weights[first + 1].any()
    assert not weights[first + triton_evaluation._SEGMENT].any()


def test_distances_that_are_no_numbers_stay_visible_in_the_weights_of_their_ray_alone():
    field, rays = scene(4, masked=False, n=4)
    samples = marched(torch_rendering, field, rays)
    samples.delta[3] = float("nan")
    weights = weighed(field, samples, True)
    assert weights[3].isnan()
    assert weights[samples.ray != samples.ray[3]].isfinite().all()


def test_double_precision_and_no_samples_have_weights_until_opaque_too():
    field, rays = scene(3, masked=False, n=5)
    nothing = Rays(rays.origins * 0 + 9.0, rays.directions.abs() + 0.1)
    assert weighed(field, marched(torch_rendering, field, nothing), True).shape == (0,)
    samples = marched(torch_rendering, field, rays)
    double = dataclasses.replace(samples, position=samples.position.double(), delta=samples.delta.double())
    ours = weighed(field.double(), double, True)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, weighed(field, double, False))


# --- all together ---
@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_a_rendered_field_and_its_gradients_equal_those_of_torch(model):
    results = []
    for lookups, rendering in ((triton_lookups, triton_rendering), (gather_lookups, torch_rendering)):
        field, rays = random_field(1, model).to(DEVICE), random_rays(1, 12)
        field.kernels = kernels.Kernels("", lookups, rendering)
        out = field.render(Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE)), 1.0, None, 61)
        out.rgb.square().sum().backward()
        results.append([out.rgb.detach(), out.depth, *(p.grad for p in field.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().max().item(), 1e-3))


@pytest.mark.skipif(ON_CUDA, reason="tests/test_cuda.py asks CUDA itself")
@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_a_step_waits_for_its_numbers_of_live_and_of_coloured_samples_alone(model):
    field = random_field(1, model)
    field.kernels = kernels.Kernels("", triton_lookups, triton_rendering)
    optimizer = torch.optim.Adam(field.param_groups(0.02, 1e-3), fused=True)
    rays = random_rays(1, 3)
    with Waits() as waits:
        out = field.render(rays, 1.0, torch.rand(3, 1), 61)
        loss = out.rgb.square().mean() + sum(r(field, 1.0) for r in build_regularisers(1e-4, 1e-4, 1e-4, 1e-4))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert waits.count == 2


def test_cuda_takes_triton_where_it_runs():
    kernels._triton.cache_clear()
    chosen = kernels.select(torch.device("cuda"))
    fused = triton_evaluation.weights_until_opaque
    expected = ("cuda-triton", triton_lookups, triton_rendering, fused, foreach_l1.l1_norm, True, triton_network)
    assert chosen == kernels.Kernels(*expected)
    assert kernels.select(torch.device("cpu")).name != "cuda-triton"


def test_without_triton_one_line_says_so_and_torch_serves(monkeypatch, capsys):
    kernels._triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    for _ in range(2):
        assert kernels.select(torch.device("cuda")).lookups is gather_lookups
        assert kernels.select(torch.device("cuda")).rendering is torch_rendering
    assert capsys.readouterr().out.count("triton") == 1
    kernels._triton.cache_clear()


def test_where_triton_cannot_launch_torch_serves(monkeypatch, capsys):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    kernels._triton.cache_clear()
    monkeypatch.setattr(triton_common, "launch_once", fail)
    assert kernels.select(torch.device("cuda")).name == "torch-gather"
    assert "Failed to find C compiler" in capsys.readouterr().out
    kernels._triton.cache_clear()


# --- compiled ahead of time, in a process whose Triton does not interpret ---
@pytest.mark.skipif(ON_CUDA, reason="all of them were compiled for this GPU")
def test_every_kernel_compiles_for_gpus_and_marching_fuses_nothing(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    command = [sys.executable, "-m", "tests.compile_triton"]
    processes = {kind: subprocess.Popen([*command, kind], **pipes) for kind in ("network", "80", "90")}
    ended = {kind: process.communicate() for kind, process in processes.items()}
    assert not any(p.returncode for p in processes.values()), "\n".join(err[-3000:] for _, err in ended.values())
    assert {kind: out.count("compiled") for kind, (out, _) in ended.items()} == {"network": 15, "80": 27, "90": 27}
