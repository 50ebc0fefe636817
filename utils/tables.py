"""The results of many runs as one table: mean and spread over seeds, then the mean over scenes."""

import csv
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from utils.errors import RunFolderError
from utils.results import fault_of_results
from utils.run_folder import atomic_file, read_json

# column: digits after the point
METRICS = {"psnr": 2, "ssim": 4, "lpips_alex": 4, "lpips_vgg": 4, "train_seconds": 1, "peak_memory_mb": 0}
FACTS = ("n_iters", "batch_size", "device", "commit")
COLUMNS = ("dataset", "scene", "tag", "seeds", *METRICS, *FACTS)
MISSING = "n/a"


def collect_results(root: Path) -> list[dict]:
    """The content of every results.json under `root`, by path, with `tag` and `folder` (its run's) added.

    A damaged file is skipped with a warning that names it.
    """
    results = []
    for path in sorted(Path(root).rglob("results.json")):
        try:
            result = read_json(path)
        except RunFolderError as error:
            warnings.warn(f"left out of the table: {error}", stacklevel=2)
            continue
        fault = fault_of_results(result)
        if fault:
            warnings.warn(f"left out of the table: {path} is damaged ({fault})", stacklevel=2)
            continue
        tag_folder = path.parent.parent
        place = {"dataset": tag_folder.parent.parent.name, "scene": tag_folder.parent.name}
        results.append({**place, **result, "tag": tag_folder.name, "folder": str(path.parent)})
    return results


def write_tables(root: Path) -> None:
    """Write res_table.md and res_table.csv in `root` from the results.json files under it.

    One row for each (dataset, scene, tag): mean +- standard deviation (n - 1) over its seeds; then one row for each
    (dataset, tag) with the mean of its scenes' means. Raises RunFolderError if they cannot be written.
    """
    rows = _rows(collect_results(root))
    with atomic_file(Path(root) / "res_table.md", "w") as file:
        file.write(_markdown(rows))
    with atomic_file(Path(root) / "res_table.csv", "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rows(results: list[dict]) -> list[dict[str, str]]:
    rows, mean_rows = [], []
    runs_by_row = _grouped(results, lambda run: (run["dataset"], run["scene"], run["tag"]))
    for (dataset, scene, tag), runs in runs_by_row.items():
        spread = {key: _mean_and_spread(_numbers(runs, key), digits) for key, digits in METRICS.items()}
        rows.append(_row(dataset, scene, tag, runs, spread))
    for (dataset, tag), runs in _grouped(results, lambda run: (run["dataset"], run["tag"])).items():
        scenes = _grouped(runs, lambda run: run["scene"])
        means = {key: _mean_of_scenes(scenes.values(), key, digits) for key, digits in METRICS.items()}
        mean_rows.append(_row(dataset, f"mean of {len(scenes)}", tag, runs, means))
    return rows + mean_rows


def _row(dataset: str, scene: str, tag: str, runs: list[dict], metrics: dict[str, str]) -> dict[str, str]:
    seeds = len({str(run.get("seed")) for run in runs})
    facts = {key: ", ".join(sorted({str(run[key]) for run in runs if run.get(key) is not None})) for key in FACTS}
    facts = {key: text or MISSING for key, text in facts.items()}
    return {"dataset": dataset, "scene": scene, "tag": tag, "seeds": str(seeds), **metrics, **facts}


def _grouped(runs: list[dict], key: Callable[[dict], tuple | str]) -> dict:
    groups: dict = {}
    for run in sorted(runs, key=key):
        groups.setdefault(key(run), []).append(run)
    return groups


def _numbers(runs: Iterable[dict], key: str) -> list[float]:
    values = [run.get(key) for run in runs]
    return [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _mean_and_spread(values: list[float], digits: int) -> str:
    if not values:
        return MISSING
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def _mean_of_scenes(scenes: Iterable[list[dict]], key: str, digits: int) -> str:
    values = [_numbers(runs, key) for runs in scenes]
    # A mean over some of the scenes would look better or worse than it is.
    return f"{statistics.fmean(map(statistics.fmean, values)):.{digits}f}" if all(values) else MISSING


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[row[column].replace("|", "\\|") for column in COLUMNS] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
