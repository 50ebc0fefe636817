"""Short trainings of every sampler: on every format, with filtered rays and wide images, resumed, and a fifth one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from components.pixel_sets import pixel_batch
from dataLoader import scene_folder
from dataLoader.demo_write import write_demo_as
from opt import parse_options
from samplers import SAMPLERS
from utils.checkpoints import latest_checkpoint, load_checkpoint

FORMATS = ("syn", "nsvf", "tt", "llff", "own_data")
STEPS, N_IMAGES = 12, 7
TINY = "--n_iters 12 --batch_size 60 --N_voxel_init 1728 --N_voxel_final 3375 --upsamp_list [5,8] --featureC 8 "
TINY += "--update_AlphaMask_list [3,6] --density_shift -4 --lr_init 0.05 --progress_refresh_rate 4 --save_every 4 "
TINY += "--vis_every 100 --N_vis 0 --test_every 2 --device cpu --n_lamb_sigma [2,2,2] --n_lamb_sh [3,3,3]"
LITTLE = TINY.split()


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in FORMATS:
        write_demo_as(name, scene_folder(name, root, name), 24, n_train=N_IMAGES, n_test=2)
    return root


@pytest.fixture
def wide(monkeypatch):
    """Every scene loses rows at its top and bottom: images are twice as wide as high."""
    load = train.load_split

    def cropped(options, split, *found):
        scene = load(options, split, *found)
        rows = scene.height // 4
        intrinsics = scene.intrinsics.clone()
        intrinsics[:, 3] -= rows
        return replace(scene, images=scene.images[:, rows:-rows].contiguous(), intrinsics=intrinsics)

    monkeypatch.setattr(train, "load_split", cropped)


def options(data_folder, save_dir, name, strategy, *more):
    argv = ["--nerf_dataset", name, "--nerf_scene", name, "--data_folder", str(data_folder), "--strategy", strategy]
    argv += ["--downsample_train", "4"] if name == "llff" else []
    return parse_options([*argv, "--save_dir", str(save_dir), *LITTLE, *more])


def run_folder(o):
    return train.run_folder(o.save_dir, o.up_folder_name, o.nerf_dataset, o.nerf_scene, o.tag, o.seed)


@pytest.mark.parametrize("filter_rays", [0, 1])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
def test_every_sampler_trains_on_every_format(data_folder, tmp_path, wide, strategy, name, filter_rays):
    o = options(data_folder, tmp_path, name, strategy, "--filter_rays", str(filter_rays))
    results = train.run(o)
    lines = [json.loads(line) for line in (run_folder(o) / "metrics.jsonl").read_text().splitlines()]
    errors = [line["train/mse"] for line in lines if "train/mse" in line]
    assert len(errors) == STEPS // 4
    assert np.isfinite(errors).all()
    assert results["psnr"] > 3
    # Walkers come in whole numbers an image.
    assert results["rays_per_step"] == (-(-60 // N_IMAGES) * N_IMAGES if strategy == "soft" else 60)
    assert results["strategy"] == strategy


@pytest.mark.parametrize("name", ["syn", "llff"])
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("full", []),
        ("egra", ["--egra_refresh", "3"]),
        ("soft", []),
        ("soft", ["--soft_mining_grad", "viewdir"]),
        ("expansive", ["--es_ratio", "0.5"]),
    ],
)
def test_every_sampler_resumes_to_the_bit(data_folder, tmp_path, name, strategy, more, monkeypatch):
    more = [*more, "--filter_rays", "1"]
    whole = options(data_folder, tmp_path / "whole", name, strategy, *more)
    train.run(whole)
    parts = options(data_folder, tmp_path / "parts", name, strategy, *more)
    step = train.Trainer.step
    for stop in (5, 10):  # after checkpoints 4 and 8, before and after the second mask filters rays

        def interrupted(self, stop=stop):
            if self.iteration == stop:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(train.Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(parts)
    monkeypatch.setattr(train.Trainer, "step", step)
    results = train.run(parts)
    first, second = (load_checkpoint(latest_checkpoint(run_folder(o))) for o in (whole, parts))
    for key, values in first["field"]["parameters"].items():
        assert torch.equal(values, second["field"]["parameters"][key]), key
    for key, value in first["sampler"].items():
        torch.testing.assert_close(second["sampler"][key], value, rtol=0, atol=0, msg=key)
    assert torch.equal(first["draws"], second["draws"])
    stages = json.loads((run_folder(whole) / "results.json").read_text())["stages"]
    for stage, totals in stages.items():
        for key in ("steps", "rays", "live_samples", "colour_samples"):
            assert results["stages"][stage][key] == totals[key], (stage, key)


def test_the_stages_of_a_run_add_up(data_folder, tmp_path):
    results = train.run(options(data_folder, tmp_path, "syn", "full"))
    stages = results["stages"]
    assert [stages[s]["steps"] for s in ("before_mask", "growing", "after_mask")] == [4, 5, 3]
    live = sum(stage["steps"] * stage["live_samples"] for stage in stages.values())
    assert live / STEPS == pytest.approx(results["live_samples_per_step"])
    assert results["step_memory_mb"] == pytest.approx(max(s["step_memory_mb"] for s in stages.values()), abs=0.01)


class FirstColumn:
    """A fifth sampler: the leftmost pixel of rows at random, twice as heavy."""

    updates = 0

    def __init__(self, scene, kept, options, generator):
        self.scene, self.n, self.generator = scene, options.batch_size, generator

    def sample(self, step):
        row = torch.randint(self.scene.n_images * self.scene.height, (self.n,), generator=self.generator)
        return pixel_batch(row * self.scene.width, self.scene.height, self.scene.width)

    def weigh(self, pixels, error, step):
        return error.new_full((len(pixels),), 2.0)

    def update(self, pixels, ray_loss, step):
        assert not ray_loss.requires_grad
        FirstColumn.updates += 1

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def test_a_fifth_sampler_trains_after_one_line_in_the_registry(data_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "first_column", FirstColumn)
    o = options(data_folder, tmp_path, "syn", "first_column")
    assert train.run(o)["strategy"] == "first_column"
    assert FirstColumn.updates == STEPS
    draws = np.load(run_folder(o) / "views.npz")["draws"]
    assert draws[:, 0].sum() > 0
    assert draws[:, 1:].sum() == 0


@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
@pytest.mark.parametrize("case", ["blank", "hardly an edge", "one image", "small batch"])
def test_scenes_that_a_sampler_is_not_made_for_train_without_nan(
    data_folder, tmp_path, monkeypatch, strategy, case, capsys
):
    load = train.load_split

    def changed(options, split, *found):
        scene = load(options, split, *found)
        images = scene.images.clone()
        if split == "train" and case in ("blank", "hardly an edge"):
            images[..., :3], images[..., 3:] = 90, 255
        if split == "train" and case == "hardly an edge":
            images[2, :, 12:, :3] = 250
        if split == "train" and case == "one image":
            return replace(scene, images=images[:1], c2w=scene.c2w[:1], intrinsics=scene.intrinsics[:1])
        return replace(scene, images=images)

    monkeypatch.setattr(train, "load_split", changed)
    batch = ["--batch_size", "3"] if case == "small batch" else []
    more = ["--update_AlphaMask_list", "[]"] if case in ("blank", "hardly an edge") else []
    results = train.run(options(data_folder, tmp_path, "syn", strategy, *batch, *more))
    assert np.isfinite(results["psnr"])
    warned = "warning" in capsys.readouterr().out
    unlike = strategy != "full" and case in ("blank", "hardly an edge")
    assert warned == (unlike or (strategy == "soft" and case == "small batch"))


def test_soft_mining_through_the_view_direction_trains_where_colour_does_not_depend_on_it(data_folder, tmp_path):
    more = ["--soft_mining_grad", "viewdir", "--shadingMode", "RGB", "--data_dim_color", "3"]
    assert np.isfinite(train.run(options(data_folder, tmp_path, "syn", "soft", *more))["psnr"])


@pytest.mark.parametrize("more", [["--es_beta_a", "0"], ["--es_beta_a", "1"], ["--lamda_a", "0"], ["--lamda_s", "0"]])
def test_expansives_extremes_train_without_nan(data_folder, tmp_path, more):
    results = train.run(options(data_folder, tmp_path, "syn", "expansive", *more))
    assert np.isfinite(results["psnr"])
