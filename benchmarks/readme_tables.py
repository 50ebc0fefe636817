"""Writes the README's tables of our own figures from the JSON in benchmarks/results.

    python -m benchmarks.readme_tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def mean(runs: list[dict], key: str, digits: int) -> str:
    """The mean of a figure over runs, n/a if one of them lacks it."""
    values = [run[key] for run in runs]
    return "n/a" if None in values else f"{sum(values) / len(values):.{digits}f}"


def lego200() -> str:
    """lego200: PSNR a seed, time and memory, beside the reference."""
    lines = [
        "| strategy | test PSNR, dB (mean +- std, seeds) | reference, dB | SSIM | LPIPS alex | train s "
        "| step memory MB | device, torch, commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("lego200_*.json")):
        r = json.loads(path.read_text())
        runs = r["runs"]
        seeds = ", ".join(f"{run['psnr']:.2f}" for run in runs)
        spread = "" if r["psnr_std"] is None else f" +- {r['psnr_std']:.2f}"
        psnr = f"{r['psnr_mean']:.2f}{spread} ({seeds})"
        reference = ", ".join(f"{p:.2f}" for p in r["psnr_reference"])
        memory = max(run["step_memory_mb"] for run in runs)
        where = f"{r['device']}, {r['torch']}, {r['commit']}"
        lines.append(
            f"| {r['strategy']} | {psnr} | {reference} | {mean(runs, 'ssim', 4)} | {mean(runs, 'lpips_alex', 4)} "
            f"| {mean(runs, 'train_seconds', 0)} | {memory:.0f} | {where} |"
        )
    return "\n".join(lines)


def step() -> str:
    """One training step, packed path beside the dense twin."""
    lines = [
        "| batch 4096 | path | ms a step | forward | backward | step memory MB | density, colour lookups a ray |",
        "|---|---|---|---|---|---|---|",
    ]
    r = json.loads((RESULTS / "step_cpu.json").read_text())
    for row in r["results"]:
        ms = row["ms"]
        name = "dense twin" if row["variant"] == "twin" else "packed"
        lines.append(
            f"| {row['field']} the mask | {name} | {ms['step']:.0f} | {ms['forward']:.0f} | {ms['backward']:.0f} "
            f"| {row['step_memory_mb']:.0f} | {row['live_per_ray']:.1f}, {row['colour_per_ray']:.1f} |"
        )
    time, memory = r["time_ratio_twin_over_packed"], r["memory_ratio_twin_over_packed"]
    lines += [
        "",
        f"Twin over packed: time {time['before']:.2f} before and {time['after']:.2f} after the mask, step memory "
        f"{memory['before']:.1f} and {memory['after']:.1f} ({r['device']}, torch {r['torch']}, commit {r['commit']}).",
    ]
    return "\n".join(lines)


TABLES = {"lego200": lego200, "step": step}


def with_tables(text: str) -> str:
    """The README's text with its tables made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda m, make=make: f"{m[1]}\n{make()}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
