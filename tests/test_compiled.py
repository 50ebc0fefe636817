"""The CPU's compiled marching, weights, compositing, network and Adam against torch's; threads; early stop."""

import copy
import ctypes
import dataclasses
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn

from components import compositing, marching, regularisers
from components.types import Rays
from models.chunks import in_chunks
from models.kernels import (
    compiled_adam,
    compiled_l1,
    compiled_network,
    compiled_rendering,
    foreach_l1,
    threads,
    torch_lookups,
)
from models.kernels.compiled import libraries
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES
from models.shading import build_shading
from tests.helpers import counted_in_mask, random_field, random_rays

pytestmark = pytest.mark.skipif(libraries() is None, reason="no compiler here")
N_THREADS = [1, 2, 5]


@pytest.fixture(params=N_THREADS)
def n_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "_taken", request.param)
    return request.param


def close(ours, definition, tolerance=1e-5):
    """Within `tolerance` of the array's largest magnitude."""
    assert ours.shape == definition.shape
    if ours.numel():
        scale = definition.abs().max().clamp_min(1e-30)
        assert ((ours - definition).abs().max() / scale) < tolerance


# --- marching ---
def marched(module, seed, n_rays, masked, jittered, rays=None):
    field = random_field(seed, masked=masked)
    rays = random_rays(seed, n_rays) if rays is None else rays
    jitter = torch.rand(len(rays), 1, generator=torch.Generator().manual_seed(seed)) if jittered else None
    return module.march_box(rays, field.aabb, 0.1, 6.0, field.step, 90, jitter, field.alpha_mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jittered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_marching_keeps_exactly_the_definitions_samples(seed, masked, jittered, n_threads):
    ours, definition = (marched(m, seed, 300, masked, jittered) for m in (compiled_rendering, marching))
    assert len(ours) > 500
    for name in ("ray", "t", "delta", "position", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(definition, name)), name


def marched_in_ndc(module, seed, n_rays, masked, jitter_shape, n_samples=90, rays=None):
    field = random_field(seed, ndc=True, masked=masked)
    rays = random_rays(seed, n_rays, ndc=True) if rays is None else rays
    jitter = torch.rand(jitter_shape, generator=torch.Generator().manual_seed(seed)) if jitter_shape else None
    return module.march_ndc(rays, field.aabb, 0.0, 1.0, n_samples, jitter, field.alpha_mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jitter_shape", [None, (1, 90), (300, 90)])
@pytest.mark.parametrize("seed", range(3))
def test_marching_in_ndc_keeps_exactly_the_definitions_samples(seed, masked, jitter_shape, n_threads):
    ours, definition = (marched_in_ndc(m, seed, 300, masked, jitter_shape) for m in (compiled_rendering, marching))
    assert len(ours) > 500
    for name in ("ray", "t", "delta", "position", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(definition, name)), name


@pytest.mark.parametrize("n_samples", [1, 2, 7, 16, 17])
def test_marching_in_ndc_takes_any_number_of_samples(n_samples):
    ours, definition = (
        marched_in_ndc(m, 5, 60, True, (1, n_samples), n_samples) for m in (compiled_rendering, marching)
    )
    for name in ("ray", "t", "delta", "position", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(definition, name)), name
    nothing = Rays(torch.zeros(0, 3), torch.zeros(0, 3))
    for shape in (None, (1, n_samples), (0, n_samples)):
        assert len(marched_in_ndc(compiled_rendering, 5, 0, True, shape, n_samples, nothing)) == 0


@pytest.mark.parametrize("ndc", [False, True])
def test_double_precision_is_marched_as_in_the_definition(ndc):
    field, rays = random_field(4, ndc=ndc, masked=False), random_rays(4, 50, ndc)
    rays, box = Rays(rays.origins.double(), rays.directions.double()), field.aabb.double()
    if ndc:
        ours, definition = (m.march_ndc(rays, box, 0.0, 1.0, 40) for m in (compiled_rendering, marching))
    else:
        ours, definition = (m.march_box(rays, box, 0.1, 6.0, field.step, 90) for m in (compiled_rendering, marching))
    assert len(ours) > 100
    for name in ("ray", "t", "delta", "position", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(definition, name)), name


@pytest.mark.parametrize("detach", [False, True])
def test_samples_in_ndc_follow_their_rays_gradient_as_in_the_definition(detach):
    gradients = []
    for module in (compiled_rendering, marching):
        plain = random_rays(2, 80, ndc=True)
        leaves = [plain.origins.clone().requires_grad_(), plain.directions.clone().requires_grad_()]
        rays = Rays(*leaves, detach_samples=detach)
        samples = marched_in_ndc(module, 2, 80, True, (1, 90), rays=rays)
        assert samples.position.requires_grad != detach
        loss = (samples.delta * torch.linspace(-1, 1, len(samples))).sum()
        if not detach:
            loss = loss + (samples.position * torch.linspace(-1, 1, 3 * len(samples)).view(-1, 3)).sum()
        gradients.append(torch.autograd.grad(loss, leaves[1:] if detach else leaves))
    for ours, definition in zip(*gradients, strict=True):
        assert torch.equal(ours, definition)


@pytest.mark.parametrize("seed", range(5))
def test_samples_in_the_mask_are_those_of_the_definition(seed, n_threads):
    field, rays = random_field(seed), random_rays(seed, 400)
    ours, expected = (counted_in_mask(module, field, rays) for module in (compiled_rendering, marching))
    assert ours.dtype == expected.dtype == torch.int64
    assert torch.equal(ours, expected)
    assert (expected > 0).sum() > 50
    assert (expected == 0).sum() > 10
    assert counted_in_mask(compiled_rendering, field, rays[:0]).shape == (0,)


def test_more_samples_than_single_precision_can_number_are_marched():
    n_rays, n_samples = 32_320, 520
    rays = random_rays(3, n_rays)
    # As small as the origins and as long as the samples allow, so that each has all of them in the box.
    rays = Rays(0.01 * rays.origins, rays.directions)
    box = torch.tensor([[-9.0, -9.0, -9.0], [9.0, 9.0, 9.0]])
    jitter = torch.rand(n_rays, 1, generator=torch.Generator().manual_seed(0))
    given = (box, 0.1, 9.0, 0.01, n_samples)
    whole = compiled_rendering.march_box(rays, *given, jitter, None)
    assert len(whole) > 2**24 + 10_000
    last = slice(n_rays - 100, None)
    own = marching.march_box(Rays(rays.origins[last], rays.directions[last]), *given, jitter[last], None)
    first = len(whole) - len(own)
    assert first < 2**24
    assert torch.equal(whole.ray[first:] - (n_rays - 100), own.ray)
    assert torch.equal(whole.offsets[last][-100:] - first, own.offsets[1:])
    for name in ("t", "delta", "position"):
        assert torch.equal(getattr(whole, name)[first:], getattr(own, name)), name


def test_no_rays_and_rays_that_miss_have_no_samples():
    nothing = Rays(torch.zeros(0, 3), torch.zeros(0, 3))
    away = Rays(torch.full((5, 3), 50.0), torch.tensor([[0.0, 0.0, 1.0]]).expand(5, 3))
    for rays in (nothing, away):
        samples = marched(compiled_rendering, 0, 0, True, False, rays)
        assert len(samples) == 0
        assert samples.offsets.tolist() == [0] * (len(rays) + 1)


def test_rays_that_are_no_numbers_have_no_samples_and_disturb_no_other():
    rays = random_rays(1, 50)
    broken = rays.origins.clone()
    broken[7] = float("nan")
    ours = marched(compiled_rendering, 1, 50, True, False, Rays(broken, rays.directions))
    whole = marched(compiled_rendering, 1, 50, True, False, rays)
    assert not (ours.ray == 7).any()
    assert torch.equal(ours.t[ours.ray != 7], whole.t[whole.ray != 7])


def test_masks_of_another_kind_and_cells_that_lie_apart_are_taken():
    class Half:
        def occupied(self, xyz):
            return xyz[:, 0] > 0

    field, rays = random_field(3, masked=True), random_rays(3, 50)
    apart = copy.deepcopy(field.alpha_mask)
    apart.cells = apart.cells.repeat_interleave(2, -1)[..., ::2]
    assert not apart.cells.is_contiguous()
    for mask in (Half(), apart):
        given = (rays, field.aabb, 0.1, 6.0, field.step, 90, None, mask)
        ours, definition = compiled_rendering.march_box(*given), marching.march_box(*given)
        assert len(ours) > 100
        assert torch.equal(ours.position, definition.position)
        assert torch.equal(*(counted_in_mask(m, field, rays, mask) for m in (compiled_rendering, marching)))


@pytest.mark.parametrize("cells", ["a volume", "another kind of mask"])
def test_samples_in_double_precision_are_counted_in_the_mask_as_in_the_definition(cells):
    field, rays = random_field(3, masked=True), random_rays(3, 50)
    rays = Rays(rays.origins.double(), rays.directions.double())
    mask = None if cells == "a volume" else (type("Half", (), {"occupied": lambda _, xyz: xyz[:, 0] > 0}))()
    ours, definition = (counted_in_mask(m, field, rays, mask) for m in (compiled_rendering, marching))
    assert torch.equal(ours, definition)
    assert definition.sum() > 50


def test_rays_that_lie_apart_in_memory_are_marched():
    field, rays = random_field(3, masked=True), random_rays(3, 3000)
    apart = Rays(rays.origins.t().contiguous().t(), rays.directions.t().contiguous().t())
    assert not apart.origins.is_contiguous()
    ours, definition = (
        module.march_box(own, field.aabb, 0.1, 6.0, field.step, 90, None, field.alpha_mask)
        for module, own in ((compiled_rendering, apart), (marching, rays))
    )
    for name in ("ray", "t", "delta", "position", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(definition, name)), name


@pytest.mark.parametrize("detach", [False, True])
def test_samples_follow_their_rays_gradient_as_in_the_definition(detach):
    gradients = []
    for module in (compiled_rendering, marching):
        plain = random_rays(2, 80)
        leaves = [plain.origins.clone().requires_grad_(), plain.directions.clone().requires_grad_()]
        samples = marched(module, 2, 80, True, True, Rays(*leaves, detach_samples=detach))
        assert samples.position.requires_grad != detach
        if not detach:
            upstream = torch.linspace(-1, 1, samples.position.numel()).view_as(samples.position)
            gradients.append(torch.autograd.grad((samples.position * upstream).sum(), leaves))
    for ours, definition in zip(*gradients, strict=True) if gradients else ():
        assert torch.equal(ours, definition)


# --- weights and compositing ---
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("seed", range(3))
def test_distances_have_the_gradients_of_the_definition(activation, seed, n_threads):
    given = marched(marching, seed, 200, True, True)
    start = 3 * torch.randn(len(given), generator=torch.Generator().manual_seed(seed))
    upstream, results = torch.linspace(-1, 1.5, len(given)), []
    for module, dtype in ((compiled_rendering, torch.float32), (compositing, torch.float64)):
        feature, delta = (x.to(dtype).requires_grad_() for x in (start.clone(), given.delta.clone()))
        weights = module.ray_weights(feature, dataclasses.replace(given, delta=delta), activation, -1.0, 25.0)
        results.append(torch.autograd.grad((weights * upstream.to(dtype)).sum(), (feature, delta)))
    for ours, definition in zip(*results, strict=True):
        close(ours, definition)


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("seed", range(3))
def test_weights_and_colours_of_rays_equal_the_definition_forward_and_backward(activation, seed, n_threads):
    samples = marched(marching, seed, 200, True, True)
    generator = torch.Generator().manual_seed(seed)
    start = 6 * torch.randn(len(samples), generator=generator)
    results = []
    for module in (compiled_rendering, compositing):
        feature = start.clone().requires_grad_()
        weights = module.ray_weights(feature, samples, activation, -1.0, 25.0)
        coloured = (weights > 1e-3).nonzero()[:, 0] if not results else results[0][-1]
        colour = torch.rand(len(coloured), 3, generator=torch.Generator().manual_seed(9)).requires_grad_()
        rgb, opacity, distance = module.composite(weights, samples, coloured, colour)
        assert not distance.requires_grad
        upstream = torch.linspace(-1, 1, 800).view(200, 4)
        loss = (torch.cat([rgb, opacity[:, None]], 1) * upstream).sum()
        results.append([weights, rgb, opacity, distance, *torch.autograd.grad(loss, [feature, colour]), coloured])
    assert len(results[0][-1]) > 100
    for ours, definition in zip(results[0][:-1], results[1][:-1], strict=True):
        close(ours, definition)


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("behind", [[], [0.5]])
@pytest.mark.parametrize("depth", [6.0, 8.0, 12.0, 16.0, 20.0])
def test_rays_of_opaque_samples_alone_have_the_gradients_of_the_definition(activation, behind, depth):
    # Of one ray, as its gradient is small beside others'. depth: sigma times the sample's length, here 0.5.
    density = 2 * torch.tensor([depth, *(depth + more for more in behind)])
    n = len(density)
    ones = torch.ones(n)
    samples = marching.Samples(ones.long() - 1, ones, 0.02 * ones, torch.zeros(n, 3), torch.tensor([0, n]))
    results = []
    for module in (compiled_rendering, compositing):
        feature = (density + 1 if activation == "softplus" else density).requires_grad_()
        weights = module.ray_weights(feature, samples, activation, -1.0, 25.0)
        results.append([weights, *torch.autograd.grad(weights, feature, torch.linspace(1, -1, n))])
    assert results[1][1].any()
    for ours, definition in zip(*results, strict=True):
        close(ours, definition)


def test_more_samples_than_single_precision_can_number_are_weighed_and_composited():
    counts = torch.full((2**16 + 3,), 256)
    ray, offsets = torch.repeat_interleave(counts), nn.functional.pad(counts.cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(len(ray), generator=generator)
    t = torch.linspace(0, 1, 256).repeat(len(counts))
    samples = marching.Samples(ray, t, torch.full_like(t, 0.02), torch.empty(0, 3), offsets)
    # The last four rays, the first of which ends at sample 2^24, as rays of their own.
    first = 2**24 - 256
    last = marching.Samples(ray[first:] - ray[first], t[first:], samples.delta[first:], samples.position, offsets[:5])
    coloured, colour = torch.arange(first, len(ray), 7), torch.rand(147, 3, generator=generator)
    results = []
    for module, own, begin in ((compiled_rendering, samples, 0), (compositing, last, first)):
        feature_in, colour_in = feature[begin:].clone().requires_grad_(), colour.clone().requires_grad_()
        weights = module.ray_weights(feature_in, own, "softplus", -1.0, 25.0)
        rgb, opacity, distance = (x[-4:] for x in module.composite(weights, own, coloured - begin, colour_in))
        gradients = torch.autograd.grad((rgb.sum(1) * opacity).sum(), [feature_in, colour_in])
        results.append([weights[-1024:], rgb, opacity, distance, gradients[0][-1024:], gradients[1]])
    for ours, definition in zip(*results, strict=True):
        close(ours, definition)


def test_features_that_are_no_numbers_stay_visible_in_the_weights():
    samples = marched(marching, 0, 50, False, False)
    feature = torch.zeros(len(samples))
    feature[3] = float("nan")
    for activation in ("softplus", "relu"):
        weights = compiled_rendering.ray_weights(feature, samples, activation, 0.0, 25.0)
        assert weights[3].isnan()
        assert weights[samples.ray != samples.ray[3]].isfinite().all()


@pytest.mark.parametrize("model_name", ["TensorVMSplit", "TensorCP"])
@pytest.mark.parametrize("ndc", [False, True])
def test_evaluations_that_stop_behind_opaque_samples_show_the_same_picture(model_name, ndc, n_threads):
    field, rays = random_field(4, model_name=model_name, ndc=ndc), random_rays(4, 200, ndc)
    with torch.no_grad():
        for line in field.density_line:
            line.mul_(30.0)  # many rays become opaque
        fast = field.render(rays, 1.0)
    whole = field.render(rays, 1.0)
    assert (whole.opacity > 0.999).any()
    assert fast.n_live == whole.n_live
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(getattr(fast, name), getattr(whole, name).detach(), rtol=1e-5, atol=2e-6)


def test_nothing_is_looked_up_behind_an_opaque_sample():
    field, rays = random_field(4, masked=False), random_rays(4, 100)
    with torch.no_grad():
        for factor in (*field.density_plane, *field.density_line):
            factor.copy_(torch.full_like(factor, 5.0))
        samples = field.march(rays, None, 90)
        weights = field.weights(samples)
    first = samples.offsets[:-1][samples.offsets.diff() > 1]
    assert (weights[first] > 0.99999).all()
    assert not weights[first + 1].any()


@pytest.mark.parametrize("module", [compiled_rendering, compositing], ids=lambda module: module.__name__)
def test_gradients_of_gradients_of_weights_and_colours_of_rays_are_refused(module):
    samples = marched(marching, 0, 20, True, True)
    feature = torch.ones(len(samples), requires_grad=True)
    weights = module.ray_weights(feature, samples, "relu", 0.0, 25.0)
    (gradient,) = torch.autograd.grad(weights.square().sum(), feature, create_graph=True)
    refused(gradient)
    if module is compiled_rendering:
        colour = torch.full((len(samples), 3), 0.5, requires_grad=True)
        rgb, *_ = module.composite(weights.detach().requires_grad_(), samples, torch.arange(len(samples)), colour)
        refused(*torch.autograd.grad(rgb.square().sum(), colour, create_graph=True))


def refused(gradient):
    """Its own gradient would silently lack terms."""
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


# --- the network ---
SHAPES = [(27, 2, 2, 128, 5000), (27, 2, 2, 64, 3), (5, 0, 3, 100, 129), (12, 6, 0, 40, 64), (1, 1, 1, 1, 1)]


def shaded(colours, n_features, view_pe, fea_pe, hidden, n, scale=3.0, cp=False, dtype=torch.float32):
    """(rgb, gradients of positions, views, basis, all parameters, all factors) of n samples of about n / 3 rays."""
    torch.manual_seed(n)
    module = build_shading("MLP_Fea", n_features, view_pe, fea_pe, 0, hidden)
    sizes, counts = (7, 4, 9), (5, 5, 5) if cp else (3, 20, 5)
    planes = [] if cp else [torch.randn(1, c, sizes[v], sizes[u]) for c, (u, v) in zip(counts, PLANE_AXES, strict=True)]
    lines = [torch.randn(1, c, sizes[w], 1) for c, w in zip(counts, LINE_AXES, strict=True)]
    basis = scale * torch.randn(n_features, 5 if cp else 28) / 5
    position, view = 2.2 * torch.rand(n, 3) - 1.1, nn.functional.normalize(torch.randn(n // 3 + 1, 3), dim=-1)
    ray, upstream = torch.randint(len(view), (n,)).sort().values, torch.randn(n, 3)
    leaves = [x.to(dtype).requires_grad_() for x in (position, view, basis, *planes, *lines)]
    module = module.to(dtype)
    rgb = colours(module, leaves[3:-3], leaves[-3:], leaves[2], leaves[0], leaves[1], ray)
    return [rgb, *torch.autograd.grad((rgb * upstream).sum(), [*leaves, *module.parameters()])]


def defined(module, planes, lines, basis, position, view, ray):
    """Colours by the definitions."""
    lookups = torch_lookups
    features = (
        lookups.vm_appearance(planes, lines, basis, position)
        if planes
        else lookups.cp_appearance(lines, basis, position)
    )
    return module(features, view[ray], position)


def test_random_numbers_of_the_tests_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    with torch.random.fork_rng():
        shaded(compiled_network.colours, 5, 1, 1, 8, 4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("cp", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_colours_equal_the_definition_forward_and_backward(shape, cp, n_threads):
    with torch.random.fork_rng():
        ours = shaded(compiled_network.colours, *shape, cp=cp)
        definition = shaded(defined, *shape, cp=cp, dtype=torch.float64)
    for a, b in zip(ours, definition, strict=True):
        close(a, b)


def test_more_samples_than_a_block_change_nothing(monkeypatch):
    with torch.random.fork_rng():
        whole = shaded(compiled_network.colours, 27, 2, 2, 64, 3333)
        monkeypatch.setattr(compiled_network, "_BLOCK", 1000)
        blocks = shaded(compiled_network.colours, 27, 2, 2, 64, 3333)
    for a, b in zip(blocks, whole, strict=True):
        close(a, b)


def test_more_samples_than_single_precision_can_number_are_coloured(monkeypatch):
    monkeypatch.setattr(compiled_network, "_BLOCK", 1 << 20)  # fewer calls than for the cache
    n, generator = 2**24 + 600, torch.Generator().manual_seed(0)
    # Some samples, and the last ones, whose numbers float32 cannot tell apart; gradients flow to these alone.
    some = torch.cat([torch.arange(0, 2**24, 50_000), torch.arange(2**24 - 3, n)])
    position = torch.rand(n, 3, generator=generator).mul_(2.2).sub_(1.1)
    view, ray = torch.randn(n // 64 + 1, 3, generator=generator), torch.arange(n) // 64
    upstream, results = torch.randn(len(some), 3, generator=generator), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_shading("MLP_Fea", 1, 0, 0, 0, 4)
        leaves = [torch.randn(1, 1, size, 1).requires_grad_() for size in (4, 3, 5)] + [
            torch.randn(1, 1).requires_grad_()
        ]
    for colours, chosen in ((compiled_network.colours, slice(None)), (defined, some)):
        given = (module, [], leaves[:3], leaves[3], position[chosen], view, ray[chosen])
        rgb = colours(*given)
        rgb = rgb if len(rgb) == len(some) else rgb[some]
        results.append([rgb, *torch.autograd.grad((rgb * upstream).sum(), [*leaves, *module.parameters()])])
    for ours, definition in zip(*results, strict=True):
        close(ours, definition)


@pytest.mark.parametrize("kept", [0, 64, 1024, 3328])
def test_hidden_layers_that_are_made_again_are_those_that_were_stored(monkeypatch, kept):
    with torch.random.fork_rng():
        stored = shaded(compiled_network.colours, 27, 2, 2, 64, 3333)
        monkeypatch.setattr(compiled_network, "_KEPT", kept)
        made_again = shaded(compiled_network.colours, 27, 2, 2, 64, 3333)
    assert all(torch.equal(a, b) for a, b in zip(made_again, stored, strict=True))


def test_the_number_of_threads_changes_no_bit_of_the_network(monkeypatch):
    results = []
    for n in (1, 2, 3, 2):
        monkeypatch.setattr(threads, "_taken", n)
        with torch.random.fork_rng():
            results.append(shaded(compiled_network.colours, 27, 2, 2, 128, 20_000))
    for other in results[1:]:
        # The factors' gradients, last but six, are the same for one number of threads only.
        assert all(torch.equal(a, b) for a, b in zip(results[0][:4], other[:4], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(results[0][-6:], other[-6:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))


def test_angles_of_any_size_and_features_that_are_no_numbers_are_taken():
    with torch.random.fork_rng():
        ours = shaded(compiled_network.colours, 27, 2, 2, 128, 300, scale=1e5)
        definition = shaded(defined, 27, 2, 2, 128, 300, scale=1e5)
    assert (ours[0] - definition[0]).abs().median() < 1e-3  # an angle of 1e5 has a rounding of 0.01
    module = build_shading("MLP_Fea", 4, 1, 1, 0, 8)
    lines = [torch.ones(1, 2, 3, 1) for _ in range(3)]
    lines[0][0, 0, 0] = float("nan")
    position = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [0.5, 0.5, 0.5]])
    view, ray = torch.zeros(1, 3), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        rgb = compiled_network.colours(module, [], lines, torch.ones(4, 2), position.flip(1), view, ray)
    assert rgb[1].isnan().all()
    assert rgb[[0, 2]].isfinite().all()


def test_the_network_takes_no_samples():
    with torch.random.fork_rng():
        results = shaded(compiled_network.colours, 27, 2, 2, 128, 0)
    assert results[0].shape == (0, 3)
    assert not any(gradient.any() for gradient in results[1:])


def test_gradients_of_gradients_of_colours_are_refused():
    with torch.random.fork_rng():
        module, basis = build_shading("MLP_Fea", 4, 1, 1, 0, 8), torch.randn(4, 2).requires_grad_()
        lines, view, ray = [torch.randn(1, 2, 3, 1) for _ in range(3)], torch.zeros(1, 3), torch.zeros(5).long()
        fused = compiled_network.colours(module, [], lines, basis, torch.rand(5, 3), view, ray)
        features = torch.rand(5, 4) @ basis
        chunked = in_chunks(nn.Linear(2, 3), 2, features)
    for rgb in (fused, chunked):
        refused(*torch.autograd.grad(rgb.square().sum(), basis, create_graph=True))


def test_only_what_the_library_computes_is_given_to_it():
    features, view = torch.zeros(2, 27), torch.zeros(2, 3)
    module = build_shading("MLP_Fea", 27, 2, 2, 0, 16)
    assert compiled_network.serves(module, features, view)
    assert not compiled_network.serves(module, features.double(), view)
    assert not compiled_network.serves(build_shading("MLP", 27, 2, 2, 0, 16), features, view)
    assert not compiled_network.serves(build_shading("MLP_Fea", 27, 2, 2, 0, 16, "bfloat16"), features, view)
    module.mlp[0].weight.requires_grad_(False)
    assert not compiled_network.serves(module, features, view)


# --- bfloat16 ---
def test_bfloat16_changes_colours_a_little_and_every_parameter_still_learns():
    field, rays = random_field(5), random_rays(5, 200)
    exact = field.render(rays, 1.0).rgb.detach()
    field.set_mlp_dtype("bfloat16")
    out = field.render(rays, 1.0)
    difference = (out.rgb - exact).abs().max()
    assert 0 < difference < 0.02
    out.rgb.sum().backward()
    for parameter in field.renderModule.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_bfloat16_products_are_those_of_torchs_autocast():
    generator = torch.Generator().manual_seed(2)
    module = build_shading("MLP_Fea", 27, 2, 2, 0, 64, "bfloat16")
    features = torch.randn(500, 27, generator=generator, requires_grad=True)
    view, upstream = torch.randn(500, 3, generator=generator), torch.randn(500, 3, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        definition = module.mlp(torch.cat(module.inputs(features, view, view), -1))
    results = [module(features, view, view), torch.sigmoid(definition.float())]
    inputs = [features, *module.parameters()]
    gradients = [torch.autograd.grad(result, inputs, upstream) for result in results]
    # A sum in another order may be rounded to the next number of bfloat16, 2^-8 away.
    for a, b in zip(*([result, *own] for result, own in zip(results, gradients, strict=True)), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


# --- Adam ---
def adam_steps(kind, shape, steps=4):
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    start = torch.randn(*shape, generator=generator).contiguous(memory_format=layout)
    parameter = nn.Parameter(start)
    optimizer = kind([{"params": [parameter], "lr": 0.02}], betas=(0.9, 0.99))
    for _ in range(steps):
        parameter.grad = torch.randn(*shape, generator=generator)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("shape", [(3,), (700, 500), (1, 16, 30, 41), (1, 5, 9, 1)], ids=str)
def test_adam_takes_torchs_steps(shape, n_threads):
    (ours, optimizer), (definition, torchs) = (
        adam_steps(k, shape) for k in (compiled_adam.CompiledAdam, torch.optim.Adam)
    )
    close(ours.detach(), definition.detach(), 3e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        close(optimizer.state[ours][key], torchs.state[definition][key], 3e-6)
        assert optimizer.state[ours][key].stride() == ours.stride()
    assert optimizer.state[ours]["step"] == 4


def test_adams_state_is_torchs_and_can_go_on_there():
    ours, optimizer = adam_steps(compiled_adam.CompiledAdam, (1, 16, 30, 41))
    definition, torchs = adam_steps(torch.optim.Adam, (1, 16, 30, 41))
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        definition.copy_(ours)
    for parameter, its in ((ours, optimizer), (definition, torchs)):
        parameter.grad = torch.ones_like(parameter)
        its.step()
    close(ours.detach(), definition.detach(), 3e-6)


def test_adam_leaves_what_has_no_gradient_alone():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = compiled_adam.CompiledAdam([parameter])
    optimizer.step()
    assert parameter.tolist() == [1.0] * 3
    assert not optimizer.state


# --- threads ---
@pytest.mark.parametrize("shapes", [[(1, 16, 70, 90), (1, 16, 200, 1)], [(1, 3, 5, 1)], [(1, 48, 128, 300)]], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("module", [compiled_l1, foreach_l1], ids=lambda module: module.__name__)
def test_the_l1_norm_and_its_signs_equal_the_definitions(module, shapes, layout, n_threads):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=generator).contiguous(memory_format=layout) for shape in shapes]
    for factor in factors:
        factor.flatten()[::7] = 0  # as what was never looked up
        factor[0, :, 0, 0] = 0
        factor.requires_grad_()
    for planes, lines in ((factors[:1], factors[1:]), ([], factors)):
        ours = module.l1_norm(planes, lines)
        # In double precision: torch's norm of a million floats is off by 2e-4, and the other one is torch's.
        definition = regularisers.l1_norm([x.double() for x in planes], [x.double() for x in lines])
        close(ours, definition, 1e-6 if module is compiled_l1 else 1e-3)
        for a, b in zip(*(torch.autograd.grad(3 * value, factors) for value in (ours, definition)), strict=True):
            close(a, b, 1e-6)
            assert (a == 0).any()


def test_the_l1_norm_and_adam_take_more_values_than_single_precision_can_number():
    line = nn.Parameter(torch.ones(1, 1, 2**24 + 3, 1))
    with torch.no_grad():
        line[0, 0, -3:, 0] = torch.tensor([-1.0, 2.0, 0.0])
    norm = compiled_l1.l1_norm([], [line])
    assert norm.item() == pytest.approx(1.0, abs=1e-6)
    (norm * line.numel()).backward()
    assert line.grad[0, 0, -4:, 0].tolist() == pytest.approx([1.0, -1.0, 1.0, 0.0], rel=1e-6)
    compiled_adam.CompiledAdam([line], lr=0.5).step()
    assert line[0, 0, -4:, 0].tolist() == pytest.approx([0.5, -0.5, 1.5, 0.0], rel=1e-5)


@pytest.mark.parametrize("module", [compiled_l1, foreach_l1], ids=lambda module: module.__name__)
def test_the_l1_norm_of_what_is_no_number_is_none(module):
    assert module.l1_norm([], [torch.tensor([1.0, float("nan")]).view(1, 1, 2, 1)]).isnan()


def test_every_call_runs_once_in_some_thread_with_the_callers_gradient_mode(n_threads):
    seen = []
    with torch.no_grad():
        threads.together([lambda n=n: seen.append((n, torch.is_grad_enabled())) for n in range(50)])
    assert sorted(seen) == [(n, False) for n in range(50)]


def test_an_error_in_a_share_is_raised(n_threads):
    def fail():
        raise ValueError("a share")

    with pytest.raises(ValueError, match="a share"):
        threads.together([lambda: None, fail, lambda: None])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_no_other_share_is_begun(n_threads, error):
    begun = []

    def share(number):
        begun.append(number)
        if number == 3:
            raise error
        time.sleep(0.001)

    with pytest.raises(error):
        threads.together([partial(share, number) for number in range(2000)])
    assert 3 in begun
    assert len(begun) < 200
    assert threads.count() == n_threads


def test_a_share_has_one_thread(n_threads):
    counts = []
    threads.together([lambda: counts.append(threads.count()) for _ in range(20)])
    assert counts == [1] * 20
    assert threads.count() == n_threads


def test_taking_over_gives_torch_one_thread_and_its_own_back_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads.taking_over():
            assert (torch.get_num_threads(), threads.count()) == (1, 3)
            with threads.taking_over():
                assert threads.count() == 3
            assert torch.get_num_threads() == 1
        assert (torch.get_num_threads(), threads.count()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_chunks_side_by_side_equal_the_whole(n_threads):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(1000, 4, requires_grad=True)
    whole, parts = module(x), in_chunks(module, 64, x)
    torch.testing.assert_close(parts, whole)
    inputs = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (parts, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- memory that does not suffice ---
SHORT_OF_MEMORY = """
import ctypes, resource
import torch
from models.kernels import compiled_lookups, compiled_network, threads
from models.kernels.compiled import libraries
from models.kernels.compiled_rendering import _at
from models.shading import build_shading
from utils.shortage import is_shortage

def refused(name, call):
    try:
        call()
    except MemoryError as error:
        assert is_shortage(error) and name in str(error), error
        print(name, "refused")

# In shares, whichever thread takes them: rays whose sample counts no memory can hold.
x = torch.zeros(1)
offsets = torch.tensor([0, 1 << 60]).repeat(1000)
ends = ctypes.c_int64(len(offsets) - 1), 1, ctypes.c_float(0), ctypes.c_float(1)
given = *[_at(x)] * 2, _at(offsets), *[_at(x)] * 3, *ends, _at(x)
for n in (1, 4):
    refused("weights_backward", lambda: libraries()["rendering"].weights_backward(*given, n))

# Under a limit: before the shares, for what so many threads would need, and in them, for lines of so many points.
generator = torch.Generator().manual_seed(0)
lines = [torch.randn(1, 5, 7, 1, generator=generator).requires_grad_() for _ in range(3)]
module = build_shading("MLP_Fea", 27, 2, 2, 0, 512)
inputs = torch.rand(3, 3, generator=generator), torch.rand(1, 3, generator=generator), torch.zeros(3, dtype=torch.int64)
position, upstream = torch.rand(3000, 3, generator=generator), torch.ones(3000)

def colours():
    return compiled_network.colours(module, [], lines, torch.ones(27, 5), *inputs)

def gradients(x):
    return torch.autograd.grad(x.sum(), lines, retain_graph=True)

rgb, density = colours(), compiled_lookups.cp_density(lines, position)
before = [rgb, *gradients(rgb), *gradients(density)]
long = compiled_lookups.Factors(compiled_lookups.CP_AXES, lines)
long.into(into := [torch.empty_like(line) for line in lines])
long.grid[:] = [2**31 - 1] * 3
used_pages = int(open("/proc/self/statm").read().split()[0])
threads._taken, allowed = 1000, resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used_pages * resource.getpagesize() + (256 << 20), allowed[1]))
refused("colours_forward", colours)
refused("colours_backward", lambda: gradients(rgb))
threads._taken = 2
refused("scatter", lambda: long.scatter(position, upstream))
resource.setrlimit(resource.RLIMIT_AS, allowed)
threads._taken = None
after = [colours(), *gradients(rgb), *gradients(density)]
assert all(torch.equal(a, b) for a, b in zip(before, after))
print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory the process has as Linux tells it")
def test_a_lack_of_memory_inside_the_libraries_is_a_memory_error_and_the_process_goes_on():
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    names = ("weights_backward", "weights_backward", "colours_forward", "colours_backward", "scatter")
    assert done.stdout.splitlines()[-6:] == [*(f"{name} refused" for name in names), "goes on"], done.stderr
    assert done.returncode == 0


def test_structures_have_the_sizes_of_the_compilers():
    # ctypes lays structures out as C does; a field forgotten on one side would shift all that follow.
    assert ctypes.sizeof(compiled_rendering._Rays) == 4 * 8 + 10 * 4 + 3 * 8
    assert ctypes.sizeof(compiled_rendering._Mask) == 8 + 3 * 8 + 6 * 4 + 8
    assert ctypes.sizeof(compiled_network._Colours) == 5 * 8 + 14 * 8 + 4 * 4
    assert ctypes.sizeof(compiled_adam._Parameter) == 5 * 8 + 5 * 4 + 4
    assert ctypes.sizeof(compiled_l1._Array) == 3 * 8 + 2 * 4
