"""How time and memory grow: of a training step with batch, number of images and grid; of a test view with its size.

    python -m benchmarks.scaling                      # everything, 8 to 10 minutes on a CPU with 2 cores
    python -m benchmarks.scaling --only batch,grid    # some of it, to look at; writes nothing
    python -m benchmarks.scaling --quick              # a few points in under a minute; writes nothing
    python -m benchmarks.scaling --plot               # the figure again, from the JSON

One of the four varies at a time, the others stay at BASE. Every point has a process of its own. A step is the trainer's
(train.py) at learning rate 0, so that the work stays the same, on the fields of benchmarks/fields.py, resampled to the
grid; the dense twin (tests/reference.py) takes the renderer's place in the same step, up to TWIN_MOST rays. A view goes
through components/evaluation.py. Writes benchmarks/results/scaling_{device}.json and .png.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
# size: width and height of the images, pixels; grid: points an axis; a "step" of the axis resolution is a test view.
BASE = {"path": "packed", "field": "after", "strategy": "full", "rays": 4096, "images": 100, "size": 400, "grid": 128}
VARIES = {"batch": "rays", "images": "images", "grid": "grid", "resolution": "size"}
VALUES = {
    "batch": (512, 1024, 2048, 4096, 8192, 16384),
    "images": (10, 100, 200, 400),
    "grid": (64, 96, 128, 160, 200, 256, 300),
    "resolution": (100, 200, 400, 800, 1200),
}
QUICK = {"batch": (512, 1024), "images": (10, 50), "grid": (64, 128), "resolution": (100, 200)}
TWIN_MOST = {"cpu": 4096, "cuda": 16384}
STRATEGIES = ("full", "egra", "soft", "expansive")
# Steps and views that warm up, and that are timed at the least.
WARM_UP, AT_LEAST = (2, 1), (5, 1)


def points(values: dict[str, tuple[int, ...]], twin_most: int) -> list[dict]:
    """The settings of every point: BASE with its axis and what differs."""
    found = []
    for axis, numbers in values.items():
        for number in numbers:
            variants = [{"images": 1}]
            if axis in ("batch", "grid"):
                paths = ("packed", "twin") if axis == "batch" and number <= twin_most else ("packed",)
                variants = [{"field": field, "path": path} for field in ("before", "after") for path in paths]
            elif axis == "images":
                variants = [{"strategy": strategy} for strategy in STRATEGIES]
            found += [{**BASE, **variant, "axis": axis, VARIES[axis]: number} for variant in variants]
    return found


def make_trainer(point: dict, device, memory):
    """A trainer with the point's scene, sampler and field, at learning rate 0."""
    import torch

    from benchmarks.fields import after_mask, as_reference, before_mask, shapes_scene
    from components.types import RenderOutput
    from models.growth import upsample
    from models.optimizers import BETAS, make_adam
    from opt import parse_options
    from tests.reference import dense_render
    from train import Trainer

    argv = ["--nerf_dataset", "syn", "--nerf_scene", "lego", "--strategy", point["strategy"]]
    scene = shapes_scene(point["images"], point["size"])
    options = parse_options([*argv, "--batch_size", str(point["rays"])])
    trainer = Trainer(options, Path(), device, {"train": scene, "test": scene}, None, memory)
    field = trainer.field = (before_mask if point["field"] == "before" else after_mask)(device)
    if point["grid"] != field.grid_size[0]:
        upsample(field, (point["grid"],) * 3)
    groups = field.param_groups(0.0, 0.0)
    trainer.sampler, trainer.optimizer = trainer.new_sampler(), make_adam(groups)
    if point["path"] == "twin":
        as_reference(field)
        trainer.optimizer = torch.optim.Adam(groups, betas=BETAS)

        def render(*arguments):
            out = dense_render(field, *arguments)
            return RenderOutput(out.rgb, out.opacity, out.depth, out.n_density, out.n_colour)

        field.render = render
    return trainer


def measure(point: dict, device_name: str, seconds: float = 1.0) -> dict:
    """A point in this process: median ms of a step (and by phase) or a view, its memory, and what stays (MB)."""
    from benchmarks.step_memory import peak_of
    from components.evaluation import render_view
    from models.kernels import threads
    from train import choose_device, evaluation_renderer
    from utils.memory import MemoryMeter, keep_freed_memory
    from utils.timing import PhaseTimer

    device, twin, is_view = choose_device(device_name), point["path"] == "twin", point["axis"] == "resolution"
    if twin:
        threads.taking_over = contextlib.nullcontext  # it is all torch, whose threads are OpenMP's
    elif device.type == "cpu":
        keep_freed_memory()  # as train.py
    memory = MemoryMeter(device)
    memory.start()
    trainer = make_trainer(point, device, memory)
    test = trainer.scenes["test"]
    render = evaluation_renderer(trainer.field, test)

    def view() -> None:
        with trainer.timer.phase("forward"):
            render_view(test, render, test.c2w[0], test.intrinsics[0], trainer.options.eval_chunk)

    once, times = view if is_view else trainer.step, []
    with threads.taking_over():
        for number in range(-WARM_UP[is_view], 1000):
            if number == 0:
                trainer.open_memory()
            trainer.timer = PhaseTimer(device)
            clock = time.perf_counter()
            once()
            trainer.timer.collect()
            ms = {"step": 1000 * (time.perf_counter() - clock), **trainer.timer.ms_per_step(1)}
            if number >= 0:
                times.append(ms)
            if len(times) >= AT_LEAST[is_view] and sum(t["step"] for t in times) > 1000 * seconds:
                break
            trainer.iteration += 1
        step_mb, counts = memory.close_segment(trainer.static_mb()), trainer.stages.total
        result = {**point, "ms": {key: statistics.median(t[key] for t in times) for key in ms if key != "grow"}}
        result |= {"ms_range": [pick(t["step"] for t in times) for pick in (min, max)], "timed": len(times)}
        result |= {"step_memory_mb": step_mb, "static_mb": trainer.static_mb()}
        if not is_view:
            result |= {"rays_per_step": counts("rays") / counts("steps")}
            result |= {f"{kind}_per_ray": counts(f"{kind}_samples") / counts("rays") for kind in ("live", "colour")}
            result["step_tensors_mb"] = peak_of(trainer) if device.type == "cpu" else step_mb
    return result


def measure_in_fresh_process(point: dict, device_name: str, seconds: float = 1.0) -> dict:
    """The same in a process of its own."""
    from benchmarks.script import result_of

    command = [str(Path(__file__).resolve()), "--point", json.dumps(point), "--device", device_name]
    return result_of([*command, "--seconds", str(seconds)], str(point))


def main() -> None:
    import torch

    from benchmarks.scaling_figure import figure
    from utils.device import device_name
    from utils.run_folder import git_commit, read_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default=",".join(VARIES), help="what varies, with commas; some of it: no JSON")
    parser.add_argument("--quick", action="store_true", help="a few points, no JSON")
    parser.add_argument("--plot", action="store_true", help="draw the JSON, measure nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a point is timed, at least")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point, options.device, options.seconds)))
        return
    path = RESULTS / f"scaling_{options.device}.json"
    only = options.only.split(",")
    if unknown := set(only) - set(VARIES):
        parser.error(f"--only {','.join(sorted(unknown))}: choose among {','.join(VARIES)}")
    if options.plot:
        report = read_json(path)
    else:
        values = {axis: numbers for axis, numbers in (QUICK if options.quick else VALUES).items() if axis in only}
        chosen, results = points(values, TWIN_MOST[options.device]), []
        if options.quick:
            chosen = [p for p in chosen if p["field"] == "after" and p["strategy"] == "full"]
            options.seconds = 0.2
        for point in chosen:
            r = measure_in_fresh_process(point, options.device, options.seconds)
            results.append(r)
            name = " ".join(str(point[key]) for key in ("axis", VARIES[point["axis"]], "path", "field", "strategy"))
            memory = f"{r['step_memory_mb']:.0f} MB beyond {r['static_mb']:.0f}"
            print(f"{name}: {r['ms']['step']:.1f} ms, {memory}", flush=True)
        if options.quick or set(only) != set(VARIES):
            return
        facts = {"device": device_name(torch.device(options.device)), "torch": torch.__version__}
        report = {**facts, "commit": git_commit(), "base": BASE, "points": results}
        path.write_text(json.dumps(report, indent=1) + "\n")
    figure(report).savefig(path.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    from benchmarks.script import exit_code

    sys.exit(exit_code(main))
