"""Regularisers against loops over every entry, and the decay of their weights."""

import pytest
import torch

from components.regularisers import (
    L1Density,
    Orthogonality,
    TVAppearance,
    TVDensity,
    build_regularisers,
    l1_norm,
    orthogonality,
    squared_differences,
    total_variation,
)
from tests.helpers import random_field


def factors(model, seed, components=(3, 1, 2), grid=(4, 5, 3), dtype=torch.float64):
    """(planes, lines) of random numbers; no planes for CP."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, y, z = grid
    planes = [normal(1, c, h, w) for c, (h, w) in zip(components, ((y, x), (z, x), (z, y)), strict=True)]
    lines = [normal(1, c, n, 1) for c, n in zip(components, (z, y, x), strict=True)]
    return (planes if model == "VM" else []), lines


def mean(values):
    return sum(values) / len(values)


def slow_l1(planes, lines):
    return sum(mean([abs(v) for v in factor.flatten().tolist()]) for factor in [*planes, *lines])


def slow_differences(factor):
    _, channels, rows, columns = factor.shape
    values = factor[0].tolist()
    down = [
        (values[c][r + 1][k] - values[c][r][k]) ** 2
        for c in range(channels)
        for r in range(rows - 1)
        for k in range(columns)
    ]
    right = [
        (values[c][r][k + 1] - values[c][r][k]) ** 2
        for c in range(channels)
        for r in range(rows)
        for k in range(columns - 1)
    ]
    return 2 * (mean(down) + (mean(right) if right else 0.0))


def slow_total_variation(planes, lines):
    if planes:
        return sum(1e-2 * slow_differences(plane) for plane in planes)
    return sum(1e-3 * slow_differences(line) for line in lines)


def slow_orthogonality(lines):
    total = 0.0
    for line in lines:
        vectors = line[0, :, :, 0].tolist()
        products = [
            abs(sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True)))
            for i in range(len(vectors))
            for j in range(len(vectors))
            if i != j
        ]
        total += mean(products) if products else 0.0
    return total


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("seed", range(3))
def test_l1_equals_the_loop(model, seed):
    planes, lines = factors(model, seed)
    assert l1_norm(planes, lines).item() == pytest.approx(slow_l1(planes, lines), rel=1e-12)


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("seed", range(3))
def test_total_variation_equals_the_loop(model, seed):
    planes, lines = factors(model, seed)
    assert total_variation(planes, lines).item() == pytest.approx(slow_total_variation(planes, lines), rel=1e-12)


@pytest.mark.parametrize("components", [(3, 1, 2), (1, 1, 1), (5, 4, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_orthogonality_equals_the_double_loop(components, seed):
    _, lines = factors("VM", seed, components)
    assert orthogonality(lines).item() == pytest.approx(slow_orthogonality(lines), rel=1e-12)


def test_orthogonal_components_cost_nothing():
    line = torch.eye(4)[None, :, :, None]
    assert orthogonality([line, line, line]) == 0


def test_a_single_component_has_a_zero_gradient_and_not_nan():
    line = torch.randn(1, 1, 6, 1, requires_grad=True)
    other = torch.randn(1, 2, 6, 1, requires_grad=True)
    orthogonality([line, other]).backward()
    assert line.grad is None or not line.grad.any()
    assert torch.isfinite(other.grad).all()
    assert other.grad.any()


def test_constant_factors_have_no_total_variation():
    assert squared_differences(torch.full((1, 3, 4, 5), 2.5)) == 0
    assert squared_differences(torch.full((1, 3, 4, 1), 2.5)) == 0


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_gradients_match_finite_differences(model):
    planes, lines = factors(model, 1)
    n = len(planes)
    inputs = tuple(factor.requires_grad_() for factor in [*planes, *lines])
    for penalty in (l1_norm, total_variation, lambda _, lines: orthogonality(lines)):
        assert torch.autograd.gradcheck(lambda *f, penalty=penalty: penalty(list(f[:n]), list(f[n:])), inputs)


@pytest.mark.parametrize("term", [TVDensity, TVAppearance])
def test_the_weight_of_total_variation_decays_before_every_use(term):
    field = random_field(0)
    factors = field.density_factors() if term is TVDensity else field.appearance_factors()
    penalty = total_variation(*factors).item()
    regulariser = term(0.5)
    for use in range(1, 4):
        assert regulariser(field, 0.9).item() == pytest.approx(0.5 * 0.9**use * penalty, rel=1e-5)
        assert regulariser.weight == pytest.approx(0.5 * 0.9**use)


@pytest.mark.parametrize("term", [L1Density, Orthogonality])
def test_the_weights_of_l1_and_orthogonality_stay(term):
    field = random_field(0)
    regulariser = term(0.5)
    values = [regulariser(field, 0.9).item() for _ in range(3)]
    density, appearance = field.density_factors(), field.appearance_factors()
    penalty = l1_norm(*density) if term is L1Density else orthogonality(density[1]) + orthogonality(appearance[1])
    assert values == pytest.approx([0.5 * penalty.item()] * 3, rel=1e-6)
    assert regulariser.weight == 0.5


def test_only_regularisers_with_a_weight_are_built():
    assert build_regularisers(0.0, 0.0, 0.0, 0.0) == []
    built = build_regularisers(l1=1.0, tv_density=2.0, tv_app=3.0, ortho=4.0)
    weights = {regulariser.name: regulariser.weight for regulariser in built}
    assert weights == {"reg_l1": 1.0, "reg_tv_density": 2.0, "reg_tv_app": 3.0, "reg_ortho": 4.0}
    assert [type(r) for r in build_regularisers(0.0, 0.0, 3.0, 0.0)] == [TVAppearance]


@pytest.mark.parametrize("model_name", ["TensorVMSplit", "TensorCP"])
def test_density_terms_leave_the_appearance_alone_and_the_other_way_round(model_name):
    field = random_field(0, model_name)
    for term, wanted in ((L1Density, "density"), (TVDensity, "density"), (TVAppearance, "app")):
        field.zero_grad()
        term(1.0)(field, 1.0).backward()
        touched = {name for name, p in field.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched
        assert all(name.startswith(wanted) for name in touched)
