"""The keyed permutation: exact for every size, different for every key, without pattern, without a table."""

import pytest
import torch

from components.permutation import permute

KEYS = [0, 1, 12345, (1 << 62) - 1]


def images(n, key, first=0, count=None):
    """The images of first..first + count - 1 (default: of all of 0..n-1)."""
    x = torch.arange(first, first + (n if count is None else count))
    return permute(x, torch.full_like(x, key), n)


@pytest.mark.parametrize("key", KEYS)
def test_it_permutes_every_small_set_exactly(key):
    for n in range(1, 301):
        assert torch.equal(images(n, key).sort().values, torch.arange(n)), n


# Around squares (sides change), around 2^16 (the number of walks changes), primes, powers of two.
@pytest.mark.parametrize("n", [1023, 1024, 1025, 9973, 40000, 65535, 65536, 65537, 90000, 90001, 131071, 299_999])
@pytest.mark.parametrize("key", [0, 987654321 << 20])
def test_it_permutes_large_sets_exactly(n, key):
    assert torch.equal(images(n, key).sort().values, torch.arange(n))


@pytest.mark.parametrize("seed", range(10))
def test_it_permutes_sets_of_random_sizes_under_random_keys_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(301, 300_000, (1,), generator=generator))
    key = int(torch.randint(0, 1 << 62, (1,), generator=generator))
    assert torch.equal(images(n, key).sort().values, torch.arange(n)), (n, key)


@pytest.mark.parametrize("n", [100, 5000, 100_000])
@pytest.mark.parametrize("other", [1, 1 << 20, 1 << 32, 1 << 61])
def test_another_key_gives_another_order(n, other):
    """Two unrelated orders agree in one place on average; more than 8 has probability 1e-6."""
    assert (images(n, 77) == images(n, 77 + other)).sum() <= 8


@pytest.mark.parametrize("n", [100, 100_000])
def test_neighbours_are_torn_apart(n):
    """How often y(x+1) = y(x) + 1, which would make a batch a row of pixels: once by chance."""
    y = images(n, 4242)
    assert (y.diff() == 1).sum() <= 8
    assert (y == torch.arange(n)).sum() <= 8


@pytest.mark.parametrize("n_images", [3, 50, 100])
@pytest.mark.parametrize("key", [5, 1 << 40])
def test_the_first_draws_spread_evenly_over_the_images(n_images, key):
    per_image, draws = 4000, 40 * n_images
    counts = torch.bincount(images(n_images * per_image, key, 0, draws) // per_image, minlength=n_images).double()
    chi_square = ((counts - 40).square() / 40).sum().item()
    # Mean n - 1 and variance 2 (n - 1): five standard deviations either way.
    freedom = n_images - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5 + 5
    assert counts.min() > 0


@pytest.mark.parametrize("first", [0, 31_000_000, 63_800_000])
def test_consecutive_draws_from_64_million_pixels_are_distinct_and_in_range(first):
    n = 64_000_000
    y = images(n, 31337, first, 200_000)
    assert y.unique().numel() == y.numel()
    assert y.min() >= 0
    assert y.max() < n
    # They cover the whole range: 100 bins of 2000 each, within 6 standard deviations.
    assert (torch.bincount(y // (n // 100), minlength=100) - 2000).abs().max() < 270


def test_each_index_takes_its_own_key():
    keys = torch.tensor([3, 9]).repeat(50)
    x = torch.arange(100)
    mixed = permute(x, keys, 1000)
    assert torch.equal(mixed[::2], images(1000, 3, 0, 100)[::2])
    assert torch.equal(mixed[1::2], images(1000, 9, 0, 100)[1::2])


def test_the_order_of_a_key_is_the_same_everywhere():
    """A resumed run on another machine must continue the same epoch."""
    assert images(1000, 2024, 0, 6).tolist() == [143, 365, 663, 232, 888, 483]


def test_a_square_number_of_pixels_needs_no_walks(monkeypatch):
    # Each walk is as many launches as the permutation itself on a device that is not asked whether one is needed.
    passes = []
    monkeypatch.setattr("components.permutation._feistel", lambda x, *_: passes.append(x) or x)
    permute(torch.arange(10, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta"), 64_000_000)
    assert len(passes) == 1
    permute(torch.arange(10, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta"), 64_000_001)
    assert len(passes) == 10
