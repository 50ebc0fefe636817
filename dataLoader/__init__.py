"""Files -> Scene: one module a format, and the generated demo scene.

A scene is checked once, here: all headers and poses are read before any image is decoded, and what is wrong with them
is told at once.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.types import Scene
from dataLoader import demo, llff, nsvf, own_data, syn
from dataLoader.assemble import LoadOptions, SplitPlan, assemble_scene
from dataLoader.checks import WHERE_DATA_COMES_FROM, list_folder
from dataLoader.demo import ensure_demo_scene
from dataLoader.images import quiet_pillow
from dataLoader.plausible import check_plan, check_shared_images
from dataLoader.problems import Problems
from utils.console import say
from utils.errors import OptionError, SceneError, printable

__all__ = [
    "FORMATS",
    "Inspection",
    "ensure_demo_scene",
    "inspect_scene",
    "load_scene",
    "scene_folder",
    "scene_names",
]


@dataclass(frozen=True)
class Format:
    """One data-set format: its folder under the data folder, its reader, and files that tell a scene's folder."""

    folder: str
    read: Callable[[Path, str, LoadOptions, Problems], SplitPlan | None]
    markers: tuple[str, ...]


FORMATS = {
    "syn": Format(syn.FOLDER, syn.read, syn.MARKERS),
    "nsvf": Format(nsvf.NSVF_FOLDER, nsvf.read_nsvf, nsvf.MARKERS),
    "tt": Format(nsvf.TT_FOLDER, nsvf.read_tt, nsvf.MARKERS),
    "llff": Format(llff.FOLDER, llff.read, llff.MARKERS),
    "own_data": Format(own_data.FOLDER, own_data.read, own_data.MARKERS),
    "demo": Format(demo.FOLDER, syn.read, syn.MARKERS),
}


@dataclass(frozen=True)
class Inspection:
    """What the headers and poses of a scene say: its usable splits, and all problems."""

    folder: Path
    plans: Mapping[str, SplitPlan]
    problems: Problems

    def require_good(self) -> None:
        """Raise SceneError or OptionError for the problems; without any, warn of what is odd."""
        self.problems.raise_any(str(self.folder))
        for line in self.problems.notes:
            warnings.warn(line, stacklevel=2)

    def load(self, split: str, progress: bool = True) -> Scene:
        """A split of a good scene, decoded, on the CPU. SceneError for a file that cannot be decoded."""
        return assemble_scene(self.plans[split], progress)


def inspect_scene(
    dataset: str,
    data_folder: str | Path,
    scene: str,
    downsample: Mapping[str, float],
    *,
    scene_bbox: Sequence[float] | None = None,
    skip_missing_frames: bool = False,
    progress: bool = True,
) -> Inspection:
    """Read all headers and poses of the splits ('train', 'test') that `downsample` names, without decoding pixels.

    downsample: by split, a factor >= 1 that divides the size of the image files, for llff the full size named in
    poses_bounds.npy. The other parameters are `load_scene`'s. Raises SceneError or OptionError only where there is no
    scene to look at.
    """
    folder = _existing_folder(dataset, data_folder, scene, progress)
    plans, problems = {}, Problems()
    with quiet_pillow(), np.errstate(all="ignore"):
        for split, factor in downsample.items():
            options, found = LoadOptions(factor, scene_bbox, skip_missing_frames), Problems()
            plan = _format(dataset).read(folder, split, options, found)
            if plan is not None:
                check_plan(plan, found)
            if plan is not None and not found:
                plans[split] = plan
            problems.join(found)
        check_shared_images(plans, problems)
    return Inspection(folder, plans, problems)


def load_scene(
    dataset: str,
    data_folder: str | Path,
    scene: str,
    split: str,
    downsample: float,
    *,
    progress: bool = True,
    **options,
) -> Scene:
    """The `split` ('train' or 'test') of a scene, on the CPU.

    dataset: a key of FORMATS. options: scene_bbox (min xyz, max xyz, overrides the format's box) and
    skip_missing_frames. The demo scene is generated on first use. Raises SceneError or OptionError, each naming the
    file or option at fault; several faults are listed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    found = inspect_scene(dataset, data_folder, scene, {split: downsample}, progress=progress, **options)
    found.require_good()
    return found.load(split, progress)


def _existing_folder(dataset: str, data_folder: str | Path, scene: str, progress: bool) -> Path:
    chosen = _format(dataset)
    if dataset == "demo":
        demo.ensure_named_scene(data_folder, scene, progress)
    folder = scene_folder(dataset, data_folder, scene)
    if not scene or not folder.is_dir():
        found = _scenes_in(folder.parent, chosen.markers)
        others = f"scenes there: {', '.join(found)}" if found else "there are no scenes there yet"
        raise SceneError(f"{folder}: scene folder is missing ({others}); {WHERE_DATA_COMES_FROM}")
    return folder


def scene_names(dataset: str, data_folder: str | Path) -> list[str]:
    """The scenes of a format that are on disk, sorted; for the demo, which needs no files, at least its own.

    Says which folders beside them are left out, and why.
    """
    chosen = _format(dataset)
    folder = Path(data_folder) / chosen.folder
    names = _scenes_in(folder, chosen.markers)
    for child in sorted(set(_folders_in(folder)) - set(names)):
        say(printable(f"left out: {chosen.folder}/{child} (no {' or '.join(chosen.markers)})"))
    if dataset == "demo":
        return names or [demo.scene_name(demo.DEFAULT_RESOLUTION)]
    if not names:
        raise SceneError(f"{folder}: holds no scenes; {WHERE_DATA_COMES_FROM}")
    return names


def scene_folder(dataset: str, data_folder: str | Path, scene: str) -> Path:
    """Where a scene lies; for the demo `shapes` means the default resolution."""
    name = demo.full_name(scene) if dataset == "demo" else scene
    return Path(data_folder) / _format(dataset).folder / name


def _format(dataset: str) -> Format:
    if dataset not in FORMATS:
        raise OptionError(f"--nerf_dataset {dataset}: unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[dataset]


def _scenes_in(folder: Path, markers: tuple[str, ...]) -> list[str]:
    return [name for name in _folders_in(folder) if any((folder / name / marker).exists() for marker in markers)]


def _folders_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(child.name for child in list_folder(folder) if child.is_dir() and not child.name.startswith("."))
