"""Rows of the result tables: a strategy entry in a scene, or its mean over scenes, and what to know beside them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.run_grid import Grid, Spread, baseline_of, changed_settings, mixed_settings, scored_alike


@dataclass(frozen=True)
class Metric:
    """A figure of results.json.

    key: its name there. digits, printed: after the point, on a screen and in a paper, where a line is short.
    more_is_better: what is best of a column. paired: whether the difference to the baseline is shown; it is for what
    does not depend on the machine.
    """

    key: str
    heading: str
    digits: int
    printed: int
    more_is_better: bool = False
    paired: bool = True


METRICS = (
    Metric("psnr", "PSNR", 2, 2, more_is_better=True),
    Metric("ssim", "SSIM", 4, 3, more_is_better=True),
    Metric("lpips_alex", "LPIPS alex", 4, 3),
    Metric("lpips_vgg", "LPIPS vgg", 4, 3),
    Metric("train_seconds", "train s", 1, 0, paired=False),
    Metric("peak_memory_mb", "peak MB", 0, 0, paired=False),
)
FACTS = ("n_iters", "batch_size", "device", "commit")
# Facts in which rows should agree before they are compared; a batch is often the very thing that is compared.
SAME = ("n_iters", "device", "commit")
LONGEST_TEXT = 300


@dataclass(frozen=True)
class Row:
    """A tag in one scene, or its mean over all scenes of a data set.

    seeds: how many have a result (of a mean: in every scene) of `wanted`. spreads: by metric key. differences: to
    the baseline, None for the baseline itself. facts: what its runs say of themselves, joined by commas.
    """

    dataset: str
    scene: str
    tag: str
    seeds: int
    wanted: int
    spreads: dict[str, Spread]
    differences: dict[str, Spread] | None
    facts: dict[str, str]


def rows_of(grid: Grid) -> list[Row]:
    """A row for each scene and tag, then, of several scenes, a row for each tag's mean over them."""
    rows = [_row(grid, [scene], scene, tag) for scene in grid.scenes for tag in grid.tags]
    if len(grid.scenes) > 1:
        rows += [_row(grid, grid.scenes, f"mean of {len(grid.scenes)}", tag) for tag in grid.tags]
    return rows


def _row(grid: Grid, scenes: Sequence[str], name: str, tag: str) -> Row:
    runs = grid.runs(scenes, tag)
    base = baseline_of(runs)
    seeds = sum(all((scene, tag, seed) in grid.finished for scene in scenes) for seed in grid.seeds)
    spreads = {metric.key: grid.spread(scenes, tag, metric.key) for metric in METRICS}
    paired = {m.key: grid.spread(scenes, tag, m.key, minus=base) for m in METRICS if m.paired}
    facts = {key: ", ".join(sorted({one_line(r[key]) for r in runs if r.get(key) is not None})) for key in FACTS}
    return Row(grid.dataset, name, tag, seeds, len(grid.seeds), spreads, None if tag == base else paired, facts)


def notes_of(grid: Grid) -> list[str]:
    """What one must know beside a grid's rows: runs that do not belong together, and runs that are missing."""
    notes = []
    for key in SAME:
        known = sorted({one_line(run.get(key)) for run in grid.finished.values()})
        if len(known) > 1:
            notes.append(f"careful: not all runs have the same {key} ({', '.join(known)})")
    for scene in grid.scenes:
        for tag in grid.tags:
            if mixed := mixed_settings(grid.runs([scene], tag)):
                told = one_line(", ".join(mixed))
                notes.append(f"careful: the runs of {scene}, {tag} do not have the same settings ({told})")
    notes += _changed_notes(grid)
    for (scene, tag, why), seeds in grid.missing().items():
        told = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        notes.append(f"missing: {scene}, {tag}, {told}: {why}")
    return notes


def _changed_notes(grid: Grid) -> list[str]:
    """A note for each tag and the settings, untold by the tag, in which it differs from the baseline in some scenes."""
    scenes: dict[str, list[str]] = {}
    for tag in grid.tags:
        for scene in grid.scenes:
            runs = grid.by_seed(scene, tag)
            name = baseline_of(list(runs.values()))
            base = grid.by_seed(scene, name)
            told = [f"{k} = {v}" for k, v in changed_settings(runs, base).items() if not _tag_tells(tag, k)]
            parts = [f"also differs from {name} in {one_line(', '.join(told))}"] if told else []
            parts += _scoring(runs, base, name)
            if parts:
                scenes.setdefault(f"{tag} {'; '.join(parts)}", []).append(scene)
    return [f"careful: {', '.join(names)}: {note}" for note, names in scenes.items()]


def _scoring(runs: Mapping[int, dict], base: Mapping[int, dict], name: str) -> list[str]:
    """A remark if runs have no difference to those of their seeds in `base`, called `name`."""
    shared = [seed for seed in runs if seed in base]
    unlike = [seed for seed in shared if not scored_alike(runs[seed], base[seed])]
    if not unlike:
        return []
    which = "" if unlike == shared else f"with seed{'s' if len(unlike) > 1 else ''} {', '.join(map(str, unlike))} "
    return [f"{which}was scored on other views or pixels than {name}, so there is no difference to it"]


def _tag_tells(tag: str, setting: str) -> bool:
    """Whether a tag, as run.py makes them of strategies with settings of their own, names a setting."""
    return re.search(rf"-{re.escape(setting)}(?![A-Za-z_])", tag) is not None


def one_line(value: object) -> str:
    """Text of a file that anybody may have written, fit for a table: one line, printable, not long."""
    text = " ".join(str(value).split())
    return "".join(character for character in text if character.isprintable())[:LONGEST_TEXT]
