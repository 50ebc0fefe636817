"""One training with full lego's settings (30000 steps of 4096 rays), or as much of it as fits into some seconds.

    python -m benchmarks.training --data_folder data --seconds 200 -- --strategy expansive --es_ratio 0.5

Scored on all test views that are there (another --test_every: on some). Without lego under --data_folder, the same on
the demo scene. The last line is JSON.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import train
from benchmarks.script import exit_code
from opt import parse_options

KEYS = ["dataset", "scene", "strategy", "n_iters", "batch_size", "rays_per_step", "psnr", "ssim", "train_seconds"]
KEYS += ["setup_seconds", "ms_per_step", "peak_memory_mb", "static_memory_mb", "step_memory_mb", "stages", "kernels"]
KEYS += ["live_samples_per_step", "colour_samples_per_step"]


def lego_test_views(data_folder: str) -> int:
    """How many test images of lego there are; 0 without the scene."""
    return len(list((Path(data_folder) / "nerf_synthetic" / "lego" / "test").glob("r_*.png")))


def training(data_folder: str, device: str, seconds: float, more: list[str]) -> dict:
    """What results.json says of the run, and whether it came to its end in `seconds` of training."""
    with tempfile.TemporaryDirectory() as folder:
        if lego_test_views(data_folder):
            # Every 8th test image may be all that was brought along.
            argv = ["--config", "configs/lego.txt", "--data_folder", data_folder, "--skip_missing_frames"]
        else:
            argv = ["--config", "configs/syn.txt", "--nerf_dataset", "demo", "--demo_resolution", "400"]
            argv += ["--data_folder", folder]
        argv += ["--save_dir", folder, "--device", device, "--vis_every", "1000000", "--progress_refresh_rate", "100"]
        options = parse_options([*argv, "--save_every", "1000000", *more])
        started = time.perf_counter()
        results = train.run(options, stop_after=seconds)
        took = time.perf_counter() - started
    whole = {"complete": results["n_iters"] == options.n_iters, "test_views": len(results["per_view"]["psnr"])}
    whole["scoring_seconds"] = took - results["setup_seconds"] - results["train_seconds"]
    return {**{key: results[key] for key in KEYS}, **whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", default="data", help="folder that holds nerf_synthetic/lego")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="seconds of training that are enough")
    parser.add_argument("rest", nargs="*", help="more options of the run, after --")
    options = parser.parse_args()
    print(json.dumps(training(options.data_folder, options.device, options.seconds, options.rest)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
