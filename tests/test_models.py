"""Fields as they are built: seeds, parameters as TensoRF names them, colours in chunks."""

import pytest
import torch

from components.types import Rays
from models import MODELS, build_field
from models import field as field_module
from models.config import FieldConfig
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES
from models.shading import SHADINGS, build_shading
from tests.helpers import random_field, random_rays

AABB = torch.tensor([[-1.5, -1.2, -1.0], [1.3, 1.6, 0.9]])
GRID = (8, 9, 7)


def config(model_name="TensorVMSplit", shading="MLP_Fea", **changes) -> FieldConfig:
    vm = model_name == "TensorVMSplit"
    values = {
        "n_density": (2, 3, 4) if vm else (5,),
        "n_appearance": (3, 1, 2) if vm else (4,),
        "n_features": 3 if shading == "RGB" else 27,
        "hidden": 16,
    }
    return FieldConfig(model_name, shading=shading, **{**values, **changes})


@pytest.fixture(params=sorted(MODELS))
def model_name(request):
    return request.param


# --- building ---
def test_the_same_seed_builds_the_same_field_and_another_one_another(model_name):
    first, again, other = (build_field(config(model_name), AABB, GRID, seed) for seed in (3, 3, 4))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        # The last bias starts at zero in every field.
        assert torch.equal(a, c) == (name == "renderModule.mlp.4.bias")


def test_building_leaves_the_global_random_state_alone_and_does_not_depend_on_it(model_name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_field(config(model_name), AABB, GRID, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_field(config(model_name), AABB, GRID, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_factors_start_as_normal_numbers_of_tensorfs_scale(model_name):
    field = build_field(config(model_name), AABB, (40, 50, 30), 0)
    scale = 0.1 if model_name == "TensorVMSplit" else 0.2
    for planes, lines in (field.density_factors(), field.appearance_factors()):
        values = torch.cat([factor.detach().flatten() for factor in (*planes, *lines)])
        assert abs(values.mean().item()) < 5 * scale / len(values) ** 0.5
        assert values.std().item() == pytest.approx(scale, rel=5 / (2 * len(values)) ** 0.5)


def test_a_field_does_not_share_memory_with_the_box_it_was_given(model_name):
    box = AABB.clone()
    field = build_field(config(model_name), box, GRID)
    box.zero_()
    assert torch.equal(field.aabb, AABB)


def test_the_configuration_survives_its_dictionary(model_name):
    c = config(model_name, near=0.5, ndc=True)
    assert FieldConfig.from_dict(c.to_dict()) == c


# --- parameters ---
def expected_shapes(model_name, shading, c) -> dict[str, tuple[int, ...]]:
    """Names and shapes of TensoRF's state_dict."""
    shapes = {}
    for kind, counts in (("density", c.n_density), ("app", c.n_appearance)):
        for m in range(3):
            count = counts[m] if model_name == "TensorVMSplit" else counts[0]
            shapes[f"{kind}_line.{m}"] = (1, count, GRID[LINE_AXES[m]], 1)
            if model_name == "TensorVMSplit":
                u, v = PLANE_AXES[m]
                shapes[f"{kind}_plane.{m}"] = (1, count, GRID[v], GRID[u])
    shapes["basis_mat.weight"] = (c.n_features, sum(c.n_appearance))
    inputs = {
        "MLP_Fea": 2 * c.view_pe * 3 + 2 * c.fea_pe * c.n_features + 3 + c.n_features,
        "MLP": 3 + 2 * c.view_pe * 3 + c.n_features,
        "MLP_PE": (3 + 2 * c.view_pe * 3) + (3 + 2 * c.pos_pe * 3) + c.n_features,
    }
    if shading in inputs:
        for layer, (n_in, n_out) in enumerate(((inputs[shading], 16), (16, 16), (16, 3))):
            shapes[f"renderModule.mlp.{2 * layer}.weight"] = (n_out, n_in)
            shapes[f"renderModule.mlp.{2 * layer}.bias"] = (n_out,)
    return shapes


@pytest.mark.parametrize("shading", sorted(SHADINGS))
@pytest.mark.parametrize("frequencies", [{}, {"view_pe": 0, "fea_pe": 0, "pos_pe": 0}])
def test_parameters_have_tensorfs_names_and_shapes(model_name, shading, frequencies):
    c = config(model_name, shading, **frequencies)
    field = build_field(c, AABB, GRID)
    shapes = {name: tuple(p.shape) for name, p in field.named_parameters()}
    assert shapes == expected_shapes(model_name, shading, c)


def test_factors_learn_at_one_rate_and_networks_at_the_other_and_none_is_left_out(model_name):
    field = build_field(config(model_name), AABB, GRID)
    grids, networks = field.param_groups(0.02, 0.001)
    names = {id(p): name for name, p in field.named_parameters()}
    assert (grids["lr"], networks["lr"]) == (0.02, 0.001)
    grid_names, network_names = ({names[id(p)] for p in group["params"]} for group in (grids, networks))
    assert all("_plane." in name or "_line." in name for name in grid_names)
    assert all(name.startswith(("basis_mat", "renderModule")) for name in network_names)
    assert grid_names | network_names == set(names.values())
    assert len(grids["params"]) + len(networks["params"]) == len(names)


@pytest.mark.parametrize(("mode", "n_features"), [("SH", 12), ("RGB", 27)])
def test_shadings_refuse_a_number_of_features_they_cannot_use(mode, n_features):
    with pytest.raises(ValueError, match=f"{mode} shading needs"):
        build_shading(mode, n_features, 2, 2, 2, 16)


@pytest.mark.parametrize("mode", sorted(SHADINGS))
def test_shadings_map_no_samples_to_no_colours(mode):
    shading = build_shading(mode, 3 if mode == "RGB" else 27, 2, 2, 2, 16)
    features = torch.zeros(0, 3 if mode == "RGB" else 27)
    assert shading(features, torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


# --- colours in chunks ---
def loss_and_gradients(model_name, ndc=False, directions=False):
    """Loss of a rendering and its gradients in all parameters, and in ray directions if asked for."""
    field, rays = random_field(1, model_name, ndc=ndc, masked=False), random_rays(1, 60, ndc)
    field.double()
    d = rays.directions.double().requires_grad_(directions)
    out = field.render(Rays(rays.origins.double(), d), 1.0)
    loss = (out.rgb * torch.linspace(-1, 1, 180, dtype=torch.float64).view(60, 3)).sum()
    inputs = [*field.parameters(), *([d] if directions else [])]
    return out.n_colour, [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize("chunk", [1, 17, 100])
def test_the_size_of_colour_chunks_changes_neither_the_loss_nor_gradients(model_name, chunk, directions, monkeypatch):
    monkeypatch.setattr(field_module, "_COLOUR_CHUNK", {"cpu": 1 << 18})
    n_colour, expected = loss_and_gradients(model_name, directions=directions)
    assert n_colour > 100
    monkeypatch.setattr(field_module, "_COLOUR_CHUNK", {"cpu": chunk})
    _, actual = loss_and_gradients(model_name, directions=directions)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(gradient.any() for gradient in expected[1:])


def test_recomputed_colours_have_the_gradients_of_stored_ones(model_name, monkeypatch):
    _, expected = loss_and_gradients(model_name)
    monkeypatch.setattr(field_module, "in_chunks", lambda module, size, *inputs: module(*inputs))
    _, actual = loss_and_gradients(model_name)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ndc", [False, True])
def test_jitter_is_one_number_a_ray_or_in_ndc_one_a_sample_from_the_given_generator(ndc):
    field = random_field(0, ndc=ndc)
    before = torch.random.get_rng_state()
    draws = [field.draw_jitter(6, 11, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draws[0].shape == ((1, 11) if ndc else (6, 1))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0] >= 0).all()
    assert (draws[0] < 1).all()
