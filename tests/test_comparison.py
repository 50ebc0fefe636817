"""Comparisons: what stands in the tables, what the figures show, and that they need nothing but what runs left."""

import csv
import json

import numpy as np
import pytest

from utils.comparison import markdown, paired_differences, rows_by_tag, write_comparison
from utils.curves import read_curves
from utils.images import error_map
from utils.plots import curve_figure, memory_figure, view_figure
from utils.stages import StageTotals, stage_of
from utils.tables import collect_results


def result(strategy="full", seed=1, psnr=30.0, **changes):
    stage = {"steps": 10, "rays": 64, "live_samples": 100.0, "colour_samples": 50.0, "ms_per_step": 9.0}
    return {
        "dataset": "syn",
        "scene": "lego",
        "strategy": strategy,
        "seed": seed,
        "psnr": psnr,
        "ssim": 0.9,
        "lpips_alex": None,
        "lpips_vgg": None,
        "train_seconds": 100.0 + seed,
        "ms_per_step": {"sampler": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 4.0, "grow": 0.5},
        "peak_memory_mb": 300.0,
        "static_memory_mb": 100.0,
        "step_memory_mb": 80.0,
        "rays_per_step": 64.0,
        "stages": {"before_mask": {**stage, "step_memory_mb": 80.0}, "growing": None, "after_mask": None},
        "test_curve": {"iteration": [10, 20], "train_seconds": [1.0, 2.0], "psnr": [20.0, psnr]},
        "device": "a CPU",
        "torch": "2",
        "commit": "abc",
        "kernels": "k",
        "options": {"strategy": strategy, "batch_size": 64, "es_ratio": 1.0, "seed": seed},
        **changes,
    }


def picture(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "rgb": random.integers(0, 256, (20, 30, 3), dtype=np.uint8),
        "truth": np.full((20, 30, 3), 128, np.uint8),
        "depth": random.random((20, 30), np.float32) + 2,
        "opacity": np.ones((20, 30), np.float32),
        "depth_limits": np.array([2.0, 3.0]),
        "photo": np.zeros((20, 30, 3), np.uint8),
        "draws": random.integers(0, 5, (20, 30)).astype(np.float32),
    }


@pytest.fixture
def scene(tmp_path):
    """A scene's folder with three rows: full and expansive with seeds 1 and 2, egra with seed 1."""

    def add(tag, seed, psnr, strategy, **changes):
        folder = tmp_path / tag / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result(strategy, seed, psnr, **changes)))
        (folder / "args.json").write_text("{}")
        np.savez(folder / "views.npz", **picture(seed))

    halved = {"strategy": "expansive", "batch_size": 64, "es_ratio": 0.5}
    add("full", 1, 30.0, "full")
    add("full", 2, 31.0, "full")
    add("expansive-es_ratio0.5", 1, 30.5, "expansive", options=halved)
    add("expansive-es_ratio0.5", 2, 31.7, "expansive", options=halved)
    add("egra", 1, 29.0, "egra")
    return tmp_path


def test_the_table_holds_means_spreads_and_paired_differences(scene):
    folder = write_comparison(scene)
    text = (folder / "table.md").read_text()
    assert "| full | 2 | 30.50 +- 0.71 | 0.9000 +- 0.0000 | n/a | n/a | 102 +- 1 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| expansive-es_ratio0.5 | 2 | 31.10"))
    assert row.endswith("| 0.60 +- 0.14 |")  # 0.5 and 0.7, seed by seed
    assert "| egra | 1 | 29.00 |" in text
    assert "also differs from the first row in es_ratio = 0.5" in text
    assert "not all rows have the same seeds" in text
    with (folder / "table.csv").open() as file:
        rows = {r["tag"]: r for r in csv.DictReader(file)}
    assert next(iter(rows)) == "full"
    assert float(rows["expansive-es_ratio0.5"]["psnr_minus_full_mean"]) == pytest.approx(0.6)
    assert float(rows["full"]["psnr_std"]) == pytest.approx(0.7071, abs=1e-4)
    assert rows["full"]["lpips_alex_mean"] == ""
    assert float(rows["egra"]["ms_per_step_backward_mean"]) == 3.0
    assert float(rows["egra"]["stages_before_mask_step_memory_mb_mean"]) == 80.0


def test_figures_are_written_and_show_something(scene):
    from PIL import Image

    folder = write_comparison(scene)
    for name in ("overview", "views", "draws", "memory", "psnr_over_iterations", "psnr_over_seconds"):
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 100, name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, name
    assert len(list(folder.glob("events.out.*"))) == 1
    write_comparison(scene)
    assert len(list(folder.glob("events.out.*"))) == 1


def test_unfinished_runs_are_named_and_other_machines_warned_of(scene):
    (scene / "soft" / "seed1").mkdir(parents=True)
    (scene / "soft" / "seed1" / "args.json").write_text("{}")
    other = scene / "egra" / "seed1" / "results.json"
    other.write_text(json.dumps(result("egra", 1, 29.0, device="a GPU")))
    text = (write_comparison(scene) / "table.md").read_text()
    assert "soft/seed1 is not finished" in text
    assert "not all runs have the same device" in text


def test_results_without_stages_curves_and_pictures_still_make_a_comparison(tmp_path):
    folder = tmp_path / "full" / "seed1"
    folder.mkdir(parents=True)
    old = {k: v for k, v in result().items() if k not in ("stages", "test_curve", "options", "kernels")}
    (folder / "results.json").write_text(json.dumps(old))
    made = write_comparison(tmp_path)
    assert "| full | 1 | 30.00 |" in (made / "table.md").read_text()
    assert not (made / "views.png").exists()


def test_runs_of_the_cp_decomposition_have_a_baseline_of_their_own(tmp_path):
    for tag, psnr, model in (
        ("full", 33.0, "TensorVMSplit"),
        ("full_cp", 30.0, "TensorCP"),
        ("egra_cp", 31.0, "TensorCP"),
    ):
        folder = tmp_path / tag / "seed1"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result(tag.split("_")[0], 1, psnr, model_name=model)))
    rows = rows_by_tag(collect_results(tmp_path))
    assert list(rows) == ["full", "full_cp", "egra_cp"]
    assert paired_differences(rows, "egra_cp") == pytest.approx([1.0])
    assert "no row" not in markdown(rows, [])
    del rows["full_cp"]
    assert "there is no row full_cp to compare with" in markdown(rows, [])


def test_seeds_of_one_row_with_other_settings_are_warned_of(scene):
    path = scene / "full" / "seed2" / "results.json"
    path.write_text(json.dumps(result("full", 2, options={"strategy": "full", "batch_size": 65, "es_ratio": 1.0})))
    assert "the runs of full do not have the same settings" in (write_comparison(scene) / "table.md").read_text()


def test_a_damaged_result_is_left_out_with_a_warning(scene):
    (scene / "egra" / "seed1" / "results.json").write_text("{")
    with pytest.warns(UserWarning, match=r"egra.*seed1.*results\.json"):
        folder = write_comparison(scene)
    assert "| egra" not in (folder / "table.md").read_text()


def test_damaged_pictures_are_left_out_with_a_warning(scene):
    (scene / "egra" / "seed1" / "views.npz").write_bytes(b"PK no zip")
    with pytest.warns(UserWarning, match=r"views\.npz is damaged"):
        assert write_comparison(scene)


def test_no_finished_run_makes_no_comparison(tmp_path):
    assert write_comparison(tmp_path) is None


def test_a_mean_over_some_of_the_seeds_is_not_shown(scene):
    path = scene / "full" / "seed2" / "results.json"
    path.write_text(json.dumps(result("full", 2, None)))
    rows = rows_by_tag(collect_results(scene))
    assert "| full | 2 | n/a |" in markdown(rows, [])
    assert paired_differences(rows, "expansive-es_ratio0.5") == pytest.approx([0.5])


def test_the_curves_and_bars_show_the_numbers():
    rows = {"full": [result(), result(seed=2, psnr=32.0)], "egra": [result("egra", psnr=29.0)]}
    axes = curve_figure(rows, "iteration").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[10, 20], [20, 31]]
    assert axes.lines[1].get_xydata().tolist() == [[10, 20], [20, 29]]
    assert curve_figure(rows, "s").axes[0].lines[0].get_xdata().tolist() == [1.0, 2.0]
    widths = [bar.get_width() for bar in memory_figure(rows).axes[0].patches]
    assert widths == [80.0, 80.0, 0.0, 0.0]
    many = {f"tag{i}": picture(i) for i in range(12)}
    assert len(view_figure(many).axes) == 3 * 9


def test_error_maps_share_one_scale():
    truth = np.zeros((2, 2, 3), np.uint8)
    image = truth.copy()
    image[0, 0], image[0, 1], image[1, 0] = 51, 255, 25  # 0.2, 1.0, 0.1
    colours = error_map(image, truth)
    assert colours[0, 0].tolist() == colours[0, 1].tolist()
    assert colours[1, 1].sum() < colours[1, 0].sum() < colours[0, 0].sum()


# --- what a run leaves for it ---
def test_stages_end_with_the_first_mask_and_the_last_growth():
    stages = [stage_of(i, [3, 6], [5, 8, 50], 12) for i in range(12)]
    assert stages == ["before_mask"] * 4 + ["growing"] * 5 + ["after_mask"] * 3
    assert {stage_of(i, [], [5], 12) for i in range(12)} == {"before_mask"}
    assert stage_of(11, [40], [5], 12) == "before_mask"


def test_stage_totals_are_means_a_step_and_survive_a_checkpoint():
    totals = StageTotals()
    totals.add("growing", steps=1, rays=10, live_samples=100, colour_samples=40)
    totals.add("growing", steps=1, rays=20, live_samples=300, colour_samples=60)
    totals.add("growing", seconds=0.5)
    totals.memory("growing", 7.0)
    totals.memory("growing", 5.0)
    again = StageTotals()
    again.load_state_dict(totals.state_dict())
    expected = {"steps": 2, "rays": 15, "live_samples": 200, "colour_samples": 50, "ms_per_step": 250}
    assert again.results() == {"before_mask": None, "growing": {**expected, "step_memory_mb": 7}, "after_mask": None}
    assert again.total("rays") == 30


def test_curves_are_thinned_out_and_keep_the_last_point(tmp_path):
    lines = [{"step": i, "train/PSNR": i / 10, "time/train_seconds": i * 2.0} for i in range(1, 502)]
    lines.insert(300, {"step": 300, "test/psnr": 25.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 502, "train/P')
    training, test = read_curves(path)
    assert training["iteration"][-1] == 501
    assert 100 < len(training["iteration"]) <= 200
    assert {len(values) for values in training.values()} == {len(training["iteration"])}
    assert test == {"iteration": [300], "train_seconds": [600.0], "psnr": [25.0]}


def test_a_row_of_another_protocol_is_pointed_out():
    runs = [result(tag="full", options={"n_iters": 40}), result("egra", tag="egra", options={"n_iters": 20})]
    text = markdown(rows_by_tag(runs), [])
    assert "egra ran under another protocol (n_iters = 20)" in text
    assert "another protocol" not in markdown(rows_by_tag(runs[:1]), [])


def test_a_row_is_compared_with_the_baselines_run_of_its_seed():
    runs = [
        result(tag="full", seed=1, options={"n_iters": 40}),
        result(tag="full", seed=2, options={"n_iters": 20}),
        result("egra", tag="egra", seed=2, options={"n_iters": 20}),
    ]
    text = markdown(rows_by_tag(runs), [])
    assert "egra ran under another protocol" not in text
    assert "egra also differs" not in text
