"""The results of many runs as tables, from what the runs left on the disk and nothing else."""

import warnings
from contextlib import suppress
from pathlib import Path

from utils.errors import RunFolderError
from utils.jobs import read_failure
from utils.results import fault_of_results
from utils.run_folder import atomic_file, read_json
from utils.run_grid import Grid, run_folders, seed_of
from utils.table_formats import csv_text, markdown_text, tex_text
from utils.table_rows import notes_of, one_line, rows_of


def collect_results(root: Path) -> list[dict]:
    """The content of every run's results.json under `root`, by path, with `tag` and `folder` (the run's) added.

    A damaged file is skipped with a warning that names it.
    """
    results = []
    for path in (folder / "results.json" for folder in run_folders(root)):
        if not path.exists():
            continue
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


def read_grids(root: Path) -> list[Grid]:
    """A grid for each data set that has runs under `root`, which is its folder or one above."""
    root = Path(root).absolute()
    results = {result["folder"]: result for result in collect_results(root)}
    grids: dict[str, Grid] = {}
    for folder in run_folders(root):
        scene, dataset = folder.parent.parent.name, folder.parent.parent.parent.name
        grid = grids.setdefault(dataset, Grid(dataset))
        key = (scene, folder.parent.name, seed_of(folder))
        if str(folder) in results:
            grid.finished[key] = results[str(folder)]
        else:
            grid.unfinished[key] = _why_unfinished(folder)
    return [grids[name] for name in sorted(grids)]


def _why_unfinished(folder: Path) -> str:
    if (folder / "results.json").exists():
        return "its results.json is damaged"
    failure = read_failure(folder)
    return f"failed: {one_line(failure)}" if failure else "started, not finished"


def write_tables(root: Path) -> None:
    """Write res_table.md, .csv and .tex in `root` from the files of the runs under it.

    A row for each (data set, scene, tag): mean and standard deviation over its seeds, and of the paired difference to
    `full`; then, of several scenes, one for each (data set, tag). Raises RunFolderError if they cannot be written.
    """
    seen = None
    # Another process may end a run, and write the tables, while ours are made: ours must not bring back older ones.
    while seen != (now := _traces(root)):
        seen = now
        tables = [(rows_of(grid), notes_of(grid)) for grid in read_grids(root)]
        rows = [row for table_rows, _ in tables for row in table_rows]
        notes = [note for _, table_notes in tables for note in table_notes]
        texts = {"md": markdown_text(rows, notes), "csv": csv_text(rows), "tex": tex_text(tables)}
        for ending, text in texts.items():
            with atomic_file(Path(root) / f"res_table.{ending}", "w") as file:
                file.write(text)


def _traces(root: Path) -> list[tuple[str, int]]:
    """What changes when a run starts, ends or fails: files and when they were written."""
    traces = []
    for folder in run_folders(root):
        traces.append((str(folder), 0))
        for path in (folder / "results.json", folder / "failed.json"):
            with suppress(OSError):  # not there, or a network folder that is away for a moment
                traces.append((str(path), path.stat().st_mtime_ns))
    return traces
