"""What a machine with a CUDA device must show, in one call under 10 minutes.

    make gpu-check        or, with another Python that has torch and the packages:  python -m benchmarks.gpu_check

Full lego (30000 steps of 4096 rays, --filter_rays 1, scored on all test views that are there; as much of it as fits, on
the demo scene without lego under --data_folder); benchmarks/kernels.py, step.py and launches.py; the tests marked cuda
(every kernel and whole renderings against their twins). In the time that is left: full, full without CUDA graphs, with
a bfloat16 network and with half the rays, and expansive with half the rays, all by the same shortened schedule, and
compute-sanitizer over some of the kernels' tests. --full has no limit of time: step.py with all its variants, the
comparison by the whole schedule, and compute-sanitizer over all of the kernels' tests. Each part runs in a process of
its own, and its failure leaves the others alone. Writes benchmarks/results/gpu_check.json (or --out) after each part;
exits with 1 if a part failed. A part for which there is no time, or a target that was missed, is said, but is no
failure.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_comparison import COMPARED, SCORED, SHORT, comparison, schedule, short_steps

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Seconds: all parts of the default call together; of a training, which are enough there; what loading takes beside
# training at most, and scoring a view; a part's least, and compute-sanitizer's; an end where there is no other.
DEADLINE, ENOUGH, LOADING, SCORING, LEAST, SANITIZING, NO_LIMIT = 570.0, 180.0, 60.0, 0.5, 20.0, 60.0, 1e4
PYTEST = ["-m", "pytest", "-m", "cuda", "--durations=5", "--continue-on-collection-errors", "tests/test_triton.py"]
PYTEST += ["tests/test_triton_network.py"]
TESTS = [*PYTEST, "tests/test_cuda.py", "tests/test_fixed_steps.py"]
# compute-sanitizer checks every access, tens of times slower: without the tests of millions of points.
SANITIZED = [*PYTEST, "-k", "not millions and not more_points and not more_samples"]
SOME = ["collected_along_rays", "weights_and_their", "composites_and", "until_opaque_equal", "gradients_reach_the_rays"]
SOME += ["samples_that_are_nobodys"]
SOME_SANITIZED = [*PYTEST, "-k", " or ".join([*SOME, "(samples_are_kept and not millions)"])]
MINIMUM_RATIO, MOST_WAITS = 8.0, {"full": 2.0, "full, CUDA graphs": 0.2}
LEAST_PSNR, LEGO_VIEWS, MOST_SECONDS, MOST_MB = 36.4, 200, 120.0, 1536.0
# What the parts import beside what torch brings; without lpips its metric is n/a.
PACKAGES = (
    *("torch", "configargparse", "cv2", "imageio", "kornia", "numpy"),
    *("plyfile", "psutil", "pytest", "tensorboard", "tqdm"),
)


def missing_packages() -> list[str]:
    """Those of PACKAGES that this Python lacks."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def call(command: list[str], seconds: float) -> dict:
    """Run a command of this repository in a process group of its own. `holds`: whether it succeeded within `seconds`;
    else `error`. `result`: the last line of its output, if that is JSON. `output`: the end of what it printed."""
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        error = None
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            error = f"took longer than {seconds:.0f} s"
    lines = out.splitlines()
    report: dict = {"holds": not error and process.returncode == 0, "seconds": time.perf_counter() - started}
    if lines and lines[-1].startswith("{"):
        report["result"] = json.loads(lines.pop())
    if not report["holds"]:
        report["error"] = error or f"exit code {process.returncode}"
    # A progress bar is one line that returns to its beginning.
    shown = [line.rsplit("\r", 1)[-1] for line in [*lines, *err.splitlines()]]
    report["output"] = shown[-60:] if not report["holds"] else shown[-25:]
    return report


def guarded(name: str, command: list[str], seconds: float) -> dict:
    """`call`, whatever happens."""
    print(f"gpu-check: {name}: {' '.join(command[1:])}", flush=True)
    try:
        return call(command, seconds)
    except Exception as error:  # the other parts shall run
        return {"holds": False, "error": f"{type(error).__name__}: {error}", "output": []}


def skipped(why: str) -> dict:
    """A part that was not run, which is no failure."""
    return {"holds": True, "skipped": why, "output": []}


def skipped_if_late(report: dict) -> dict:
    """The report of a part that had less time than it may need: if that ran out it counts as skipped, and what it said
    until then is kept."""
    late = "took longer" in report.get("error", "")
    return {**report, **skipped(report["error"]), "output": report["output"]} if late else report


def check(options: argparse.Namespace, write) -> dict:
    """All parts' reports by name; `write(parts)` is called after each."""
    python, ends, parts = sys.executable, time.perf_counter() + DEADLINE, {}
    # The tests come last: their first run compiles some 260 variants of the kernels.
    at_most = {"kernels": 60.0, "step": 120.0, "launches": 90.0, "tests": 360.0}
    commands = {
        "tests": TESTS,
        "kernels": ["-m", "benchmarks.kernels"],
        "step": ["-m", "benchmarks.step", "--device", "cuda", "--repeats", "30", "--rounds", "1"],
        "launches": ["-m", "benchmarks.launches"],
    }
    if not options.full:
        commands["step"] += ["--only", "packed,replayed,twin"]
    train_whole(options, parts, write)
    for name, seconds in at_most.items():
        left = ends - time.perf_counter()
        if options.full:
            parts[name] = guarded(name, [python, *commands[name]], 10 * seconds)
        elif left >= LEAST:
            report = guarded(name, [python, *commands[name]], min(seconds, left))
            parts[name] = skipped_if_late(report) if left < seconds else report
        else:
            parts[name] = skipped("no time left")
        if name == "step" and parts[name]["holds"] and "skipped" not in parts[name]:
            parts[name]["result"] = json.loads((RESULTS / "step_cuda.json").read_text())
        write(parts)
    compare(options, ends, parts, write)
    parts["compute-sanitizer"] = sanitize(options.full, ends - time.perf_counter())
    write(parts)
    return parts


def train(options: argparse.Namespace, name: str, seconds: float, limit: float, more: list[str]) -> dict:
    """A training's part: of at most so many seconds of training, `limit` in all, with more options."""
    command = [sys.executable, "-m", "benchmarks.training", "--data_folder", options.data_folder]
    return guarded(name, [*command, "--seconds", f"{seconds:.0f}", "--", *more], limit)


def train_whole(options: argparse.Namespace, parts: dict, write) -> None:
    """Adds the part of full lego."""
    from benchmarks.training import lego_test_views

    beside = LOADING + SCORING * lego_test_views(options.data_folder)
    limit = NO_LIMIT if options.full else options.train_seconds + beside
    # Without rays that miss the object, as TensoRF's published figures, which the target is of.
    parts["training"] = train(options, "training", options.train_seconds, limit, ["--filter_rays", "1"])
    write(parts)


def compare(options: argparse.Namespace, ends: float, parts: dict, write) -> None:
    """Adds the parts of what is compared beside full lego, until the time `ends`."""
    from benchmarks.training import lego_test_views

    steps, seconds = short_steps(parts["training"], ends - time.perf_counter())
    every = max(lego_test_views(options.data_folder) // SCORED, 1)
    for name, own in COMPARED.items():
        if options.full:
            parts[name] = train(options, name, options.train_seconds, NO_LIMIT, own)
        elif steps:  # scored on fewer views, all on the same
            more = [*schedule(steps), "--test_every", str(every), *own]
            parts[f"short: {name}"] = train(options, f"short: {name}", seconds, 3 * SHORT, more)
        else:
            parts[f"short: {name}"] = skipped("no time left, or no whole training to tell how much it takes")
        write(parts)


def sanitize(everything: bool, left: float) -> dict:
    """compute-sanitizer over all of the kernels' tests, or over some of them in `left` seconds."""
    tool, name = shutil.which("compute-sanitizer"), "compute-sanitizer"
    if tool is None:
        return skipped("not installed")
    if not everything and left < SANITIZING:
        return skipped("no time left")
    # torch's own allocations are large: what lies beyond a tensor would still be inside of one.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--error-exitcode", "1", sys.executable]
    command += SANITIZED if everything else SOME_SANITIZED
    report = guarded(name, command, NO_LIMIT if everything else left)
    if any("Device not supported" in line for line in report["output"]):
        return {**report, **skipped("this machine does not let it see the device")}
    return report if everything else skipped_if_late(report)


def targets(parts: dict) -> list[dict]:
    """What this project promises of a GPU: target, bound, value, and whether it is met, missed or not measured."""
    step, launches, training = (parts.get(name, {}).get("result", {}) for name in ("step", "launches", "training"))
    lego = training.get("scene") == "lego"
    whole = lego and training["complete"]
    why = "not measured (data missing)" if training and not lego else "not measured"
    rows = []

    def add(name: str, bound: float, value: float | None, higher: bool = False, missing: str = "not measured") -> None:
        met = value is not None and (value >= bound if higher else value <= bound)
        verdict = missing if value is None else "met" if met else "missed"
        rows.append({"target": name, "bound": bound, "value": value, "verdict": verdict})

    for field in ("before", "after"):
        ratio = step.get("time_ratio_twin_over_replayed", {}).get(field)
        add(f"dense twin over replayed, time of a step, {field} the mask, at least", MINIMUM_RATIO, ratio, higher=True)
    for name, most in MOST_WAITS.items():
        add(f"waits for the device a step ({name}), at most", most, launches.get(name, {}).get("waits_per_step"))
    views = f" ({training['test_views']} test views)" if whole else ""
    enough = whole and training["test_views"] >= LEGO_VIEWS
    few = f"not measured ({LEGO_VIEWS} test views are wanted)" if whole else why
    psnr = training["psnr"] if enough else None
    add(f"lego, full: PSNR dB{views}, at least", LEAST_PSNR, psnr, higher=True, missing=few)
    # A run that was stopped may have missed its time already.
    timed = whole or (lego and training["train_seconds"] > MOST_SECONDS)
    add(
        "lego, full: training seconds, at most", MOST_SECONDS, training["train_seconds"] if timed else None, missing=why
    )
    add("lego, full: device memory MB, at most", MOST_MB, training["peak_memory_mb"] if whole else None, missing=why)
    sanitizer = parts.get("compute-sanitizer", {"skipped": ""})
    found = None if "skipped" in sanitizer else float(not sanitizer["holds"])
    add("compute-sanitizer: runs with errors, at most", 0.0, found)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", default="data", help="folder that holds nerf_synthetic/lego")
    parser.add_argument("--train_seconds", type=float, help="seconds of a training that are enough (180; --full: all)")
    parser.add_argument("--full", action="store_true", help="everything as a whole; no limit of time")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_check.json")
    options = parser.parse_args(argv)
    if options.train_seconds is None:
        options.train_seconds = NO_LIMIT if options.full else ENOUGH
    if missing := missing_packages():
        print(f"gpu-check: this Python lacks {', '.join(missing)}: pip install -r requirements.txt", file=sys.stderr)
        return 2
    import torch

    from utils.device import device_name
    from utils.run_folder import git_commit

    if not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    facts = {"device": device_name(torch.device("cuda")), "torch": torch.__version__, "commit": git_commit()}

    def write(parts: dict) -> None:
        holds = all(part["holds"] for part in parts.values())
        report = {**facts, "holds": holds, "targets": targets(parts), "comparison": comparison(parts), "parts": parts}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    parts = check(options, write)
    for name, part in parts.items():
        print(f"--- {name}: {part.get('skipped') or ('holds' if part['holds'] else part['error'])}")
        print("\n".join(part["output"]))
    for row in comparison(parts):
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    for row in targets(parts):
        print(f"{row['target']} {row['bound']:g}: {row['value']} - {row['verdict']}")
    failed = [name for name, part in parts.items() if not part["holds"]]
    print(f"gpu-check FAILED: {', '.join(failed)}" if failed else "gpu-check holds", f"({options.out})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
