"""Runs of one scene beside each other: tables and figures, from what the finished runs left behind."""

import csv
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from utils.plots import write_figures
from utils.run_folder import atomic_file, naming_os_errors
from utils.run_grid import PROTOCOL, baseline_of, changed_settings, mixed_settings, number, scored_alike, tag_order
from utils.table_formats import MISSING
from utils.tables import collect_results

FOLDER = "comparison"


@dataclass(frozen=True)
class Column:
    """A figure of results.json: where it stands, its heading, digits after the point."""

    path: tuple[str, ...]
    heading: str
    digits: int

    def of(self, run: dict) -> float | None:
        """The figure, None if the run does not have it."""
        value = run
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return number(value)


def _column(path: str, heading: str, digits: int) -> Column:
    return Column(tuple(path.split("/")), heading, digits)


QUALITY = (
    _column("psnr", "PSNR dB", 2),
    _column("ssim", "SSIM", 4),
    _column("lpips_alex", "LPIPS alex", 4),
    _column("lpips_vgg", "LPIPS vgg", 4),
    _column("train_seconds", "train s", 0),
    _column("setup_seconds", "set-up s", 0),
)
TIME = tuple(
    _column(f"ms_per_step/{phase}", f"{phase} ms", 1)
    for phase in ("sampler", "forward", "backward", "optimizer", "grow")
)
MEMORY = (
    _column("peak_memory_mb", "peak MB", 0),
    _column("static_memory_mb", "static MB", 0),
    _column("step_memory_mb", "step MB", 0),
    _column("stages/before_mask/step_memory_mb", "step MB before mask", 0),
    _column("stages/after_mask/step_memory_mb", "after", 0),
)
WORK = (
    _column("rays_per_step", "rays a step", 0),
    _column("stages/before_mask/live_samples", "density lookups before mask", 0),
    _column("stages/after_mask/live_samples", "after", 0),
    _column("stages/before_mask/colour_samples", "colour lookups before mask", 0),
    _column("stages/after_mask/colour_samples", "after", 0),
    _column("stages/before_mask/ms_per_step", "ms a step before mask", 0),
    _column("stages/after_mask/ms_per_step", "after", 0),
)
TABLES = {"Quality and time": QUALITY, "Milliseconds a step by phase": TIME, "Memory": MEMORY, "Work a step": WORK}
SAME = ("device", "torch", "commit", "kernels")

READING = """
PSNR, SSIM and LPIPS are means over all scored test views; +- is the standard deviation over seeds (n - 1).
Rows are all finished runs of the scene. `PSNR - full` is the mean, over the seeds that both have, of the difference
to `full` with the same seed, where both were scored on the same views.
Seconds are whole training steps, without evaluations. MB are 2^20 bytes; on a CPU, growth of resident memory.
The mask is the alpha mask: before its first update a ray is looked up along all of its way through the box, after
the last growth of the field only where there is something.
"""


def write_comparison(scene_folder: Path) -> Path | None:
    """Write tables and figures of the finished runs under save_dir/up_folder_name/dataset/scene into comparison/.

    Returns that folder, None if no run is finished. Raises RunFolderError if it cannot be written.
    """
    scene_folder = Path(scene_folder)
    runs = collect_results(scene_folder)
    if not runs:
        return None
    rows = rows_by_tag(runs)
    folder = scene_folder / FOLDER
    with naming_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = [p.parent for p in sorted(scene_folder.glob("*/*/args.json")) if not _finished(p.parent)]
    with atomic_file(folder / "table.md", "w") as file:
        file.write(markdown(rows, [str(path.relative_to(scene_folder)) for path in unfinished]))
    with atomic_file(folder / "table.csv", "w") as file:
        records = [_record(tag, group, rows) for tag, group in rows.items()]
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    write_figures(rows, folder)
    return folder


def _finished(folder: Path) -> bool:
    return (folder / "results.json").exists()


def rows_by_tag(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs by tag, each by seed; the baseline first, the others in alphabetical order."""
    tags = sorted({run["tag"] for run in runs}, key=tag_order)
    return {tag: sorted((r for r in runs if r["tag"] == tag), key=lambda r: r.get("seed", 0)) for tag in tags}


def paired_differences(rows: dict[str, list[dict]], tag: str, key: str = "psnr") -> list[float]:
    """Differences of a figure to the baseline's, a seed each that both have and in which both were scored alike."""
    base = _by_seed(rows.get(baseline_of(rows[tag]), []))
    pairs = [(run, base.get(run.get("seed"), {})) for run in rows[tag]]
    known = [pair for pair in pairs if None not in [run.get(key) for run in pair] and scored_alike(*pair)]
    return [mine[key] - other[key] for mine, other in known]


def _changed(rows: dict[str, list[dict]], tag: str) -> dict:
    """Settings in which a row differs from the baseline, or without one from the first row."""
    base = rows.get(baseline_of(rows[tag])) or next(iter(rows.values()))
    return changed_settings(_by_seed(rows[tag]), _by_seed(base))


def _by_seed(runs: list[dict]) -> dict:
    return {run.get("seed"): run for run in runs}


def _cell(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return MISSING  # a mean over some of the seeds would look better or worse than it is
    spread = f" +- {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def markdown(rows: dict[str, list[dict]], unfinished: list[str]) -> str:
    """The tables as text, with what one must know to read them."""
    first = next(iter(rows.values()))[0]
    parts = [f"# {first.get('dataset')}/{first.get('scene')}: {', '.join(rows)}\n"]
    for title, columns in TABLES.items():
        paired = columns is QUALITY
        head = ["run", "seeds"] + [c.heading for c in columns] + (["PSNR - full"] if paired else [])
        lines = [head, ["---"] * len(head)]
        for tag, group in rows.items():
            cells = [tag, str(len(group))] + [_cell([c.of(run) for run in group], c.digits) for c in columns]
            if paired:
                cells.append(_cell(paired_differences(rows, tag), 2) if tag != baseline_of(group) else "0")
            lines.append(cells)
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"\n**{title}**\n\n{table}")
    parts.append(READING)
    parts += [f"\n- {line}" for line in [*_settings_lines(rows), *_warnings(rows, unfinished)]]
    return "".join(parts) + "\n"


def _settings_lines(rows: dict[str, list[dict]]) -> list[str]:
    lines = []
    for tag in rows:
        changed = _changed(rows, tag)
        if changed:
            lines.append(
                f"{tag} also differs from the first row in " + ", ".join(f"{k} = {v}" for k, v in changed.items())
            )
    runs = [run for group in rows.values() for run in group]
    facts = {key: sorted({str(run.get(key)) for run in runs}) for key in SAME}
    lines.append("measured with " + "; ".join(f"{key} {', '.join(values)}" for key, values in facts.items()))
    return lines


def _warnings(rows: dict[str, list[dict]], unfinished: list[str]) -> list[str]:
    runs, lines = [run for group in rows.values() for run in group], []
    for key in SAME:
        if len({str(run.get(key)) for run in runs}) > 1:
            lines.append(f"**careful**: not all runs have the same {key}; compare times and memory within one only")
    if len({tuple(run.get("seed") for run in group) for group in rows.values()}) > 1:
        lines.append("**careful**: not all rows have the same seeds; the paired difference uses those that both have")
    lines += [
        f"**careful**: there is no row {base} to compare with"
        for base in sorted({baseline_of(group) for group in rows.values()} - rows.keys())
    ]
    for tag in rows:
        other = {k: v for k, v in _changed(rows, tag).items() if k in PROTOCOL}
        if other:
            told = ", ".join(f"{k} = {v}" for k, v in other.items())
            effect = "which its differences, if it has any, hold too"
            lines.append(f"**careful**: {tag} ran under another protocol ({told}), {effect}")
    lines += [
        f"**careful**: the runs of {tag} do not have the same settings ({', '.join(mixed)})"
        for tag, group in rows.items()
        if (mixed := mixed_settings(group))
    ]
    return lines + [f"**missing**: {name} is not finished" for name in unfinished]


def _record(tag: str, group: list[dict], rows: dict[str, list[dict]]) -> dict[str, object]:
    """One line of the csv: plain numbers, mean and standard deviation apart, empty where unknown."""
    first = group[0]
    record = {"dataset": first.get("dataset"), "scene": first.get("scene"), "tag": tag, "seeds": len(group)}
    for column in (c for columns in TABLES.values() for c in columns):
        record |= _mean_and_std("_".join(column.path), [column.of(run) for run in group])
    record |= _mean_and_std("psnr_minus_full", paired_differences(rows, tag))
    record |= {key: " ".join(sorted({str(run.get(key)) for run in group})) for key in SAME}
    return record | {"settings": json.dumps(_changed(rows, tag))}


def _mean_and_std(name: str, values: list[float | None]) -> dict[str, object]:
    known = [value for value in values if value is not None]
    whole = bool(known) and len(known) == len(values)
    return {
        f"{name}_mean": statistics.fmean(known) if whole else "",
        f"{name}_std": statistics.stdev(known) if whole and len(known) > 1 else "",
    }
