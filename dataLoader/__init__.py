"""Files -> Scene: one module a format, and the generated demo scene.

A scene is checked once, here; headers and poses are checked before any image is decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.types import Scene
from dataLoader import demo, llff, nsvf, own_data, syn
from dataLoader.assemble import LoadOptions
from dataLoader.checks import WHERE_DATA_COMES_FROM
from dataLoader.demo import ensure_demo_scene
from utils.errors import OptionError, SceneError

__all__ = ["FORMATS", "ensure_demo_scene", "load_scene", "scene_folder", "scene_names"]


@dataclass(frozen=True)
class Format:
    """One data-set format: its folder under the data folder, its loader, and files that tell a scene's folder."""

    folder: str
    load: Callable[[Path, str, LoadOptions], Scene]
    markers: tuple[str, ...]


FORMATS = {
    "syn": Format(syn.FOLDER, syn.load, syn.MARKERS),
    "nsvf": Format(nsvf.NSVF_FOLDER, nsvf.load_nsvf, nsvf.MARKERS),
    "tt": Format(nsvf.TT_FOLDER, nsvf.load_tt, nsvf.MARKERS),
    "llff": Format(llff.FOLDER, llff.load, llff.MARKERS),
    "own_data": Format(own_data.FOLDER, own_data.load, own_data.MARKERS),
    "demo": Format(demo.FOLDER, syn.load, syn.MARKERS),
}


def load_scene(
    dataset: str,
    data_folder: str | Path,
    scene: str,
    split: str,
    downsample: float,
    *,
    scene_bbox: Sequence[float] | None = None,
    skip_missing_frames: bool = False,
    progress: bool = True,
) -> Scene:
    """The `split` ('train' or 'test') of a scene, on the CPU.

    dataset: a key of FORMATS. downsample >= 1 divides the size of the image files, for llff the full size named in
    poses_bounds.npy. scene_bbox: min xyz, max xyz, overrides the format's box. The demo scene is generated on first
    use. Raises SceneError or OptionError, each naming the file or option at fault.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    chosen = _format(dataset)
    if dataset == "demo":
        demo.ensure_named_scene(data_folder, scene, progress)
    folder = scene_folder(dataset, data_folder, scene)
    if not scene or not folder.is_dir():
        found = _scenes_in(folder.parent, chosen.markers)
        others = f"scenes there: {', '.join(found)}" if found else "there are no scenes there yet"
        raise SceneError(f"{folder}: scene folder is missing ({others}); {WHERE_DATA_COMES_FROM}")
    options = LoadOptions(downsample, scene_bbox, skip_missing_frames, progress)
    return chosen.load(folder, split, options)


def scene_names(dataset: str, data_folder: str | Path) -> list[str]:
    """The scenes of a format that are on disk, sorted; for the demo, which needs no files, at least its own."""
    chosen = _format(dataset)
    folder = Path(data_folder) / chosen.folder
    names = _scenes_in(folder, chosen.markers)
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
    if not folder.is_dir():
        return []
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return sorted(child.name for child in children if any((child / marker).exists() for marker in markers))
