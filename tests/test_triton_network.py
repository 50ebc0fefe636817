"""Triton's colour network against FeatureNetwork itself: on a CUDA device (marked cuda then), or interpreted on the
CPU."""

import copy
import random

import pytest
import torch
from torch import nn

from models.shading import build_shading
from tests.helpers import exact_products, random_field, random_rays

pytest.importorskip("triton", reason="Triton is not installed")
from models import kernels
from models.kernels import triton_lookups, triton_network, triton_rendering

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = [pytest.mark.skipif(ON_CUDA and not triton_network.suits(torch.device("cuda")), reason="not for this GPU")]
pytestmark += [pytest.mark.cuda] if ON_CUDA else []

# Features, frequencies of the view and of the features, hidden units, samples.
SHAPES = [(27, 2, 2, 128, 700), (27, 2, 2, 64, 3), (5, 0, 3, 100, 129), (12, 6, 0, 40, 64), (1, 1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def _without_tf32():
    with exact_products():
        yield


class Case:
    """A network, its inputs and d loss / d rgb, on DEVICE; the definition is taken in double precision on the CPU."""

    def __init__(self, n_features, view_pe, fea_pe, hidden, n, scale=2.0, dtype="float32", seed=0):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.module = build_shading("MLP_Fea", n_features, view_pe, fea_pe, 0, hidden, dtype)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(normal(*parameter.shape) / max(parameter.shape[-1], 4) ** 0.5)
        self.features, self.upstream = scale * normal(n, n_features), normal(n, 3)
        self.view = nn.functional.normalize(normal(n // 3 + 1, 3), dim=-1)
        self.ray = torch.randint(len(self.view), (n,), generator=generator).sort().values
        self.upstream[self.near_a_kink()] = 0.0

    def near_a_kink(self):
        """[K] bool: samples with a hidden unit so close to 0 that rounding decides whether it has a gradient."""
        module = copy.deepcopy(self.module).double()
        features, view = self.features.double(), self.view.double()[self.ray]
        z1 = module.mlp[0](torch.cat(module.inputs(features, view, features), -1))
        z2 = module.mlp[2](z1.relu())
        return (torch.cat([z1, z2], -1).abs() < 2e-5).any(-1)

    def results(self, count=None, colours=triton_network.colours):
        """rgb [K, 3] and the gradients of features, views and parameters, by Triton's kernels."""
        module = self.module.to(DEVICE)
        features, view = (x.to(DEVICE).requires_grad_() for x in (self.features.clone(), self.view.clone()))
        count = None if count is None else torch.tensor(count, device=DEVICE)
        rgb = colours(module, features, view, self.ray.to(DEVICE), count)
        gradients = torch.autograd.grad(rgb, [features, view, *module.parameters()], self.upstream.to(DEVICE))
        return [x.detach().cpu() for x in (rgb, *gradients)]

    def definition(self, count=None):
        """The same by the module; without the samples from `count` on."""
        module, some = self.module.cpu().double(), slice(count)
        features, view = (x.double().requires_grad_() for x in (self.features, self.view))
        rgb = module(features, view[self.ray], features)
        upstream = torch.zeros_like(rgb)
        upstream[some] = self.upstream[some].double()
        results = [rgb, *torch.autograd.grad(rgb, [features, view, *module.parameters()], upstream)]
        self.module.float()
        return [x.detach().float() for x in results]


def by_torch(module, features, view, ray, count):
    """What triton_network.colours stands for."""
    return module(features, view[ray], features)


def assert_close(ours, definition, tolerance=1e-5):
    for number, (a, b) in enumerate(zip(ours, definition, strict=True)):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), number


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_colours_and_gradients_equal_the_definition(shape):
    case = Case(*shape)
    assert_close(case.results(), case.definition())


@pytest.mark.parametrize("seed", range(4))
def test_colours_and_gradients_equal_the_definition_for_random_shapes(seed):
    rng = random.Random(seed)
    fea_pe, view_pe = rng.randint(0, 2), rng.randint(0, 6)
    case = Case(rng.randint(1, 64), view_pe, fea_pe, rng.randint(1, 128), rng.randint(1, 5000 if ON_CUDA else 400))
    assert_close(case.results(), case.definition())


@pytest.mark.parametrize("count", [0, 1, 63, 64, 200, 300])
def test_samples_that_are_nobodys_are_black_and_change_nothing(count, monkeypatch):
    monkeypatch.setattr(triton_network, "_CHUNK", 128)
    case = Case(9, 1, 2, 20, 300)
    with torch.no_grad():
        case.features[count:] = 1e4  # whatever it is
    ours, definition = case.results(count), case.definition(count)
    definition[0][count:] = 0.0
    if count:
        assert_close(ours, definition)
    else:
        assert not any(x.any() for x in ours)


def test_the_borders_of_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr(triton_network, "_CHUNK", 100)
    case = Case(27, 2, 2, 32, 333)
    assert_close(case.results(), case.definition())


@pytest.mark.skipif(not ON_CUDA, reason="too many samples for the interpreter")
def test_more_samples_than_single_precision_can_number_have_colours():
    n = 2**24 + 5
    many, few = Case(3, 1, 1, 16, 1), Case(3, 1, 1, 16, 1)
    # Only some, the last ones among them, have gradients.
    some = torch.cat([torch.arange(0, n, 15_000), torch.arange(2**24 - 3, n)]).unique()
    generator = torch.Generator().manual_seed(0)
    many.features, many.view = torch.randn(n, 3, generator=generator), torch.randn(7, 3, generator=generator)
    many.ray = torch.randint(7, (n,), generator=generator)
    few.features, few.view, few.ray = many.features[some], many.view, many.ray[some]
    few.upstream = torch.randn(len(some), 3, generator=generator)
    many.upstream = torch.zeros(n, 3).index_copy_(0, some, few.upstream)
    ours = many.results()
    assert ours[1].count_nonzero() <= 3 * len(some)
    assert_close([ours[0][some], ours[1][some], *ours[2:]], few.definition())


def test_no_samples_have_no_colours():
    ours = Case(27, 2, 2, 16, 0).results()
    assert ours[0].shape == (0, 3)
    assert not any(x.any() for x in ours)


def test_angles_of_any_size_are_encoded():
    # sin(2^k x) of angles up to 1e6, where a float32 pi would be far off.
    case = Case(8, 0, 2, 16, 500, scale=3e5)
    with torch.no_grad():
        case.module.mlp[0].weight[:, :8] = 0.0  # the features themselves are too large to be seen beside
    ours, definition = case.results(), case.definition()
    encoded = [[rgb, to_w1[:, 8:], to_b1] for rgb, _, _, to_w1, to_b1, *_ in (ours, definition)]
    assert_close(*encoded, 1e-4)


def test_features_that_are_no_numbers_stay_visible():
    case = Case(5, 1, 1, 16, 40)
    with torch.no_grad():
        case.features[7, 2] = float("nan")
        case.features[9, 0] = float("inf")
    rgb = case.results()[0]
    assert rgb[[7, 9]].isnan().all()
    others = [k for k in range(40) if k not in (7, 9)]
    assert rgb[others].isfinite().all()


def test_layers_and_inputs_that_lie_apart_in_memory_are_taken():
    case = Case(6, 1, 1, 20, 50)
    expected = case.definition()
    with torch.no_grad():
        for number in (0, 2, 4):
            layer = case.module.mlp[number]
            layer.weight = nn.Parameter(layer.weight.T.contiguous().T)
    case.features, case.upstream = case.features.T.contiguous().T, case.upstream.T.contiguous().T
    assert_close(case.results(), expected)


def test_bfloat16_products_change_colours_and_gradients_no_more_than_torchs_do():
    case = Case(27, 2, 2, 64, 400, scale=0.5, dtype="bfloat16")
    ours = case.results()
    torchs = case.results(colours=by_torch)
    case.module.dtype = torch.float32
    factor = 1.5 if ON_CUDA else 6.0  # Triton's interpreter cuts digits off where a GPU rounds
    for a, b, exact in zip(ours, torchs, case.definition(), strict=True):
        assert 0 < (a - exact).norm() < factor * (b - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.skipif(not ON_CUDA, reason="TF32 is CUDA's")
def test_tf32_products_change_colours_and_gradients_no_more_than_torchs_do():
    torch.set_float32_matmul_precision("high")
    case = Case(27, 2, 2, 128, 5000, scale=0.5)
    ours, torchs = case.results(), case.results(colours=by_torch)
    for a, b, exact in zip(ours, torchs, case.definition(), strict=True):
        assert 0 < (a - exact).norm() < 1.5 * (b - exact).norm() + 1e-3 * exact.norm()


def test_gradients_of_gradients_are_refused():
    case = Case(4, 1, 1, 8, 10)
    features = case.features.to(DEVICE).requires_grad_()
    rgb = triton_network.colours(case.module.to(DEVICE), features, case.view.to(DEVICE), case.ray.to(DEVICE), None)
    (gradient,) = torch.autograd.grad(rgb.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_only_networks_that_fit_are_taken():
    features, view = torch.zeros(2, 27, device=DEVICE), torch.zeros(2, 3, device=DEVICE)

    def taken(mode="MLP_Fea", view_pe=2, hidden=128, features=features):
        return triton_network.takes(build_shading(mode, 27, view_pe, 2, 2, hidden).to(DEVICE), features, view)

    assert taken()
    assert not taken("MLP_PE")
    assert not taken("SH")
    assert not taken(view_pe=11)
    assert not taken(hidden=129)
    assert not taken(features=features.double())


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_a_rendering_with_the_network_equals_one_without_it(model, monkeypatch):
    monkeypatch.setattr("models.kernels.compiled_network.serves", lambda *_: False)
    results = []
    for network in (triton_network, None):
        field, rays = random_field(3, model).to(DEVICE), random_rays(3, 30)
        field.kernels = kernels.Kernels("", triton_lookups, triton_rendering, network=network)
        rays.origins.requires_grad_()
        rays.directions.requires_grad_()
        moved = type(rays)(rays.origins.to(DEVICE), rays.directions.to(DEVICE))
        out = field.render(moved, 1.0, torch.full((30, 1), 0.3, device=DEVICE), 61)
        out.rgb.square().sum().backward()
        assert out.n_colour > 30
        gradients = [p.grad.cpu() for p in field.parameters()]
        results.append([out.rgb.detach().cpu(), *gradients, rays.origins.grad, rays.directions.grad])
    assert_close(*results)
