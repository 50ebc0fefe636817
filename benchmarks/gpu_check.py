"""What a machine with a CUDA device must show, in one call under 10 minutes.

    make gpu-check        or, with another Python that has torch:  python -m benchmarks.gpu_check

The tests marked cuda (every kernel and whole renderings against their twins), benchmarks/kernels.py, step.py and
launches.py, and full lego (30000 steps of 4096 rays; as much of it as fits, on the demo scene without lego under
--data_folder). --full adds the same with half the rays and compute-sanitizer over the kernels' tests, which takes
longer. Each part runs in a process of its own, and its failure leaves the others alone. Writes
benchmarks/results/gpu_check.json (or --out) after each part; exits with 1 if a part failed. A target that was missed
is said, but is no failure.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

# Seconds: all parts of the default call together, and what loading and scoring take beside training.
DEADLINE, BESIDE_TRAINING = 570.0, 60.0
PYTEST = ["-m", "pytest", "-m", "cuda", "--durations=5", "--continue-on-collection-errors", "tests/test_triton.py"]
TESTS = [*PYTEST, "tests/test_cuda.py"]
# compute-sanitizer checks every access, tens of times slower: without the tests of millions of points.
SANITIZED = [*PYTEST, "-k", "not millions and not more_points and not more_samples"]
MINIMUM_RATIO, MOST_WAITS = 8.0, 2.0
LEAST_PSNR, MOST_SECONDS, MOST_MB = 36.4, 120.0, 1536.0


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


def check(options: argparse.Namespace, write) -> dict:
    """All parts' reports by name; `write(parts)` is called after each."""
    python, ends, parts = sys.executable, time.perf_counter() + DEADLINE, {}
    at_most = {"tests": 240.0, "kernels": 60.0, "step": 90.0, "launches": 90.0}
    commands = {
        "tests": TESTS,
        "kernels": ["-m", "benchmarks.kernels"],
        "step": ["-m", "benchmarks.step", "--device", "cuda", "--repeats", "30", "--rounds", "1"],
        "launches": ["-m", "benchmarks.launches"],
    }
    for name, seconds in at_most.items():
        parts[name] = guarded(name, [python, *commands[name]], 10 * seconds if options.full else seconds)
        if name == "step" and parts[name]["holds"]:
            parts[name]["result"] = json.loads((RESULTS / "step_cuda.json").read_text())
        write(parts)
    train = [python, "-m", "benchmarks.training", "--data_folder", options.data_folder, "--seconds"]
    left = 1e4 if options.full else max(ends - time.perf_counter(), BESIDE_TRAINING + 10)
    enough = min(options.train_seconds, left - BESIDE_TRAINING)
    parts["training"] = guarded("training", [*train, f"{enough:.0f}"], left)
    write(parts)
    if options.full:
        half = {"full, 2048 rays": ["--batch_size", "2048"]}
        half["expansive, es_ratio 0.5"] = ["--strategy", "expansive", "--es_ratio", "0.5"]
        for name, more in half.items():
            parts[name] = guarded(name, [*train, f"{options.train_seconds:.0f}", "--", *more], 1e4)
            write(parts)
        parts["compute-sanitizer"] = {"holds": True, "output": ["not installed"]}
        if tool := shutil.which("compute-sanitizer"):
            command = [tool, "--error-exitcode", "1", python, *SANITIZED]
            parts["compute-sanitizer"] = guarded("compute-sanitizer", command, 3600.0)
        write(parts)
    return parts


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
        ratio = step.get("time_ratio_twin_over_packed", {}).get(field)
        add(f"dense twin over packed, time of a step, {field} the mask, at least", MINIMUM_RATIO, ratio, higher=True)
    add("waits for the device a step (full), at most", MOST_WAITS, launches.get("full", {}).get("waits_per_step"))
    add("lego, full: PSNR dB, at least", LEAST_PSNR, training["psnr"] if whole else None, higher=True, missing=why)
    # A run that was stopped may have missed its time already.
    timed = whole or (lego and training["train_seconds"] > MOST_SECONDS)
    add(
        "lego, full: training seconds, at most", MOST_SECONDS, training["train_seconds"] if timed else None, missing=why
    )
    add("lego, full: device memory MB, at most", MOST_MB, training["peak_memory_mb"] if whole else None, missing=why)
    return rows


def main(argv: list[str] | None = None) -> int:
    import torch

    from utils.device import device_name
    from utils.run_folder import git_commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", default="data", help="folder that holds nerf_synthetic/lego")
    parser.add_argument("--train_seconds", type=float, default=240.0, help="seconds of a training that are enough")
    parser.add_argument("--full", action="store_true", help="half the rays and compute-sanitizer too; no limit of time")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_check.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    facts = {"device": device_name(torch.device("cuda")), "torch": torch.__version__, "commit": git_commit()}

    def write(parts: dict) -> None:
        holds = all(part["holds"] for part in parts.values())
        report = {**facts, "holds": holds, "targets": targets(parts), "parts": parts}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    parts = check(options, write)
    for name, part in parts.items():
        print(f"--- {name}: {'holds' if part['holds'] else part['error']}")
        print("\n".join(part["output"]))
    for row in targets(parts):
        print(f"{row['target']} {row['bound']:g}: {row['value']} - {row['verdict']}")
    failed = [name for name, part in parts.items() if not part["holds"]]
    print(f"gpu-check FAILED: {', '.join(failed)}" if failed else "gpu-check holds", f"({options.out})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
