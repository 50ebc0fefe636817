"""Writes the README's tables of our own figures from the JSON in benchmarks/results.

    python -m benchmarks.readme_tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced.
"""

import argparse
import json
import re
import statistics
from functools import partial
from pathlib import Path

from benchmarks.scaling import STRATEGIES, VARIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


MAIN = ("full", "egra", "soft-soft_mining_gradviewdir", "soft", "expansive")
FEWER_RAYS = ("full", "expansive", "expansive-es_ratio0.5", "full-batch_size512")
ASKED_FIRST = (
    "full",
    "expansive",
    "expansive-es_normalize",
    "full-L1_weight_inital2e-5-L1_weight_rest1e-5",
    "full-batch_size1535",
)


def mean(runs: list[dict], *path: str, digits: int = 0) -> str:
    """The mean of a figure over runs, n/a if one of them lacks it."""
    values = []
    for run in runs:
        value = run
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return "n/a" if None in values else f"{statistics.fmean(values):.{digits}f}"


def lego200_reports(tags: tuple[str, ...]) -> list[dict]:
    """The committed reports of entries, those that are there."""
    paths = [RESULTS / f"lego200_{tag}_cpu.json" for tag in tags]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def psnr_cells(report: dict, base: dict) -> list[str]:
    """PSNR over seeds, and its paired difference to the baseline's."""
    runs = report["runs"]
    spread = "" if report["psnr_std"] is None else f" +- {report['psnr_std']:.2f}"
    seeds = ", ".join(f"{run['psnr']:.2f}" for run in runs)
    other = {run["seed"]: run["psnr"] for run in base["runs"]}
    pairs = [run["psnr"] - other[run["seed"]] for run in runs if run["seed"] in other]
    difference = "n/a" if not pairs else f"{statistics.fmean(pairs):+.2f}"
    if len(pairs) > 1:
        difference += f" +- {statistics.stdev(pairs):.2f}"
    return [f"{report['psnr_mean']:.2f}{spread} ({seeds})", "" if report is base else difference]


def rows_of(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def table(head: list[str], rows: list[list[str]], reports: list[dict]) -> str:
    """A markdown table and where its figures come from."""
    facts = {}
    for key in ("device", "torch", "commit"):
        facts[key] = ", ".join(dict.fromkeys(run[key] for report in reports for run in report.get("runs", [report])))
    source = f"({facts['device']}, torch {facts['torch']}, commit {facts['commit']})"
    return f"{rows_of(head, rows)}\n\n{source}"


def lego200() -> str:
    """The four strategies on lego200, beside the reference."""
    reports = lego200_reports(MAIN)
    head = ["strategy", "rays", "test PSNR, dB: mean +- std (seeds)", "to full", "reference, dB", "SSIM", "LPIPS alex"]
    head += ["train s", "sampler ms", "step MB"]
    rows = []
    for r in reports:
        reference = ", ".join(f"{p:.2f}" for p in r["psnr_reference"] or []) or "-"
        rows.append(
            [
                r["tag"].replace("-soft_mining_gradviewdir", " `--soft_mining_grad viewdir`"),
                mean(r["runs"], "rays_per_step"),
                *psnr_cells(r, reports[0]),
                reference,
                mean(r["runs"], "ssim", digits=4),
                mean(r["runs"], "lpips_alex", digits=4),
                mean(r["runs"], "train_seconds"),
                mean(r["runs"], "ms_per_step", "sampler", digits=1),
                mean(r["runs"], "step_memory_mb"),
            ]
        )
    return table(head, rows, reports)


def exact_step_memory(tag: str, stage: str) -> str:
    """An entry's step memory in a stage by torch's own allocations (benchmarks/step_memory.py), mean over seeds, MB."""
    runs = json.loads((RESULTS / "step_memory.json").read_text())["runs"]
    own = [run[f"{stage}_mb"] for run in runs if run["run"].startswith(f"{tag}/")]
    return f"{statistics.fmean(own):.1f}" if own else "n/a"


def fewer_rays() -> str:
    """es_ratio 0.5 on lego200 and its control."""
    reports = lego200_reports(FEWER_RAYS)
    head = ["run", "rays", "test PSNR, dB", "to full", "density lookups a step: before mask", "after"]
    head += ["step MB, tensors: before mask", "after", "resident: before mask", "after", "train s"]
    rows = []
    for r in reports:
        runs = r["runs"]
        cells = [mean(runs, "stages", s, "live_samples") for s in ("before_mask", "after_mask")]
        cells += [exact_step_memory(r["tag"], s) for s in ("before_mask", "after_mask")]
        cells += [mean(runs, "stages", s, "step_memory_mb") for s in ("before_mask", "after_mask")]
        rows.append([r["tag"], mean(runs, "rays_per_step"), *psnr_cells(r, reports[0]), *cells])
        rows[-1].append(mean(runs, "train_seconds"))
    return table(head, rows, reports)


def asked_first() -> str:
    """What a sceptic asks first, on lego200."""
    reports = lego200_reports(ASKED_FIRST)
    head = ["run", "rays", "test PSNR, dB", "to full", "colour lookups a step", "train s"]
    rows = [
        [
            r["tag"],
            mean(r["runs"], "rays_per_step"),
            *psnr_cells(r, reports[0]),
            mean(r["runs"], "colour_samples_per_step"),
            mean(r["runs"], "train_seconds"),
        ]
        for r in reports
    ]
    return table(head, rows, reports)


def samplers() -> str:
    """What each sampler costs on full-size lego."""
    r = json.loads((RESULTS / "samplers_cpu.json").read_text())
    rows = [
        [
            s["strategy"],
            f"{s['build_seconds']:.1f}",
            f"{s['draw_ms']:.2f}",
            f"{s['weigh_and_update_ms']:.2f}",
            f"{s['kept_mb']:.0f}",
        ]
        for s in r["samplers"]
    ]
    head = ["sampler", "built, s", "a draw, ms", "weigh and update, ms", "resident MB after building"]
    return table(head, rows, [r])


def speed() -> str:
    """lego200 as a whole, `full` by the packed path, with a bfloat16 network, and by the dense twin."""
    names = {"full": "packed", "full-mlp_dtypebfloat16": "packed, `--mlp_dtype bfloat16`", "dense-twin": "dense twin"}
    paths = {name: RESULTS / f"speed_lego200_{tag}_cpu.json" for tag, name in names.items()}
    reports = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    head = [
        "lego200, `full`",
        "training, s (seeds)",
        "test PSNR, dB (seeds)",
        "ms a step: before mask",
        "growing",
        "after",
    ]
    head += ["step MB", "peak MB"]
    rows = []
    for name, report in reports.items():
        runs = report["runs"]
        cells = [f"{statistics.fmean(r['train_seconds'] for r in runs):.0f} ({figures(runs, 'train_seconds', 0)})"]
        cells += [f"{report['psnr_mean']:.2f} ({figures(runs, 'psnr', 2)})"]
        cells += [mean(runs, "stages", stage, "ms_per_step") for stage in ("before_mask", "growing", "after_mask")]
        rows.append([name, *cells, mean(runs, "step_memory_mb"), mean(runs, "peak_memory_mb")])
    return table(head, rows, list(reports.values()))


def figures(runs: list[dict], key: str, digits: int) -> str:
    """A figure, run by run."""
    return ", ".join(f"{run[key]:.{digits}f}" for run in runs)


STEP_VARIANTS = {
    "packed": "packed",
    "bf16": "packed, `--mlp_dtype bfloat16`",
    "torch": "packed, no compiler: torch's operations",
    "definition": "the same, lookups by grid_sample",
    "twin": "dense twin",
}


def step() -> str:
    """One training step, packed path beside its variants and the dense twin; and with each sampler."""
    r = json.loads((RESULTS / "step_cpu.json").read_text())
    packed = {row["field"]: row for row in r["results"] if row["variant"] == "packed"}
    rows = []
    for row in r["results"]:
        ms, base = row["ms"], packed[row["field"]]
        rows.append(
            [
                f"{row['field']} the mask",
                STEP_VARIANTS[row["variant"]],
                *(f"{ms[phase]:.0f}" for phase in ("step", "forward", "backward", "optimizer")),
                f"{ms['step'] / base['ms']['step']:.2f}",
                f"{row['step_memory_mb']:.0f}",
                f"{row['step_memory_mb'] / base['step_memory_mb']:.2f}",
                f"{row['live_per_ray']:.1f}, {row['colour_per_ray']:.1f}",
            ]
        )
    head = [f"batch {r['batch']}", "path", "ms a step", "forward", "backward", "optimizer", "time to packed"]
    tables = [rows_of([*head, "step memory MB", "memory to packed", "density, colour lookups a ray"], rows)]
    if r.get("samplers"):
        phases = ("step", "sampler", "forward", "backward", "optimizer")
        rows = [[s["strategy"], *(f"{s['ms'][phase]:.1f}" for phase in phases)] for s in r["samplers"]]
        tables.append(rows_of(["a trainer's step after the mask", "ms", *phases[1:]], rows))
    time, memory = r["time_ratio_twin_over_packed"], r["memory_ratio_twin_over_packed"]
    tables.append(
        f"Twin over packed: time {time['before']:.2f} before and {time['after']:.2f} after the mask, step memory "
        f"{memory['before']:.1f} and {memory['after']:.1f} ({r['device']}, torch {r['torch']}, commit {r['commit']})."
    )
    return "\n\n".join(tables)


def scaling(kind: str = "cpu") -> str:
    """Time and memory over batch, grid, number of images and size of a test view; three tables."""
    report = json.loads((RESULTS / f"scaling_{kind}.json").read_text())
    found = {}
    for p in report["points"]:
        found.setdefault((p["axis"], p[VARIES[p["axis"]]]), {})[p["path"], p["field"], p["strategy"]] = p
    paths = [(path, field, "full") for path in ("packed", "twin") for field in ("before", "after")]
    steps, images, views = [], [], []
    for (axis, number), by in found.items():
        if axis in ("batch", "grid"):
            name = f"{number} rays" if axis == "batch" else f"grid {number}^3"
            cells = [f"{by[key]['ms']['step']:.0f}" if key in by else "" for key in paths]
            cells += [f"{by[key]['step_tensors_mb']:.0f}" if key in by else "" for key in paths]
            per_ray = [f"{by[key]['live_per_ray']:.0f}, {by[key]['colour_per_ray']:.0f}" for key in paths[:2]]
            steps.append([name, *cells, f"{by[paths[1]]['static_mb']:.0f}", *per_ray])
        elif axis == "images":
            own = [by["packed", "after", strategy] for strategy in STRATEGIES]
            cells = [f"{p['ms']['step']:.0f} ({p['ms']['sampler']:.1f})" for p in own]
            images.append([str(number), *cells, *(f"{p['static_mb']:.0f}" for p in own)])
        else:
            p = by["packed", "after", "full"]
            views.append([f"{number} x {number}", f"{p['ms']['step']:.0f}", f"{p['step_memory_mb']:.0f}"])
    head = ["", "ms a step: before mask", "after", "dense twin: before", "after", "step MB, tensors: before", "after"]
    head += ["dense twin: before", "after", "stays, MB", "density, colour lookups a ray: before", "after"]
    image_head = ["images", *(f"{s}: ms a step (sampler)" for s in STRATEGIES)]
    image_head += [f"{s}: stays, MB" for s in STRATEGIES]
    view_head = ["test view", "ms", "memory growth, MB"]
    return "\n\n".join([rows_of(head, steps), rows_of(image_head, images), table(view_head, views, [report])])


TABLES = {"lego200": lego200, "fewer_rays": fewer_rays, "asked_first": asked_first, "samplers": samplers, "step": step}
TABLES["speed"] = speed
TABLES |= {"scaling": scaling, "scaling_cuda": partial(scaling, "cuda")}


def with_tables(text: str) -> str:
    """The README's text with its tables made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda m, make=make: f"{m[1]}\n{make()}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
