"""What each sampler costs: building it, a draw, an update, memory; on a scene's full-size training images.

    python -m benchmarks.samplers --data_folder data        # NeRF-synthetic lego, 100 x 800 x 800 pixels

Each sampler runs in a fresh process. Writes benchmarks/results/samplers_{device}.json. Options it does not know go to
the run's options (for example --nerf_scene, --batch_size, --device).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DRAWS, UPDATES = 300, 50


def measure(strategy: str, arguments: list[str]) -> dict:
    """One sampler, in this process: seconds to build, memory it keeps (MB), median ms of a draw and an update."""
    import torch

    from components.pixel_sets import PixelSet
    from opt import parse_options
    from samplers import build_sampler
    from train import choose_device, load_split
    from utils.device import device_name
    from utils.memory import MemoryMeter
    from utils.run_folder import git_commit
    from utils.seeds import make_generator

    options = parse_options(["--nerf_dataset", "syn", "--nerf_scene", "lego", "--strategy", strategy, *arguments])
    device = choose_device(options.device)
    scene = load_split(options, "train").to(device)
    memory = MemoryMeter(device)
    memory.start()
    clock = time.perf_counter()
    sampler = build_sampler(
        strategy, scene, PixelSet(scene.n_pixels), options, make_generator(options.seed, "sampler", device)
    )
    build_seconds, peak_mb = time.perf_counter() - clock, memory.peak_mb()
    memory.begin_segment(0.0)  # gives back what was freed
    kept_mb = memory.allocated_mb()
    draw_ms, update_ms = [], []
    for number in range(DRAWS):
        clock = time.perf_counter()
        pixels = sampler.sample(number)
        _wait(device)
        draw_ms.append(1000 * (time.perf_counter() - clock))
        if number >= DRAWS - UPDATES:
            error = torch.rand(len(pixels), 3, device=device)
            if pixels.xy.requires_grad:
                pixels.xy.grad = torch.randn_like(pixels.xy) * 1e-6
            clock = time.perf_counter()
            weight = sampler.weigh(pixels, error, number)
            sampler.update(pixels, weight * error.square().mean(-1), number)
            _wait(device)
            update_ms.append(1000 * (time.perf_counter() - clock))
    return {
        "strategy": strategy,
        "pixels": scene.n_pixels,
        "rays": len(pixels),
        "build_seconds": build_seconds,
        "kept_mb": kept_mb,
        "peak_mb": peak_mb,
        "draw_ms": statistics.median(draw_ms),
        "weigh_and_update_ms": statistics.median(update_ms),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": git_commit(),
    }


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    from benchmarks.script import result_of
    from samplers import SAMPLERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=None, help="measure one strategy, in this process")
    own, rest = parser.parse_known_args()
    if own.only:
        print(json.dumps(measure(own.only, rest)))
        return
    results = []
    for strategy in SAMPLERS:
        r = result_of([str(Path(__file__).resolve()), "--only", strategy, *rest], strategy)
        results.append(r)
        print(
            f"{strategy}: built in {r['build_seconds']:.1f} s, keeps {r['kept_mb']:.0f} MB, draws {r['rays']} of "
            f"{r['pixels']} pixels in {r['draw_ms']:.2f} ms, weighs and updates in {r['weigh_and_update_ms']:.2f} ms"
        )
    facts = {key: results[0][key] for key in ("device", "torch", "commit", "pixels")}
    kind = "cpu" if "CPU" in facts["device"] else "cuda"
    path = ROOT / "benchmarks" / "results" / f"samplers_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "samplers": results}, indent=1) + "\n")


if __name__ == "__main__":
    from benchmarks.script import exit_code

    sys.exit(exit_code(main))
