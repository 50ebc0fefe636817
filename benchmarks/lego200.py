"""The short protocol "lego200": lego at 200x200, 1500 steps, 25 test views; minutes on a CPU.

    python -m benchmarks.lego200 --data_folder data --seeds 3

Writes benchmarks/results/lego200_{strategy}_{device}.json from the runs' results.json files. Options it does not
know go to the run (for example --strategy, --lpips_weights, --device).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Test PSNR of the reference implementation under the same protocol, dB.
REFERENCE = {"full": [29.45, 29.60, 29.60], "egra": [29.49], "expansive": [30.63, 30.48], "soft": [30.34]}


def main() -> None:
    import train
    from opt import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save_dir", default=None, help="where to keep the runs; default: a temporary folder")
    own, rest = parser.parse_known_args()
    save_dir = own.save_dir or tempfile.mkdtemp(prefix="lego200_")
    runs = []
    for seed in range(own.seeds):
        argv = ["--config", "configs/lego200.txt", "--save_dir", save_dir, "--seed", str(seed), *rest]
        runs.append(train.run(parse_options(argv)))
    psnr = [run["psnr"] for run in runs]
    keys = "seed psnr ssim lpips_alex train_seconds setup_seconds ms_per_step rays_per_step live_samples_per_step "
    keys += "colour_samples_per_step peak_memory_mb static_memory_mb step_memory_mb kernels"
    report = {
        "protocol": "lego200",
        "strategy": runs[0]["strategy"],
        "psnr_mean": statistics.mean(psnr),
        "psnr_std": statistics.stdev(psnr) if len(psnr) > 1 else None,
        "psnr_reference": REFERENCE[runs[0]["strategy"]],
        **{key: runs[0][key] for key in ("n_iters", "batch_size", "device", "torch", "commit")},
        "runs": [{key: run[key] for key in keys.split()} for run in runs],
    }
    kind = "cpu" if "CPU" in report["device"] else "cuda"
    path = ROOT / "benchmarks" / "results" / f"lego200_{report['strategy']}_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    seconds = statistics.mean(run["train_seconds"] for run in runs)
    print(f"lego200 {report['strategy']}: {report['psnr_mean']:.2f} dB over {len(runs)} seeds, {seconds:.0f} s each")


if __name__ == "__main__":
    main()
