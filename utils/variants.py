"""Lists of strategies on the command line, each with settings of its own: `full,expansive:es_ratio=0.5`."""

import re
from dataclasses import dataclass

from utils.errors import OptionError

EXAMPLE = "full,expansive,expansive:es_ratio=0.5"
# What all entries share: the scene, where runs lie, and what makes several runs.
SHARED = frozenset(
    [
        "strategy",
        "strategies",
        "compare",
        "seed",
        "seeds",
        "tag",
        "config",
        "demo",
        "demo_resolution",
        "multi_data",
        "datasets",
        "dry_run",
        "retry_failed",
        "shard",
        "gpus",
        "jobs",
        "launcher",
        "nerf_dataset",
        "nerf_scene",
        "data_folder",
        "save_dir",
        "up_folder_name",
        "check_only",
        "overwrite",
        "debug",
        "device",
        "render_only",
        "ckpt",
        "export_tensorf",
    ]
)


@dataclass(frozen=True)
class Variant:
    """A strategy and the options in which it differs from the rest of the command line, as text; "" for a flag."""

    strategy: str
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def arguments(self) -> list[str]:
        """What it adds to the command line."""
        words = ["--strategy", self.strategy]
        for name, value in self.changes:
            words += [f"--{name}"] + ([value] if value else [])
        return words

    @property
    def tag(self) -> str:
        """A name for its runs' folder, for example expansive-es_ratio0.5."""
        return "-".join([self.strategy, *(re.sub(r"[^\w.+,-]", "", name + value) for name, value in self.changes)])


def parse_variants(text: str) -> list[Variant]:
    """The variants of a list. Raises OptionError if an entry is empty, malformed or there twice."""
    variants = [_parse(entry.strip()) for entry in re.split(r",(?![^\[]*\])", text)]
    tags = [variant.tag for variant in variants]
    doubled = [tag for number, tag in enumerate(tags) if tag in tags[:number]]
    if doubled:
        raise OptionError(f"--strategies: {doubled[0]} is there twice; keep one")
    return variants


def _parse(entry: str) -> Variant:
    strategy, *changes = entry.split(":")
    if not strategy or not all(re.fullmatch(r"[A-Za-z]\w*(=.+)?", change) for change in changes):
        raise OptionError(f"--strategies: '{entry}' is no strategy; write for example {EXAMPLE}")
    pairs = [change.partition("=")[::2] for change in changes]
    reserved = [name for name, _ in pairs if name in SHARED]
    if reserved:
        raise OptionError(f"--strategies: '{entry}': {reserved[0]} cannot be changed here; give it as --{reserved[0]}")
    return Variant(strategy, tuple(pairs))
