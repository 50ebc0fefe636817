"""The short protocol "lego200": lego at 200x200, 1500 steps, 25 test views; minutes a run on a CPU.

    python -m benchmarks.lego200 --data_folder data --seeds 3
    python -m benchmarks.lego200 --data_folder data --strategies full,expansive,expansive:es_ratio=0.5 --save_dir log200

Writes benchmarks/results/lego200_{entry}_{device}.json for each entry of --strategies from the runs' results.json
files; with --save_dir, runs that are finished there are not repeated. Options it does not know go to the runs (for
example --lpips_weights, --device). Every run has a process of its own, so that its memory is its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Test PSNR of the reference implementation under the same protocol, dB, by the tag of what it does.
REFERENCE = {
    "full": [29.45, 29.60, 29.60],
    "egra": [29.49],
    "expansive": [30.63, 30.48],
    "soft-soft_mining_gradviewdir": [30.34],
}
KEYS = "seed psnr ssim lpips_alex train_seconds setup_seconds ms_per_step rays_per_step live_samples_per_step "
KEYS += "colour_samples_per_step stages peak_memory_mb static_memory_mb step_memory_mb kernels device torch commit"


def main() -> None:
    from benchmarks.script import positive, require_own_seeds
    from opt import parse_options
    from run import check_ready, train_isolated
    from utils.run_folder import read_json, run_folder
    from utils.variants import parse_variants

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--strategies", default="full")
    parser.add_argument("--save_dir", default=None, help="where to keep the runs; default: a temporary folder")
    parser.add_argument("--prefix", default="lego200", help="of the JSON files' names; another one keeps these")
    own, rest = parser.parse_known_args()
    require_own_seeds(parser, own.seeds, rest)
    save_dir = own.save_dir or tempfile.mkdtemp(prefix="lego200_")
    for variant in parse_variants(own.strategies):
        runs = []
        for seed in range(own.seeds):
            argv = ["--config", "configs/lego200.txt", "--save_dir", save_dir, "--seed", str(seed), *rest]
            o = parse_options([*argv, *variant.arguments, "--tag", variant.tag])
            folder = run_folder(o.save_dir, o.up_folder_name, o.nerf_dataset, o.nerf_scene, o.tag, o.seed)
            if not (folder / "results.json").exists():
                check_ready(o)
                train_isolated(o)
            runs.append(read_json(folder / "results.json"))
        write_report(variant.tag, runs, own.prefix)


def write_report(tag: str, runs: list[dict], prefix: str = "lego200") -> None:
    """The runs of one entry as JSON, and a line about them."""
    psnr = [run["psnr"] for run in runs]
    report = {
        "protocol": "lego200",
        "tag": tag,
        "strategy": runs[0]["strategy"],
        "psnr_mean": statistics.mean(psnr),
        "psnr_std": statistics.stdev(psnr) if len(psnr) > 1 else None,
        "psnr_reference": REFERENCE.get(tag),
        **{key: runs[0][key] for key in ("n_iters", "batch_size")},
        **{key: ", ".join(sorted({run[key] for run in runs})) for key in ("device", "torch", "commit")},
        "runs": [{key: run.get(key) for key in KEYS.split()} for run in runs],
    }
    kind = "cpu" if "CPU" in report["device"] else "cuda"
    path = ROOT / "benchmarks" / "results" / f"{prefix}_{tag}_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    seconds = statistics.mean(run["train_seconds"] for run in runs)
    print(f"lego200 {tag}: {report['psnr_mean']:.2f} dB over {len(runs)} seeds, {seconds:.0f} s each")


if __name__ == "__main__":
    from benchmarks.script import exit_code

    sys.exit(exit_code(main))
