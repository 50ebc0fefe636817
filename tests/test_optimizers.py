"""Adam across cropping: what is kept goes on as if nothing had happened."""

import io

import pytest
import torch

from models.growth import shrink
from models.optimizers import BETAS, crop_adam, make_adam
from tests.helpers import random_field

MODELS = ["TensorVMSplit", "TensorCP"]
BOX = torch.tensor([[-0.9, -0.4, -0.6], [0.8, 1.1, 0.7]])
DECAY = 0.9


def steps(field, optimizer, count, cut=None, phase=0):
    """Adam steps towards random targets, others in each phase, entry by entry; `cut`: the slices that were kept."""
    for _ in range(count):
        loss = 0.0
        for number, (name, parameter) in enumerate(field.named_parameters()):
            shape = SHAPES[type(field).__name__][name]
            target = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * phase + number))
            loss = loss + (parameter - target[(cut or {}).get(name, ...)]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= DECAY


SHAPES = {m: {n: p.shape for n, p in random_field(0, m, masked=False).named_parameters()} for m in MODELS}


def crop(field, optimizer, box):
    """Shrink the field; (its new optimiser, the slices), as train.py does it."""
    before = dict(field.named_parameters())
    slices = shrink(field, box)
    after = dict(field.named_parameters())
    return crop_adam(optimizer, field.param_groups(0.0, 0.0), before, after, slices), slices


@pytest.fixture(params=MODELS)
def pair(request):
    """Twice the same field, with optimisers that have made the same four steps."""
    result = []
    for _ in range(2):
        field = random_field(0, request.param, masked=False)
        optimizer = make_adam(field.param_groups(0.02, 1e-3))
        steps(field, optimizer, 4)
        result.append((field, optimizer))
    return result


def test_adam_has_tensorfs_betas():
    optimizer = make_adam(random_field(0).param_groups(0.02, 1e-3))
    assert BETAS == (0.9, 0.99)
    assert [(group["betas"], group["lr"]) for group in optimizer.param_groups] == [(BETAS, 0.02), (BETAS, 1e-3)]


def test_the_kept_part_trains_on_as_if_nothing_had_been_cropped(pair):
    (cropped, optimizer), (whole, undisturbed) = pair
    optimizer, slices = crop(cropped, optimizer, BOX)
    assert cropped.grid_size != whole.grid_size
    steps(cropped, optimizer, 4, slices, phase=1)
    steps(whole, undisturbed, 4, phase=1)
    reference = dict(whole.named_parameters())
    for name, parameter in cropped.named_parameters():
        expected = reference[name][slices.get(name, ...)]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


def test_fresh_moments_would_have_trained_differently(pair):
    """The test above can tell: with a new optimiser of the same rates the parameters end up elsewhere."""
    (cropped, optimizer), (whole, undisturbed) = pair
    rates = [group["lr"] for group in optimizer.param_groups]
    _, slices = crop(cropped, optimizer, BOX)
    steps(cropped, make_adam(cropped.param_groups(*rates)), 4, slices, phase=1)
    steps(whole, undisturbed, 4, phase=1)
    reference = dict(whole.named_parameters())
    for name, parameter in cropped.named_parameters():
        assert (parameter - reference[name][slices.get(name, ...)]).abs().max() > 1e-4


def test_cropping_to_everything_changes_no_bit(pair):
    (cropped, optimizer), (whole, undisturbed) = pair
    optimizer, _ = crop(cropped, optimizer, cropped.aabb.clone())
    assert cropped.grid_size == whole.grid_size
    steps(cropped, optimizer, 4)
    steps(whole, undisturbed, 4)
    for a, b in zip(cropped.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_step_counts_and_learning_rates_of_the_kept_part_survive(pair):
    (cropped, optimizer), (whole, undisturbed) = pair
    optimizer, slices = crop(cropped, optimizer, BOX)
    reference = dict(whole.named_parameters())
    for name, parameter in cropped.named_parameters():
        new, old = optimizer.state[parameter], undisturbed.state[reference[name]]
        assert new.keys() == old.keys()
        assert new["step"] == old["step"] == 4
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[moment], old[moment][slices.get(name, ...)])
            # Other strides would cost a copy at every step.
            assert new[moment].stride() == parameter.stride()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in undisturbed.param_groups]
    assert [g["betas"] for g in optimizer.param_groups] == [BETAS, BETAS]
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in cropped.parameters()}


def test_an_optimiser_that_has_not_stepped_yet_is_cropped_too():
    field = random_field(0, masked=False)
    optimizer, slices = crop(field, make_adam(field.param_groups(0.02, 1e-3)), BOX)
    assert not optimizer.state
    steps(field, optimizer, 1, slices)
    assert all(torch.isfinite(p).all() for p in field.parameters())


def test_a_cropped_optimiser_survives_a_checkpoint(pair):
    (first, optimizer), (second, other) = pair
    optimizer, slices = crop(first, optimizer, BOX)
    crop(second, other, BOX)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored = make_adam(second.param_groups(1.0, 1.0))
    restored.load_state_dict(torch.load(file, weights_only=True))
    steps(first, optimizer, 3, slices)
    steps(second, restored, 3, slices)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
