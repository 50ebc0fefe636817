"""The runs of a data set as a grid of scenes, tags and seeds: what is there, what is missing, means and spreads."""

import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The row that others are compared with: the standard sampler on the same kind of field.
BASELINES = {"TensorCP": "full_cp"}
BASELINE = "full"
# A figure beyond this is no measurement; what is computed with it would only overflow.
LARGEST_FIGURE = 1e15
# Options that say nothing about what a run computes: how it was started, where it lies, what is shown and how often.
HOW_STARTED = ("config", "demo", "check_only", "overwrite", "debug", "device", "cuda_graphs", "seeds", "strategies")
SWEEP = ("multi_data", "datasets", "compare", "dry_run", "retry_failed", "shard", "gpus", "jobs", "launcher")
WHERE = ("save_dir", "up_folder_name", "tag", "data_folder", "lpips_weights")
SHOWN = ("N_vis", "vis_every", "progress_refresh_rate", "save_every", "eval_chunk")
OUTPUT = ("render_test", "render_train", "render_path", "render_only", "export_mesh", "export_tensorf")
NOT_COMPARED = frozenset(["seed", *HOW_STARTED, *SWEEP, *WHERE, *SHOWN, *OUTPUT])
# Options that say on what a run is scored: runs that differ here have no difference in quality. Those of VIEWS do
# not count where both runs name their views.
PIXELS = ("downsample_test", "demo_resolution")
VIEWS = ("test_every", "skip_missing_frames")
# Options that must agree before a difference in PSNR says something about the strategies.
PROTOCOL = ("n_iters", "downsample_train", *VIEWS, *PIXELS)
# What shows that a folder is a run's.
RUN_MARKS = ("results.json", "args.json", "failed.json")


def run_folders(root: Path) -> Iterator[Path]:
    """The folders of runs under `root`, finished or not, sorted by path: those named seed{n} in which a run wrote."""
    for folder, subfolders, _ in os.walk(root):
        named = [Path(folder, name) for name in subfolders if re.fullmatch(r"seed\d+", name)]
        found = [path for path in named if any((path / mark).exists() for mark in RUN_MARKS)]
        # Pictures lie below; a sweep has hundreds of thousands of them.
        subfolders[:] = sorted(set(subfolders) - {path.name for path in found})
        yield from sorted(found, key=seed_of)


def seed_of(folder: Path) -> int:
    """The number in the name of a run's folder, seed{n}."""
    return int(folder.name.removeprefix("seed"))


def number(value: object) -> float | None:
    """A finite number of a results.json; None for anything else that may stand there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -LARGEST_FIGURE < value < LARGEST_FIGURE else None


def baseline_of(runs: Sequence[dict]) -> str:
    """The tag of the row that a row of runs is compared with."""
    model = runs[0].get("model_name") if runs else None
    return BASELINES.get(model, BASELINE) if isinstance(model, str) else BASELINE


def tag_order(tag: str) -> tuple[bool, str]:
    """Sort key of rows: what others are compared with comes first, the rest by name."""
    return tag not in (BASELINE, *BASELINES.values()), tag


def settings_of(run: dict) -> dict:
    """The options of a run that say what it computes."""
    options = run["options"] if isinstance(run.get("options"), dict) else {}
    return {name: value for name, value in options.items() if name not in NOT_COMPARED}


def mixed_settings(runs: Sequence[dict]) -> list[str]:
    """Names of the settings in which runs of one row differ."""
    settings, absent = [settings_of(run) for run in runs], object()
    names = sorted(set().union(*settings))
    return [k for k in names if any(each.get(k, absent) != settings[0].get(k, absent) for each in settings)]


def changed_settings(runs: Mapping[object, dict], base: Mapping[object, dict]) -> dict:
    """Settings besides the strategy in which a row differs from `base`, both by seed: with the first seed that both
    have, without one in their first runs."""
    if not runs or not base:
        return {}
    shared = next((seed for seed in runs if seed in base), None)
    pair = (runs[shared], base[shared]) if shared in runs else (next(iter(runs.values())), next(iter(base.values())))
    ours, others = map(settings_of, pair)
    return {k: v for k, v in ours.items() if k in others and others[k] != v and k != "strategy"}


def scored_alike(run: dict, other: dict) -> bool:
    """Whether two runs were scored on the same views, as far as they say on which."""
    ours, others = settings_of(run), settings_of(other)
    names, places = ([_views(each, key) for each in (run, other)] for key in ("names", "indices"))
    known = None not in names
    views = names if known else places  # places alone do not tell which frames are missing before them
    return (None in views or views[0] == views[1]) and all(
        ours[key] == others[key] for key in PIXELS + VIEWS * (not known) if key in ours and key in others
    )


def _views(run: dict, key: str) -> list | None:
    views = run["per_view"].get(key) if isinstance(run.get("per_view"), dict) else None
    return views if isinstance(views, list) else None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of `n` values, where `wanted` would be all of them."""

    mean: float | None
    std: float | None
    n: int
    wanted: int

    @classmethod
    def of(cls, values: Sequence[float], wanted: int) -> "Spread":
        """The spread of `values`; no mean of none, no deviation of a single one."""
        mean = statistics.fmean(values) if values else None
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None, len(values), wanted)

    @property
    def whole(self) -> bool:
        """Whether there are values and none is missing."""
        return self.n == self.wanted > 0


@dataclass
class Grid:
    """The runs of one data set: `finished` (their results) and `unfinished` (why) by (scene, tag, seed).

    Names and seeds are those of the folders, which are what a run is known by.
    """

    dataset: str
    finished: dict[tuple[str, str, int], dict] = field(default_factory=dict)
    unfinished: dict[tuple[str, str, int], str] = field(default_factory=dict)

    @property
    def scenes(self) -> list[str]:
        """All scenes, sorted."""
        return sorted({scene for scene, _, _ in (*self.finished, *self.unfinished)})

    @property
    def tags(self) -> list[str]:
        """All tags, baselines first."""
        return sorted({tag for _, tag, _ in (*self.finished, *self.unfinished)}, key=tag_order)

    @property
    def seeds(self) -> list[int]:
        """All seeds, sorted."""
        return sorted({seed for _, _, seed in (*self.finished, *self.unfinished)})

    def runs(self, scenes: Sequence[str], tag: str) -> list[dict]:
        """The finished runs of a tag in these scenes."""
        keys = [(scene, tag, seed) for scene in scenes for seed in self.seeds]
        return [self.finished[key] for key in keys if key in self.finished]

    def by_seed(self, scene: str, tag: str) -> dict[int, dict]:
        """The finished runs of a tag in a scene."""
        return {seed: self.finished[scene, tag, seed] for seed in self.seeds if (scene, tag, seed) in self.finished}

    def missing(self) -> dict[tuple[str, str, str], list[int]]:
        """Seeds without a result by (scene, tag, why), over the whole grid that the runs found span."""
        holes: dict[tuple[str, str, str], list[int]] = {}
        for scene in self.scenes:
            for tag in self.tags:
                for seed in self.seeds:
                    if (scene, tag, seed) not in self.finished:
                        why = self.unfinished.get((scene, tag, seed), "not started")
                        holes.setdefault((scene, tag, why), []).append(seed)
        return holes

    def spread(self, scenes: Sequence[str], tag: str, key: str, minus: str | None = None) -> Spread:
        """Over seeds: of figure `key`, or of its difference to tag `minus`'s with the same scene and seed.

        A seed's value is the mean over `scenes`; it has none unless every scene has one. Runs that were not scored
        alike have no difference.
        """
        values = []
        for seed in self.seeds:
            by_scene = [self._value(scene, tag, seed, key, minus) for scene in scenes]
            if None not in by_scene:
                values.append(statistics.fmean(by_scene))
        return Spread.of(values, len(self.seeds))

    def _value(self, scene: str, tag: str, seed: int, key: str, minus: str | None) -> float | None:
        value = number(self.finished.get((scene, tag, seed), {}).get(key))
        if value is None or minus is None:
            return value
        base = self.finished.get((scene, minus, seed), {})
        other = number(base.get(key))
        return value - other if other is not None and scored_alike(self.finished[scene, tag, seed], base) else None
