"""Damaged results.json, args.json and metrics.jsonl, read as tables, by a run that starts again, and as curves."""

import functools
import json
from pathlib import Path
from random import Random

from opt import RUN_IDENTITY_EXEMPT, parse_options, resolved_dict
from tests import fuzz_mutators as mutate
from utils.comparison import markdown, rows_by_tag, write_comparison
from utils.curves import read_curves
from utils.plots import curve_figure, memory_figure
from utils.run_folder import prepare_run_folder
from utils.tables import collect_results, write_tables

SYN = ("--nerf_dataset", "syn", "--nerf_scene", "tiny")


@functools.cache
def results_text() -> str:
    """A results.json as a run writes it."""
    stage = {"steps": 5, "rays": 64.0, "live_samples": 900.0, "colour_samples": 80.0}
    stage |= {"ms_per_step": 4.0, "step_memory_mb": 30.0}
    numbers = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "psnr_5view", "train_seconds", "setup_seconds")
    numbers += ("peak_memory_mb", "static_memory_mb", "step_memory_mb", "rays_per_step")
    phases = ("sampler", "forward", "backward", "optimizer", "grow")
    return json.dumps(
        {
            **{"dataset": "syn", "scene": "lego", "strategy": "full", "tag": "full", "seed": 1, "n_iters": 10},
            **{
                "model_name": "TensorVMSplit",
                "batch_size": 64,
                "device": "cpu",
                "torch": "2",
                "commit": "a",
                "kernels": "k",
            },
            **dict.fromkeys(numbers, 20.5),
            "stages": {"before_mask": stage, "growing": None, "after_mask": stage},
            "ms_per_step": dict.fromkeys(phases, 1.5),
            "per_view": [{"index": 0, "psnr": 20.0}],
            "curves": {"iteration": [1, 2], "train_psnr": [10.0, 20.0]},
            "test_curve": {"iteration": [5, 10], "train_seconds": [1.0, 2.0], "psnr": [15.0, 20.0]},
            "options": resolved_dict(parse_options(SYN)),
        }
    )


def damage_text(r: Random, path: Path) -> None:
    """Damage for a text file of JSON values, a value a line or one in all."""
    kind, text = r.random(), path.read_text()
    if kind < 0.55:
        lines = [text] if path.suffix == ".json" else text.splitlines()
        at = r.randrange(len(lines))
        lines[at] = mutate.json_text(r, lines[at])
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif kind < 0.9:
        path.write_bytes(mutate.bytes_blindly(r, text.encode()))
    elif kind < 0.95:
        path.write_bytes(mutate.lines_text(r, text).encode("utf-8", "surrogatepass"))
    else:
        mutate.file_system(r, path)


def write_results(place: Path) -> Path:
    """Runs with good results of two strategies; the folder of their scene."""
    folder = place / "syn" / "lego"
    for tag, seed in (("full", 1), ("full", 2), ("soft", 1)):
        run = folder / tag / f"seed{seed}"
        run.mkdir(parents=True)
        (run / "results.json").write_text(results_text().replace('"seed": 1', f'"seed": {seed}'))
        (run / "args.json").write_text("{}")
    return folder


def results(r: Random, place: Path) -> None:
    """A damaged results.json beside good ones, in tables and comparison."""
    folder = write_results(place)
    damage_text(r, r.choice(sorted(folder.rglob("results.json"))))
    write_tables(place)
    rows = rows_by_tag(collect_results(folder))
    assert "n/a" not in markdown(rows, [])[:20]
    curve_figure(rows, "s")
    memory_figure(rows)
    if r.random() < 0.02:  # drawing takes a second
        write_comparison(folder)


def arguments(r: Random, place: Path) -> None:
    """A damaged args.json of an unfinished run that is started again."""
    options = resolved_dict(parse_options(SYN))
    (place / "args.json").write_text(json.dumps(options, indent=2))
    (place / "ckpt_4.th").write_bytes(b"")
    damage_text(r, place / "args.json")
    assert prepare_run_folder(place, options, set(RUN_IDENTITY_EXEMPT), overwrite=False) in ("new", "resume")


def metrics(r: Random, place: Path) -> None:
    """A damaged metrics.jsonl, of which the curves for results.json are made."""
    names = ("train/PSNR", "train/mse", "time/train_seconds", "time/step_ms", "memory/allocated_mb", "test/psnr")
    lines = [json.dumps({"step": step, **dict.fromkeys(names, step / 3)}) for step in range(10, 100, 10)]
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    damage_text(r, place / "metrics.jsonl")
    training, test = read_curves(place / "metrics.jsonl")
    assert len({len(values) for values in training.values()}) == 1
    assert len({len(values) for values in test.values()}) == 1
    json.dumps([training, test], allow_nan=False)
