"""What samplers draw, counted, against distributions written out over all pixels."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from components.edges import dilate, egra_edges, grey_8bit, search_edges
from components.langevin import position_of
from components.pixel_sets import PixelSet
from opt import parse_options
from samplers import build_sampler
from tests.test_cameras import small_scene
from tests.test_samplers import flat
from utils.seeds import make_generator

N_IMAGES, HEIGHT, WIDTH = 3, 22, 37


def pictures(channels: int = 3) -> torch.Tensor:
    """Discs of other colours on grey, so that there are edges; the last picture is the busiest."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    images = torch.full((N_IMAGES, HEIGHT, WIDTH, channels), 255, dtype=torch.uint8)
    images[..., :3] = 120
    for image in range(N_IMAGES):
        for disc in range(1 + 2 * image):
            inside = (x - 6 - 6 * disc).square() + (y - 6 - 2 * disc).square() < 16
            images[image, ..., :3][inside] = torch.tensor([250, 20 + 40 * disc, 10], dtype=torch.uint8)
    return images


def scene_of(images: torch.Tensor):
    return small_scene(n_images=len(images), height=images.shape[1], width=images.shape[2], images=images)


SCENE = scene_of(pictures())
KEPT = torch.rand(SCENE.n_pixels, generator=torch.Generator().manual_seed(5)) < 0.7
KEPT[: HEIGHT * WIDTH // 2] = False


def build(name, *arguments, scene=SCENE, kept=None, batch_size=6000, seed=0):
    options = parse_options(["--demo", "--batch_size", str(batch_size), *arguments])
    return build_sampler(name, scene, PixelSet(scene.n_pixels, kept), options, make_generator(seed, "sampler"))


def counted(sampler, scene=SCENE, steps=40, part=slice(None)) -> np.ndarray:
    """How often each pixel was drawn."""
    counts = torch.zeros(scene.n_pixels, dtype=torch.long)
    for step in range(steps):
        counts += torch.bincount(flat(sampler.sample(step), scene)[part], minlength=scene.n_pixels)
    return counts.numpy()


def assert_drawn_as(counts: np.ndarray, probability: np.ndarray) -> None:
    """Nothing impossible is drawn, and chi squared is what chance allows (5 standard deviations)."""
    possible = probability > 0
    assert not counts[~possible].any()
    expected = probability[possible] * counts.sum()
    assert expected.min() > 5, "too few draws to tell"
    chi = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def grey(image: int) -> np.ndarray:
    return grey_8bit(SCENE.images[image].numpy())


# --- egra ---
def slow_egra(shifted: list[np.ndarray], kept: np.ndarray) -> np.ndarray:
    """Each image's pixels by E*p + (1 - p)*4096/640000 on kept pixels, each image of the same mass."""
    parts = []
    for image, edges in enumerate(shifted):
        mass = np.zeros(HEIGHT * WIDTH)
        mass[edges] = 0.0025
        mass = (mass + (1 - 0.0025) * 4096 / 640000) * kept.reshape(N_IMAGES, -1)[image]
        parts.append(mass / mass.sum())
    return np.concatenate(parts) / N_IMAGES


def shifted_edges(sampler) -> list[np.ndarray]:
    """The shifts the sampler must have made: from its key, as its docstring says."""
    found = []
    for image in range(N_IMAGES):
        index = np.flatnonzero(egra_edges(grey(image)))
        moves = np.random.default_rng((sampler.state_dict()["key"], 0, image)).integers(6, 10, len(index))
        found.append((index + moves) % (HEIGHT * WIDTH))
    return found


@pytest.mark.parametrize("filtered", [False, True])
def test_egra_draws_by_its_probability(filtered):
    sampler = build("egra", kept=KEPT if filtered else None)
    kept = KEPT.numpy() if filtered else np.ones(SCENE.n_pixels, bool)
    shifted = shifted_edges(sampler)
    assert all(len(edges) for edges in shifted)
    assert_drawn_as(counted(sampler, steps=80), slow_egra(shifted, kept))


def test_egra_shifts_its_edges_anew_every_k_iterations_and_only_then():
    sampler = build("egra", "--egra_refresh", "3")
    edges = []
    for step in range(9):
        sampler.sample(step)
        edges.append(sampler._edges.clone())
    same = [torch.equal(a, b) for a, b in pairwise(edges)]
    assert same == [True, True, False, True, True, False, True, True]


# --- expansive ---
def anchor_map() -> np.ndarray:
    maps = [dilate(search_edges(grey(image), 0.25)) for image in range(N_IMAGES)]
    assert all(0 < m.mean() <= 0.25 for m in maps), "no picture of the test is thinned out"
    return np.stack(maps).ravel()


@pytest.mark.parametrize("filtered", [False, True])
def test_expansive_draws_anchors_then_sources_uniformly(filtered):
    sampler = build("expansive", kept=KEPT if filtered else None)
    kept = KEPT.numpy() if filtered else np.ones(SCENE.n_pixels, bool)
    anchors, sources = anchor_map() & kept, ~anchor_map() & kept
    assert_drawn_as(counted(sampler, part=slice(0, 3000)), anchors / anchors.sum())
    assert_drawn_as(counted(sampler, part=slice(3000, None)), sources / sources.sum())


@pytest.mark.parametrize(
    ("beta", "ratio", "anchors", "rays"), [(0.3, 1, 30, 101), (0.5, 0.5, 25, 50), (1, 0.1, 10, 10)]
)
def test_expansive_draws_as_many_rays_and_anchors_as_asked(beta, ratio, anchors, rays):
    sampler = build("expansive", "--es_beta_a", str(beta), "--es_ratio", str(ratio), batch_size=101)
    pixels = sampler.sample(0)
    assert len(pixels) == rays
    is_anchor = anchor_map()[flat(pixels, SCENE).numpy()]
    assert is_anchor[:anchors].all()
    assert not is_anchor[anchors:].any()


def test_expansive_thins_anchors_out_to_a_quarter_of_the_pixels():
    noise = torch.randint(0, 256, (2, 40, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sampler = build("expansive", scene=scene_of(noise), batch_size=4000)
    drawn = [flat(sampler.sample(step), scene_of(noise))[:2000] for step in range(20)]
    assert len(torch.cat(drawn).unique()) <= 2 * int(0.25 * 1600)


def test_expansive_bisect_finds_a_quarter_of_the_pixels_where_the_reference_does_not():
    assert anchor_map().reshape(N_IMAGES, -1)[0].mean() < 0.2
    sampler = build("expansive", "--es_search", "bisect")
    drawn = torch.cat([flat(sampler.sample(step), SCENE)[:3000] for step in range(10)]).unique()
    counts = torch.bincount(drawn // (HEIGHT * WIDTH), minlength=N_IMAGES)
    assert counts.tolist() == [int(0.25 * HEIGHT * WIDTH)] * N_IMAGES


def two_part_loss(options, pixels, error, n_anchors, step) -> torch.Tensor:
    """The loss of the paper, literally."""
    square = error.square().mean(-1)
    c = 1.0 if options.a_s_add else 3.0 - 2.0 * step / options.n_iters
    anchor, source = square[:n_anchors], square[n_anchors:]
    loss = options.lamda_a * (anchor.mean() if len(anchor) else 0.0)
    loss = loss + options.lamda_s * c * (source.mean() if len(source) else 0.0)
    return square.mean() if options.use_mse else loss / (1 + c) if options.es_normalize else loss


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--a_s_add"],
        ["--use_mse"],
        ["--es_normalize"],
        ["--lamda_a", "0"],
        ["--lamda_s", "0"],
        ["--lamda_a", "0.7", "--lamda_s", "2", "--es_beta_a", "0.3"],
        ["--es_beta_a", "0"],
        ["--es_beta_a", "1"],
        ["--es_ratio", "0.5", "--a_s_add", "--es_normalize"],
    ],
)
def test_expansives_weights_give_its_two_part_loss(arguments):
    options = parse_options(["--demo", "--batch_size", "41", "--n_iters", "100", *arguments])
    sampler = build("expansive", "--n_iters", "100", *arguments, batch_size=41)
    for step in (0, 37, 99):
        pixels = sampler.sample(step)
        error = torch.rand(len(pixels), 3, generator=torch.Generator().manual_seed(step)) - 0.5
        n_anchors = int(int(options.es_ratio * 41) * options.es_beta_a)
        loss = (sampler.weigh(pixels, error, step) * error.square().mean(-1)).mean()
        torch.testing.assert_close(loss, two_part_loss(options, pixels, error, n_anchors, step))


# --- soft mining ---
def slow_edge_density(kept: np.ndarray) -> np.ndarray:
    """[M, H, W]: Sobel of the grey with replicated borders, over the image's maximum, within [1e-5, 1], on kept."""
    density = np.zeros((N_IMAGES, HEIGHT, WIDTH))
    for image in range(N_IMAGES):
        g = np.pad(SCENE.image_rgb(image).double().numpy() @ np.array([0.2989, 0.587, 0.114]), 1, mode="edge")
        smooth_y, smooth_x = g[:-2] + 2 * g[1:-1] + g[2:], g[:, :-2] + 2 * g[:, 1:-1] + g[:, 2:]
        magnitude = np.hypot(smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2])
        density[image] = np.clip(magnitude / (magnitude.max() + 1e-7), 1e-5, 1)
    return density * kept.reshape(density.shape)


@pytest.mark.parametrize("filtered", [False, True])
def test_dead_walkers_are_reborn_by_the_edge_density_of_their_image(filtered):
    sampler = build("soft", kept=KEPT if filtered else None)
    kept = KEPT.numpy() if filtered else np.ones(SCENE.n_pixels, bool)
    counts = torch.zeros(SCENE.n_pixels, dtype=torch.long)
    for _ in range(40):
        sampler._give_birth(torch.ones(len(sampler._image), dtype=torch.bool))
        counts += torch.bincount(flat(sampler.sample(0), SCENE), minlength=SCENE.n_pixels)
    density = slow_edge_density(kept).reshape(N_IMAGES, -1)
    for image, drawn in enumerate(counts.view(N_IMAGES, -1).numpy()):
        likely = density[image] > 0.01 * density[image].max()
        assert not drawn[density[image] == 0].any()
        rest = density[image][~likely].sum() / density[image].sum()
        assert abs(drawn[~likely].sum() / drawn.sum() - rest) < 0.01
        assert_drawn_as(np.where(likely, drawn, 0), np.where(likely, density[image], 0) / density[image][likely].sum())


def test_every_image_has_its_walkers_and_they_stay_with_it():
    sampler = build("soft", batch_size=100)
    for step in range(30):
        pixels = sampler.sample(step)
        assert torch.equal(pixels.image_id, torch.arange(N_IMAGES).repeat_interleave(34))
        pixels.xy.grad = torch.randn(102, 2, generator=torch.Generator().manual_seed(step)) * 1e-3
        sampler.update(pixels, torch.rand(102, generator=torch.Generator().manual_seed(step)), step)


def test_images_of_which_nothing_is_kept_have_no_walkers():
    kept = torch.ones(SCENE.n_pixels, dtype=torch.bool)
    kept[: HEIGHT * WIDTH] = False
    for name in ("egra", "soft", "expansive"):
        pixels = build(name, kept=kept, batch_size=90).sample(0)
        assert pixels.image_id.unique().tolist() == [1, 2]


def test_walkers_at_the_corners_of_their_range_are_the_corner_pixels():
    sampler = build("soft", batch_size=3)
    sampler._position = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert sampler.sample(0).xy.tolist() == [[0.5, 0.5], [WIDTH - 0.5, HEIGHT - 0.5], [WIDTH - 0.5, 0.5]]
    corner = position_of(torch.tensor([HEIGHT - 1]), torch.tensor([WIDTH - 1]), HEIGHT, WIDTH)
    assert corner.tolist() == [[1.0, 1.0]]


def test_a_walker_with_a_loss_that_is_no_number_is_reborn_on_a_kept_pixel():
    sampler = build("soft", kept=KEPT, batch_size=30)
    pixels = sampler.sample(0)
    pixels.xy.grad = torch.full((30, 2), float("nan"))
    sampler.update(pixels, torch.full((30,), float("nan")), 0)
    assert KEPT[flat(sampler.sample(1), SCENE)].all()


def test_walkers_drift_up_the_gradient():
    sampler = build("soft", "--soft_mining_b", "0", batch_size=30)
    sampler._position = torch.full((30, 2), 0.5)
    pixels = sampler.sample(0)
    pixels.xy.grad = torch.tensor([[1e-3, -5e-4]]).repeat(30, 1)  # x right, y up
    sampler.update(pixels, torch.ones(30), 0)
    moved = sampler._position[(sampler._position - 0.5).abs().max(1).values < 0.1]
    # All losses are alike, so all are among the smallest and reborn: only then does nobody stay.
    assert len(moved) < 30
    sampler._position = torch.full((30, 2), 0.5)
    sampler.update(pixels, torch.linspace(1, 2, 30), 0)
    expected = torch.tensor([0.5 - 20 * 5e-4 / 2, 0.5 + 20 * 1e-3 / 2])
    torch.testing.assert_close(sampler._position[29], expected, rtol=1e-4, atol=1e-5)
