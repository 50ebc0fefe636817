"""What a training step asks of the host and of the device: launches, copies, waits, milliseconds, longest kernels.

    python -m benchmarks.launches

Some steps of a real run of each strategy on the demo scene, 4096 rays, after WARM_UP steps in which colours appear;
on CUDA of `full` once more with its steps replayed as graphs.
The last line is JSON. On a CPU there is nothing to count but the time.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.script import exit_code
from components.perceptual import load_perceptual_metrics
from opt import parse_options
from samplers import SAMPLERS
from train import Trainer, choose_device, load_split
from utils.memory import MemoryMeter

ROOT = Path(__file__).resolve().parent.parent
# As many steps as the standard sampler draws at once, so that drawing is spread as in a run.
WARM_UP, STEPS = 300, 64
# With graphs: as often some steps are measured again in which new ones had to be made.
TRIES = 5
# Kernels that are listed.
LONGEST = 30


def step_through(trainer: Trainer, steps: int) -> None:
    end = trainer.iteration + steps
    while trainer.iteration < end:
        if trainer.advance(end - trainer.iteration):
            trainer.iteration += 1


def undisturbed(trainer: Trainer, measured: Callable[[], Any]) -> tuple[Any, int]:
    """(what `measured` says of some steps, how often it was asked): until no graphs were made within, at most TRIES."""
    tries, disturbed = 0, True
    while disturbed and tries < TRIES:
        made = graphs_made(trainer)
        said = measured()
        tries, disturbed = tries + 1, graphs_made(trainer) > made
    return said, tries


def graphs_made(trainer: Trainer) -> int:
    return trainer.fixed.n_made if trainer.fixed else 0


def timed(trainer: Trainer, steps: int, device: torch.device) -> float:
    """Milliseconds a step."""
    wait_for_device = torch.cuda.synchronize if device.type == "cuda" else int
    wait_for_device()
    clock = time.perf_counter()
    step_through(trainer, steps)
    wait_for_device()
    return 1000.0 * (time.perf_counter() - clock) / steps


def waits(trainer: Trainer, steps: int) -> dict[str, float]:
    """Waits for the device a step, by the line that waits."""
    trainer.timer.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step_through(trainer, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen = [w for w in caught if "called a synchronizing" in str(w.message)]
    lines = Counter(f"{os.path.relpath(w.filename, ROOT)}:{w.lineno}" for w in seen)
    return {line: count / steps for line, count in lines.most_common()}


def profiled(trainer: Trainer, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """(calls of the CUDA runtime and driver a step, microseconds a step of what ran longest on the device), by name."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step_through(trainer, steps)
        torch.cuda.synchronize()
    events = profiler.key_averages()
    calls = {e.key: e.count / steps for e in events if e.key.startswith(("cuda", "cuLaunch"))}
    times = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.key[:200]] += event.self_device_time_total / steps
    return dict(sorted(calls.items(), key=lambda item: -item[1])), dict(times.most_common(LONGEST))


def measure(argv: list[str], device: torch.device, warm_up: int, steps: int) -> dict:
    """One strategy: ms a step, and on CUDA launches, other calls and waits a step."""
    options = parse_options(argv)
    scenes = {split: load_split(options, split) for split in ("train", "test")}
    folder = Path(options.save_dir)
    trainer = Trainer(options, folder, device, scenes, load_perceptual_metrics(None, device), MemoryMeter(device))
    trainer.begin()
    trainer.fixed = trainer.fixed_steps()
    step_through(trainer, warm_up)
    report = {}
    report["ms_per_step"], report["tries"] = undisturbed(trainer, lambda: timed(trainer, steps, device))
    if device.type == "cuda":
        report["waits"], _ = undisturbed(trainer, lambda: waits(trainer, steps))
        report["waits_per_step"] = sum(report["waits"].values())
        (report["host_calls"], report["device_us"]), _ = undisturbed(trainer, lambda: profiled(trainer, steps))
        launches = [n for name, n in report["host_calls"].items() if "LaunchKernel" in name or "GraphLaunch" in name]
        report["launches_per_step"] = sum(launches)
    totals = trainer.stages.total
    report |= {"live_samples_per_step": totals("live_samples") / trainer.iteration}
    report |= {"colour_samples_per_step": totals("colour_samples") / trainer.iteration}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--strategies", default=",".join(SAMPLERS))
    parser.add_argument("--warm_up", type=int, default=WARM_UP)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("rest", nargs="*", help="more options of a run, after --")
    options = parser.parse_args()
    device, report = choose_device(options.device), {}
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--config", "configs/syn.txt", "--nerf_dataset", "demo", "--demo_resolution", "100"]
        argv += ["--data_folder", folder, "--save_dir", folder, "--device", options.device, *options.rest]
        runs = {name: ["--strategy", name, "--cuda_graphs", "0"] for name in options.strategies.split(",")}
        if device.type == "cuda":
            runs["full, CUDA graphs"] = ["--cuda_graphs", "1"]
        for strategy, own in runs.items():
            report[strategy] = measure([*argv, *own], device, options.warm_up, options.steps)
            print(
                strategy,
                {k: v for k, v in report[strategy].items() if k not in ("host_calls", "device_us")},
                file=sys.stderr,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
