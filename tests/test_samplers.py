"""The contract of every sampler in the registry, and what is special to each."""

import io
from itertools import pairwise

import pytest
import torch

from components.cameras import cast_rays
from components.pixel_sets import PixelSet
from components.types import PixelBatch
from opt import parse_options
from samplers import SAMPLERS, build_sampler, check_strategy
from tests.helpers import Waits
from tests.test_cameras import small_scene
from utils.errors import OptionError
from utils.seeds import make_generator


def build(name, scene, batch_size=16, kept=None, seed=0):
    options = parse_options(["--demo", "--batch_size", str(batch_size)])
    return build_sampler(name, scene, PixelSet(scene.n_pixels, kept), options, make_generator(seed, "sampler"))


def train_step(sampler, scene, step):
    """What train.py does with a sampler, with a made-up rendering; (pixels, error, weight)."""
    pixels = sampler.sample(step)
    rays = cast_rays(scene, pixels)
    error = torch.sin(3 * rays.directions) - scene.colors(pixels)
    weight = sampler.weigh(pixels, error.detach(), step)
    ray_loss = weight * error.square().mean(-1)
    if pixels.xy.requires_grad:
        ray_loss.mean().backward()
    sampler.update(pixels, ray_loss.detach(), step)
    return pixels, error, weight


def draws(sampler, scene, steps):
    """[sum B, 3]: image, x, y of all pixels of some steps."""
    batches = [train_step(sampler, scene, step)[0] for step in steps]
    return torch.cat([torch.cat([b.image_id[:, None].float(), b.xy.detach()], 1) for b in batches])


def flat(pixels: PixelBatch, scene) -> torch.Tensor:
    column, row = pixels.xy.detach().long().unbind(-1)
    return (pixels.image_id * scene.height + row) * scene.width + column


@pytest.fixture(params=sorted(SAMPLERS))
def name(request):
    return request.param


@pytest.fixture(params=["RGB", "RGBA", "wide", "filtered"])
def case(request):
    """(scene, kept pixels or None)."""
    if request.param == "filtered":
        scene = small_scene(height=12, width=10)
        kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(2)) < 0.6
        return scene, kept
    shape = {"height": 6, "width": 23} if request.param == "wide" else {"height": 12, "width": 10}
    return small_scene(**shape, channels=4 if request.param == "RGBA" else 3), None


# --- the contract ---
def test_samples_are_pixel_centres_inside_the_images(name, case):
    scene, kept = case
    sampler = build(name, scene, kept=kept)
    for step in range(12):
        pixels, _, _ = train_step(sampler, scene, step)
        xy = pixels.xy.detach()
        assert (pixels.image_id.dtype, xy.dtype) == (torch.int64, torch.float32)
        assert pixels.image_id.shape == (len(pixels),)
        assert xy.shape == (len(pixels), 2)
        assert len(pixels) > 0
        assert ((pixels.image_id >= 0) & (pixels.image_id < scene.n_images)).all()
        assert (xy - xy.floor() == 0.5).all()
        assert (xy > 0).all()
        assert (xy < torch.tensor([scene.width, scene.height])).all()


def test_weights_are_finite_not_negative_and_carry_no_gradient(name, case):
    scene, kept = case
    sampler = build(name, scene, kept=kept)
    for step in (0, 1, 5, 700):
        pixels, error, weight = train_step(sampler, scene, step)
        assert weight.shape == (len(pixels),)
        assert weight.dtype == error.dtype
        assert torch.isfinite(weight).all()
        assert (weight >= 0).all()
        assert not weight.requires_grad


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_weights_stay_finite_for_tiny_and_huge_errors(name, size):
    scene = small_scene()
    sampler = build(name, scene)
    for step in (0, 1, 1000):
        pixels = sampler.sample(step)
        weight = sampler.weigh(pixels, torch.full((len(pixels), 3), size), step)
        assert torch.isfinite(weight).all()
        assert (weight >= 0).all()


def test_the_same_seed_gives_the_same_draws_and_another_seed_others(name, case):
    scene, kept = case
    first, again, other = (draws(build(name, scene, kept=kept, seed=seed), scene, range(10)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_restored_sampler_goes_on_as_if_it_had_never_stopped(name, case):
    scene, kept = case
    through = build(name, scene, kept=kept, seed=4)
    draws(through, scene, range(9))
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = build(name, scene, kept=kept, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    expected = draws(through, scene, range(9, 30))
    assert torch.equal(draws(resumed, scene, range(9, 30)), expected)
    # The generator included: whatever is drawn later agrees too.
    for key, value in through.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_a_state_is_not_changed_by_going_on(name):
    scene = small_scene(height=12, width=10)
    sampler = build(name, scene)
    draws(sampler, scene, range(5))
    state = sampler.state_dict()
    first = draws(sampler, scene, range(5, 15))
    sampler.load_state_dict(state)
    assert torch.equal(draws(sampler, scene, range(5, 15)), first)


def test_the_global_random_state_is_left_alone(name):
    torch.manual_seed(17)
    before = torch.random.get_rng_state()
    scene = small_scene()
    assert torch.equal(torch.random.get_rng_state(), before)
    draws(build(name, scene), scene, range(5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_scene_and_the_kept_pixels_are_not_written_to(name):
    scene = small_scene()
    kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(2)) < 0.6
    images, c2w, kept_before = scene.images.clone(), scene.c2w.clone(), kept.clone()
    draws(build(name, scene, kept=kept), scene, range(5))
    assert torch.equal(scene.images, images)
    assert torch.equal(scene.c2w, c2w)
    assert torch.equal(kept, kept_before)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_any_batch_size_works_even_beyond_the_scene(name, batch_size):
    scene = small_scene()
    sampler = build(name, scene, batch_size=batch_size)
    for step in range(3):
        assert len(train_step(sampler, scene, step)[0]) > 0


def test_one_pixel_is_enough(name):
    scene = small_scene(n_images=1, height=1, width=1)
    pixels, _, weight = train_step(build(name, scene, batch_size=4), scene, 0)
    assert (pixels.xy == 0.5).all()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_batches_permuted_together_are_those_permuted_one_by_one(monkeypatch, filtered):
    scene = small_scene(height=12, width=10)
    kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(2)) < 0.6 if filtered else None
    one_by_one, steps = build("full", scene, kept=kept), range(scene.n_pixels // 16 + 20)  # into the next epoch
    expected = [one_by_one.sample(step) for step in steps]
    monkeypatch.setattr("samplers.standard._AHEAD", {"cpu": 7})
    together = build("full", scene, kept=kept)
    for step in steps:
        if step == 10:  # between two draws: a resumed run goes on with the same batches
            state = together.state_dict()
            together = build("full", scene, kept=kept, seed=1)
            together.load_state_dict(state)
        batch = together.sample(step)
        assert torch.equal(batch.image_id, expected[step].image_id)
        assert torch.equal(batch.xy, expected[step].xy)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0.5],
        lambda x: x.masked_fill_(x > 2, 0).index_put_((x > 0.5,), torch.tensor(1.0)),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2, 3])),
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
    ],
)
def test_the_watcher_sees_what_waits(wait):
    x = torch.linspace(0, 1, 9)
    with Waits() as waits:
        wait(x)
    assert waits.count == 1


def test_the_watcher_lets_pass_what_does_not_wait():
    x, rows = torch.linspace(0, 1, 9), torch.tensor([1, 2])
    with Waits() as waits:
        torch.where(x > 0.5, x[rows].sum(), x).index_add_(0, rows, x[:2])
    assert waits.count == 0


def test_no_sampler_makes_the_host_wait_for_the_device_more_than_its_docstring_says(name, monkeypatch):
    # On a CPU the permutation asks whether all walks have ended, which is free there; on CUDA it does not ask.
    monkeypatch.setattr("components.permutation._SMALL", 0)
    monkeypatch.setattr("components.permutation._WALKS", 0)
    scene = small_scene(height=12, width=10)
    sampler = build(name, scene)
    for step in range(3):
        with Waits() as waits:
            train_step(sampler, scene, step)
        # train_step itself reads nothing back; soft mining's update counts its dead.
        assert waits.count == (1 if name == "soft" else 0)


def test_only_soft_mining_asks_for_the_gradient_in_pixel_position(name):
    pixels = build(name, small_scene()).sample(0)
    assert pixels.xy.requires_grad == (name == "soft")
    assert not pixels.detach_samples


def test_streams_of_different_names_differ():
    streams = [torch.rand(8, generator=make_generator(3, n)) for n in ("sampler", "jitter", "background", "sampler/9")]
    assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])


def test_only_kept_pixels_are_drawn(name):
    scene = small_scene(height=12, width=10)
    for seed in range(3):
        kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(seed)) < 0.3
        sampler = build(name, scene, kept=kept, seed=seed)
        for step in range(25):
            assert kept[flat(train_step(sampler, scene, step)[0], scene)].all()


# --- full ---
@pytest.mark.parametrize("batch_size", [1, 9, 64, 105, 104, 106, 250])
@pytest.mark.parametrize("filtered", [False, True])
def test_an_epoch_of_full_visits_every_kept_pixel_exactly_once(batch_size, filtered):
    scene = small_scene()
    kept = torch.ones(scene.n_pixels, dtype=torch.bool)
    if filtered:
        kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(3)) < 0.4
    members = kept.nonzero()[:, 0]
    sampler = build("full", scene, batch_size, kept if filtered else None)
    epochs, wanted = [], 4 * len(members)
    seen = torch.zeros(0, dtype=torch.int64)
    while len(seen) < wanted:
        batch = sampler.sample(0)
        assert len(batch) == batch_size
        seen = torch.cat([seen, flat(batch, scene)])
    for epoch in seen[:wanted].view(4, -1):
        assert torch.equal(epoch.sort().values, members)
        epochs.append(epoch)
    assert all(not torch.equal(a, b) for a, b in pairwise(epochs))


def test_full_weighs_every_ray_by_one_and_asks_for_no_gradient():
    scene = small_scene()
    pixels, error, weight = train_step(build("full", scene), scene, 0)
    assert torch.equal(weight, torch.ones(len(error)))
    assert not pixels.xy.requires_grad


def test_full_draws_images_evenly():
    scene = small_scene(n_images=8, height=30, width=40)
    image = draws(build("full", scene, batch_size=100), scene, range(20))[:, 0].long()
    counts = torch.bincount(image, minlength=8)
    # 2000 draws without replacement of 8 images: mean 250, standard deviation below 15.
    assert (counts - 250).abs().max() < 75


def test_full_keeps_no_list_of_pixels_in_its_state():
    scene = small_scene(n_images=8, height=30, width=40)
    state = build("full", scene).state_dict()
    assert all(value.numel() < scene.n_pixels for value in state.values() if isinstance(value, torch.Tensor))


# --- the registry ---
def test_an_unknown_strategy_is_refused_with_the_names_that_exist():
    with pytest.raises(OptionError) as caught:
        check_strategy("no_such_sampler")
    message = str(caught.value)
    assert "no_such_sampler" in message
    assert all(available in message for available in SAMPLERS)
    with pytest.raises(OptionError):
        build("no_such_sampler", small_scene())


def test_every_registered_strategy_is_accepted(name):
    check_strategy(name)


def test_a_new_sampler_is_one_class_and_one_line_in_the_registry(monkeypatch):
    class Corner:
        """Always the first pixel of each image."""

        def __init__(self, scene, kept, options, generator):
            self._n_images = scene.n_images

        def sample(self, step):
            image = torch.arange(self._n_images)
            return PixelBatch(image, torch.full((self._n_images, 2), 0.5))

        def weigh(self, pixels, error, step):
            return error.new_full((len(pixels),), 2.0)

        def update(self, pixels, ray_loss, step):
            self.last = ray_loss

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    monkeypatch.setitem(SAMPLERS, "corner", Corner)
    check_strategy("corner")
    scene = small_scene()
    sampler = build("corner", scene)
    pixels, error, weight = train_step(sampler, scene, 0)
    assert flat(pixels, scene).tolist() == [0, 35, 70]
    torch.testing.assert_close(sampler.last, 2.0 * error.square().mean(-1))
    assert weight.tolist() == [2.0] * 3
