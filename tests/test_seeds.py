"""Named random generators."""

import pytest
import torch

from utils.seeds import make_generator, seed_for


def numbers(seed, name):
    return torch.rand(8, generator=make_generator(seed, name))


def test_the_same_seed_and_name_give_the_same_stream():
    assert torch.equal(numbers(3, "sampler"), numbers(3, "sampler"))


def test_other_seeds_and_names_give_other_streams():
    names = ["sampler", "jitter", "background", "field", "sampler/1", "sampler/11", ""]
    seeds = [seed_for(seed, name) for seed in range(-1, 50) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert not torch.equal(numbers(3, "sampler"), numbers(4, "sampler"))


@pytest.mark.parametrize(
    ("seed", "name", "value"), [(0, "field", 3603287982614416702), (20211202, "sampler/105", 507248125034869609)]
)
def test_seeds_are_the_same_on_every_machine_and_in_every_process(seed, name, value):
    assert seed_for(seed, name) == value


def test_seeds_fit_what_torch_accepts():
    assert all(0 <= seed_for(seed, "x") < 1 << 63 for seed in range(1000))


def test_making_and_using_a_generator_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    numbers(0, "sampler")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_generators_do_not_share_state():
    first, second = make_generator(1, "a"), make_generator(1, "a")
    torch.rand(100, generator=first)
    assert torch.equal(torch.rand(3, generator=second), torch.rand(3, generator=make_generator(1, "a")))
