"""Every option of soft mining and of the expansive sampler does what it is named for."""

import pytest
import torch

from components import langevin
from components.pixel_sets import PixelSet
from opt import parse_options
from samplers import build_sampler, expansive, soft_mining
from tests.test_cameras import small_scene
from utils.seeds import make_generator


def build(name, *arguments, batch_size=40, seed=0, scene=None, kept=None):
    scene = scene or small_scene(height=12, width=10)
    options = parse_options(["--demo", "--batch_size", str(batch_size), *arguments])
    return build_sampler(name, scene, PixelSet(scene.n_pixels, kept), options, make_generator(seed, "sampler"))


# --- soft mining ---
@pytest.mark.parametrize(("gradient", "detached"), [("viewdir", True), ("true", False)])
def test_the_kind_of_gradient_decides_whether_sample_positions_are_detached(gradient, detached):
    assert build("soft", "--soft_mining_grad", gradient).sample(0).detach_samples == detached


def test_without_the_correction_every_ray_weighs_one():
    error = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    sampler, corrected = build("soft", "--wo_correction_loss", "1"), build("soft")
    pixels = sampler.sample(0)
    assert sampler.weigh(pixels, error, 5000).tolist() == [1.0] * 40
    assert corrected.weigh(pixels, error, 5000).unique().numel() > 10


@pytest.mark.parametrize("step", [0, 25, 60, 5000])
def test_the_correction_takes_its_exponent_and_warm_up_from_the_options(step):
    error = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    sampler = build("soft", "--soft_mining_alpha", "0.3", "--soft_mining_warmup", "50")
    weight = sampler.weigh(sampler.sample(0), error, step)
    assert torch.equal(weight, langevin.correction(error, step, 0.3, 50))
    if step:  # at step 0 nothing is corrected yet, whatever the options
        assert not torch.equal(weight, langevin.correction(error, step, 0.6, 1000))


def moved(sampler, step=0):
    """(walkers before, after) an update with a constant loss and no gradient."""
    before, pixels = sampler._position.clone(), sampler.sample(step)
    sampler.update(pixels, torch.ones(len(pixels)), step)
    return before, sampler._position


def test_walkers_move_by_the_options_step_and_noise(monkeypatch):
    seen = []

    def spy(position, drift, noise, a, b):
        seen.append((a, b))
        return position

    monkeypatch.setattr(langevin, "langevin_move", spy)
    moved(build("soft", "--soft_mining_a", "7", "--soft_mining_b", "0.125"))
    assert seen == [(7.0, 0.125)]


def test_a_tenth_of_the_walkers_start_afresh_anywhere_at_other_slots_every_time(monkeypatch):
    monkeypatch.setattr(langevin, "dead_walkers", lambda position, loss: torch.zeros(len(position), dtype=torch.bool))
    sampler = build("soft", "--soft_mining_b", "0")
    slots, fresh = [], []
    for step in range(60):
        before, after = moved(sampler, step)
        changed = (before != after).any(1).nonzero()[:, 0]
        assert len(changed) == int(0.1 * len(before))
        slots.append(tuple(changed.tolist()))
        fresh.append(after[changed])
    assert len(set(slots)) > 10
    assert len({slot for chosen in slots for slot in chosen}) > 0.8 * len(before)
    fresh = torch.cat(fresh)
    # Uniform in [0, 1]: mean 1/2, variance 1/12; bounds of five standard errors.
    assert (fresh.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / len(fresh)) ** 0.5
    assert (fresh.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / len(fresh)) ** 0.5


# --- expansive ---
def test_what_thins_the_anchors_depends_on_seed_and_image_alone(monkeypatch):
    seen = []
    find = expansive.anchor_pixels

    def spy(grey, search, random):
        seen.append(float(random.random()))
        return find(grey, search, random)

    monkeypatch.setattr(expansive, "anchor_pixels", spy)
    numbers = []
    for seed in (3, 3, 4):
        seen.clear()
        build("expansive", seed=seed)
        numbers.append(sorted(seen))
    assert numbers[0] == numbers[1]
    assert not set(numbers[0]) & set(numbers[2])
    assert len(set(numbers[0])) == len(numbers[0]) > 1


def edges_in(*images):
    """A scene of blank images, but for a white square in the given ones."""
    scene = small_scene(height=24, width=24)
    scene.images.fill_(30)
    for image in images:
        scene.images[image, 6:15, 6:15] = 255
    return scene


def test_blank_images_are_counted_in_the_warning(capsys):
    scene = edges_in(0)
    build("expansive", scene=scene)
    assert f"{scene.n_images - 1} of {scene.n_images} images have no edges" in capsys.readouterr().out


def test_images_that_filtering_dropped_are_not_called_blank(capsys):
    scene = edges_in(*range(small_scene().n_images))
    per_image = scene.height * scene.width
    build("expansive", scene=scene, kept=torch.arange(scene.n_pixels) < per_image)
    assert "no edges" not in capsys.readouterr().out


def test_an_image_whose_edges_were_all_dropped_is_not_called_blank(capsys):
    scene = edges_in(*range(small_scene().n_images))
    kept = torch.ones(scene.n_images, scene.height, scene.width, dtype=torch.bool)
    kept[1, :20] = False
    build("expansive", scene=scene, kept=kept.flatten())
    assert "no edges" not in capsys.readouterr().out


@pytest.mark.parametrize(("batch_size", "beta", "warned"), [(1, "0.5", True), (2, "0.5", False), (1, "0", False)])
def test_a_batch_too_small_for_an_anchor_is_warned_about(batch_size, beta, warned, capsys):
    scene = edges_in(*range(small_scene().n_images))
    build("expansive", "--es_beta_a", beta, batch_size=batch_size, scene=scene)
    assert ("leave no anchor" in capsys.readouterr().out) == warned


def test_the_modules_under_test_are_those_that_are_registered():
    assert type(build("soft")) is soft_mining.SoftMiningSampler
    assert type(build("expansive")) is expansive.ExpansiveSampler
