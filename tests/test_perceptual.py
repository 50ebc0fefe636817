import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from components import perceptual
from components.perceptual import MIN_SIDE, load_perceptual_metrics
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT.parent / "shared" / "lpips"
GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
A, B = torch.tensor(GOLDEN["a"]), torch.tensor(GOLDEN["b"])
ALEX_SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path, monkeypatch):
    """What a machine happens to have downloaded must not decide a test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def alexnet_like(seed=0):
    """A state dict with AlexNet's names and shapes, one foreign key included."""
    generator = torch.Generator().manual_seed(seed)
    state = {"classifier.1.weight": torch.zeros(3)}
    for index, shape in ALEX_SHAPES.items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(shape[0])
    return state


@pytest.fixture
def random_alexnet(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(alexnet_like(), folder / "alexnet-random.pth")
    return folder


@pytest.mark.skipif(
    not (WEIGHTS / "alexnet-features.pth").exists(), reason="needs AlexNet's weights in ../shared/lpips"
)
def test_lpips_alex_matches_the_reference_and_vgg_is_not_available():
    metrics = load_perceptual_metrics(str(WEIGHTS), "cpu")
    measured = metrics.measure(A, B)
    assert measured["lpips_alex"] == pytest.approx(GOLDEN["lpips_alex"].item(), rel=1e-4)
    assert measured["lpips_vgg"] is None
    assert metrics.lines[0] == "lpips_alex: available"
    assert metrics.lines[1].startswith("lpips_vgg: n/a, no vgg16 weights")


def test_without_weights_nothing_is_measured_and_one_line_each_says_how_to_get_them():
    metrics = load_perceptual_metrics(None, "cpu")
    assert metrics.measure(A, B) == {"lpips_alex": None, "lpips_vgg": None}
    for line, backbone in zip(metrics.lines, ("alexnet", "vgg16"), strict=True):
        assert f"models.{backbone}(weights='DEFAULT')" in line
        assert "--lpips_weights DIR" in line
        assert "\n" not in line


def test_the_command_in_the_hint_builds_the_model_here():
    hint = load_perceptual_metrics(None, "cpu").lines[0]
    program = hint.split('"')[1].replace("'DEFAULT'", "None")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_full_state_dicts_give_zero_for_equal_pictures_and_are_symmetric(random_alexnet):
    metrics = load_perceptual_metrics(str(random_alexnet), "cpu")
    assert metrics.measure(A, A)["lpips_alex"] == 0.0
    assert metrics.measure(A, B)["lpips_alex"] > 0.0
    assert metrics.measure(A, B) == metrics.measure(B, A)
    metrics.release()


def test_the_weights_that_are_used_are_those_of_the_file(random_alexnet):
    before = load_perceptual_metrics(str(random_alexnet), "cpu").measure(A, B)["lpips_alex"]
    again = load_perceptual_metrics(str(random_alexnet), "cpu").measure(A, B)["lpips_alex"]
    torch.save(alexnet_like(seed=1), random_alexnet / "alexnet-random.pth")
    other = load_perceptual_metrics(str(random_alexnet), "cpu").measure(A, B)["lpips_alex"]
    assert before == again
    assert before != other


def test_weights_in_the_hub_cache_are_found(tmp_path, random_alexnet):
    (tmp_path / "hub").mkdir()
    random_alexnet.rename(tmp_path / "hub" / "checkpoints")
    assert load_perceptual_metrics(None, "cpu").lines[0] == "lpips_alex: available"


def test_loading_leaves_the_global_random_state_alone(random_alexnet):
    before = torch.get_rng_state()
    load_perceptual_metrics(str(random_alexnet), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(MIN_SIDE - 1, 80), (80, MIN_SIDE - 1), (8, 8)])
def test_small_pictures_have_no_distance_and_the_reason_is_noted(random_alexnet, size):
    metrics = load_perceptual_metrics(str(random_alexnet), "cpu")
    picture = torch.rand(*size, 3)
    assert metrics.measure(picture, picture) == {"lpips_alex": None, "lpips_vgg": None}
    assert f"{size[1]}x{size[0]}" in next(iter(metrics.notes))


def test_pictures_of_the_smallest_size_are_measured(random_alexnet):
    metrics = load_perceptual_metrics(str(random_alexnet), "cpu")
    assert metrics.measure(torch.zeros(MIN_SIDE, MIN_SIDE, 3), torch.rand(MIN_SIDE, MIN_SIDE, 3))["lpips_alex"] > 0.0
    assert metrics.notes == set()


def break_shape(state):
    state["features.3.weight"] = torch.zeros(2, 2)


def break_key(state):
    del state["features.10.bias"]


@pytest.mark.parametrize("damage", [break_shape, break_key])
def test_wrong_weights_that_the_user_gave_are_an_error_that_names_the_file(random_alexnet, damage):
    state = alexnet_like()
    damage(state)
    torch.save(state, random_alexnet / "alexnet-random.pth")
    with pytest.raises(UserError, match=r"alexnet-random\.pth does not hold"):
        load_perceptual_metrics(str(random_alexnet), "cpu")


def test_a_damaged_file_is_an_error_if_the_user_gave_it_and_a_reason_if_it_lay_in_the_cache(tmp_path, random_alexnet):
    path = random_alexnet / "alexnet-random.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"alexnet-random\.pth is damaged"):
        load_perceptual_metrics(str(random_alexnet), "cpu")
    (tmp_path / "hub").mkdir()
    random_alexnet.rename(tmp_path / "hub" / "checkpoints")
    line = load_perceptual_metrics(None, "cpu").lines[0]
    assert line.startswith("lpips_alex: n/a,")
    assert "damaged" in line


def test_a_weights_folder_that_is_missing_or_has_no_weights_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_perceptual_metrics(str(tmp_path / "missing"), "cpu")
    (tmp_path / "vgg16_bn-6c64b313.pth").write_text("another network")
    with pytest.raises(UserError, match="holds neither"):
        load_perceptual_metrics(str(tmp_path), "cpu")


@pytest.mark.parametrize("broken", ["missing", "not importable"])
def test_without_the_lpips_package_the_reason_is_told(random_alexnet, monkeypatch, broken):
    if broken == "missing":
        monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, "lpips", None)
    metrics = load_perceptual_metrics(str(random_alexnet), "cpu")
    assert metrics.networks == {}
    assert metrics.lines[0].startswith("lpips_alex: n/a, ")
    assert "lpips" in metrics.lines[0].split("n/a")[1]
