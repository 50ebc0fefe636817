"""What is made from the results of several runs, and kept up to date while they go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.comparison import FOLDER, write_comparison
from utils.console import say
from utils.tables import write_tables


def update_tables(options: Mapping[str, Any], compare: bool) -> None:
    """The tables of a run's data set, and with `compare` the comparison of its scene, from what is finished by now.

    options: the run's. Raises RunFolderError if they cannot be written.
    """
    folder = dataset_folder(options)
    if folder.is_dir():  # not before the first run of the data set
        write_tables(folder)
        if compare:
            write_comparison(folder / options["nerf_scene"])


def tell_comparison(options: Mapping[str, Any]) -> None:
    """Say where the comparison of a run's scene lies."""
    folder = dataset_folder(options) / options["nerf_scene"] / FOLDER
    if folder.is_dir():
        say(f"comparison: {folder} (overview.png, table.md, table.csv, figures)")


def dataset_folder(options: Mapping[str, Any]) -> Path:
    """Where the runs of a run's data set lie, and their tables."""
    return Path(options["save_dir"], options["up_folder_name"], options["nerf_dataset"])
