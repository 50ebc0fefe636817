"""What gpu_check.py compares beside full lego: its steps one by one, not as CUDA graphs; a network in bfloat16; half
the rays, drawn by `full` and by `expansive`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPARED = {
    "full, 4096 rays": [],
    "full, 4096 rays, step by step": ["--cuda_graphs", "0"],
    "full, 4096 rays, bf16": ["--mlp_dtype", "bfloat16"],
    "full, 2048 rays": ["--batch_size", "2048"],
    "expansive, es_ratio 0.5": ["--strategy", "expansive", "--es_ratio", "0.5"],
}
KEYS = ("n_iters", "rays_per_step", "live_samples_per_step", "step_memory_mb", "peak_memory_mb", "train_seconds")
KEYS += ("psnr", "test_views")
# Seconds that a shortened training may take at most, all in all; views that it is scored on, or a few more.
SHORT, SCORED = 75.0, 25


def short_steps(training: dict, left: float) -> tuple[int, float]:
    """(steps, seconds) of each shortened training, so that all of COMPARED fit into `left` seconds.

    training: gpu_check's part of the whole training, which tells how long a step, loading and scoring take. steps: a
    multiple of 1000, 0 where time does not suffice; seconds: of training, after which it is stopped.
    """
    result = training.get("result", {})
    if not result.get("n_iters"):
        return 0, 0.0
    beside = training["seconds"] - result["train_seconds"]
    if result.get("test_views", 0) > SCORED:
        beside -= result["scoring_seconds"] * (1 - SCORED / result["test_views"])
    seconds = min(left / len(COMPARED), SHORT) - beside
    # Steps before the mask are the slowest, and a shortened schedule has as many of them in proportion; a margin stays.
    steps = int(0.6 * seconds * result["n_iters"] / result["train_seconds"])
    return max(min(steps, 30_000) // 1000 * 1000, 0), seconds


def schedule(steps: int) -> list[str]:
    """Options that shorten full lego's schedule to so many steps."""
    from opt import parse_options

    whole = parse_options(["--config", str(ROOT / "configs" / "lego.txt")])
    argv = ["--n_iters", str(steps)]
    for name in ("upsamp_list", "update_AlphaMask_list"):
        argv += [f"--{name}", f"[{','.join(str(at * steps // whole.n_iters) for at in getattr(whole, name))}]"]
    return argv


def comparison(parts: dict) -> list[dict]:
    """What each training needed and reached, those by the whole schedule first; compare within a schedule."""
    rows = []
    for kind in ("whole", "short"):
        for name in COMPARED:
            part = name if kind == "whole" else f"short: {name}"
            if result := parts.get(part, {}).get("result"):
                rows.append({"training": name, "schedule": kind, **{key: result.get(key) for key in KEYS}})
    return rows
