"""What a machine with a CUDA device must show, in one call under 10 minutes.

    make gpu-check        or, with another Python that has torch:  python -m benchmarks.gpu_check

The tests marked cuda (CUDA against the CPU and against the dense twin), benchmarks/step.py, and as much of a full
lego training (30000 iterations of 4096 rays) as fits, with its PSNR on every 8th test view; without lego under
--data_folder, the same on the demo scene. Writes benchmarks/results/gpu_check.json; exits with 1 if something fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def call(*arguments: str) -> dict:
    """Run a module of this repository; whether it succeeded, and the end of what it printed."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"holds": done.returncode == 0, "output": (done.stdout + done.stderr).splitlines()[-40:]}


def training(data_folder: str, seconds: float) -> dict:
    """Full lego settings for `seconds` of training, on the demo scene where lego is not there."""
    import train
    from opt import parse_options

    lego = Path(data_folder) / "nerf_synthetic" / "lego"
    n_test = len(list((lego / "test").glob("r_*.png")))
    with tempfile.TemporaryDirectory() as folder:
        if n_test:
            # Every 8th test image may be all that was brought along.
            argv = ["--config", "configs/lego.txt", "--data_folder", data_folder, "--skip_missing_frames"]
            argv += ["--test_every", str(max(n_test // 25, 1))]
        else:
            argv = ["--config", "configs/syn.txt", "--nerf_dataset", "demo", "--demo_resolution", "400"]
            argv += ["--data_folder", folder]
        argv += ["--save_dir", folder, "--device", "cuda", "--vis_every", "1000000", "--progress_refresh_rate", "100"]
        results = train.run(parse_options(argv), stop_after=seconds)
    keys = "dataset scene n_iters batch_size psnr ssim train_seconds setup_seconds ms_per_step peak_memory_mb "
    keys += "static_memory_mb step_memory_mb live_samples_per_step colour_samples_per_step kernels"
    return {key: results[key] for key in keys.split()}


def main() -> int:
    import torch

    from utils.device import device_name
    from utils.run_folder import git_commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", default="data", help="folder that holds nerf_synthetic/lego")
    parser.add_argument("--train_seconds", type=float, default=330.0, help="seconds of training that are enough")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    report = {"device": device_name(torch.device("cuda")), "torch": torch.__version__, "commit": git_commit()}
    report["tests"] = call("pytest", "-m", "cuda", "-q")
    report["step"] = call("benchmarks.step", "--device", "cuda", "--repeats", "30", "--rounds", "1")
    report["training"] = training(options.data_folder, options.train_seconds)
    report["holds"] = report["tests"]["holds"] and report["step"]["holds"]
    path = ROOT / "benchmarks" / "results" / "gpu_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for part in ("tests", "step"):
        print("\n".join(report[part]["output"]))
    print(report["training"])
    print("gpu-check holds" if report["holds"] else "gpu-check FAILED")
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
