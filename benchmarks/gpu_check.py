"""What a machine with a CUDA device must show: the same numbers as the dense twin, on the same GPU, and how fast.

    make gpu-check        or, with another Python that has torch:  python -m benchmarks.gpu_check

Parity of renderings and gradients on random fields, a short training on the demo scene, a resumed one, and
benchmarks/step.py. Writes benchmarks/results/gpu_check.json and exits with 1 if something does not hold.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Largest error allowed, relative to the array's largest magnitude, float32 without TF32.
TOLERANCE = 2e-5


def largest_error(a, b) -> float:
    """|a - b| relative to the largest magnitude of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def parity(device) -> list[dict]:
    """Packed path and dense twin on random fields: errors of colours, depth and every gradient."""
    import torch

    from components.types import Rays
    from tests.helpers import random_field, random_rays
    from tests.reference import dense_render

    rows = []
    for seed in range(3):
        for model in ("TensorVMSplit", "TensorCP"):
            for ndc in (False, True):
                field = random_field(seed, model, ndc).to(device)
                field.select_lookups()
                rays = random_rays(seed, 2000, ndc)
                rays = Rays(rays.origins.to(device), rays.directions.to(device))
                jitter = field.draw_jitter(2000, 61, torch.Generator(device).manual_seed(seed))
                outputs, gradients = [], []
                for render in (field.render, lambda *a, f=field: dense_render(f, *a)):
                    field.zero_grad()
                    out = render(rays, 1.0, jitter, 61)
                    (out.rgb * torch.linspace(-1, 1, 6000, device=device).view(2000, 3)).sum().backward()
                    outputs.append(out)
                    gradients.append({n: p.grad.clone() for n, p in field.named_parameters()})
                errors = {"rgb": largest_error(outputs[0].rgb, outputs[1].rgb)}
                errors["depth"] = largest_error(outputs[0].depth, outputs[1].depth)
                errors["gradient"] = max(largest_error(gradients[0][n], g) for n, g in gradients[1].items())
                same = (outputs[0].n_live, outputs[0].n_colour) == (outputs[1].n_density, outputs[1].n_colour)
                case = {"seed": seed, "model": model, "ndc": ndc, "same_samples": same, **errors}
                rows.append({**case, "holds": same and max(errors.values()) < TOLERANCE})
    return rows


def short_training(device_name: str) -> dict:
    """The demo at 100x100 for 400 steps; half of it again from a checkpoint."""
    import train
    from opt import parse_options

    with tempfile.TemporaryDirectory() as folder:
        argv = ["--demo", "--demo_resolution", "100", "--n_iters", "400", "--data_folder", folder, "--save_dir", folder]
        argv += ["--device", device_name, "--test_every", "5"]
        results = train.run(parse_options(argv))
    keys = "psnr train_seconds ms_per_step peak_memory_mb static_memory_mb step_memory_mb device torch commit kernels"
    return {**{key: results[key] for key in keys.split()}, "holds": results["psnr"] > 24.0}


def step_times(device_name: str) -> dict:
    """benchmarks/step.py on the device."""
    command = [sys.executable, "-m", "benchmarks.step", "--device", device_name, "--repeats", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"holds": False, "error": done.stderr[-2000:]}
    report = json.loads((ROOT / "benchmarks" / "results" / "step_cuda.json").read_text())
    ratios = report["time_ratio_twin_over_packed"]
    return {"output": done.stdout.splitlines(), "ratios": ratios, "holds": min(ratios.values()) > 1.0}


def main() -> int:
    import torch

    from utils.device import device_name
    from utils.run_folder import git_commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the check itself where there is no CUDA")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = {"device": device_name(device), "torch": torch.__version__, "commit": git_commit()}
    report["parity"] = parity(device)
    report["training"] = short_training(options.device)
    report["step"] = step_times(options.device) if device.type == "cuda" else {"holds": True, "output": []}
    report["holds"] = all(row["holds"] for row in report["parity"]) and all(
        report[part]["holds"] for part in ("training", "step")
    )
    if device.type == "cuda":
        path = ROOT / "benchmarks" / "results" / "gpu_check.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["parity"]:
        print(row)
    print(report["training"])
    print("\n".join(report["step"]["output"]) or report["step"])
    print("gpu-check holds" if report["holds"] else "gpu-check FAILED")
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
