"""LPIPS, the perceptual distance of arXiv:1801.03924 (version 0.1), as far as its weights are at hand.

The linear heads ship with the lpips package; the backbones (AlexNet, VGG-16, trained on ImageNet) are torchvision's
and have to be fetched once. Nothing is downloaded here: what is missing is said at the start of a run, with the way
to get it, and reported as None.
"""

import importlib
import importlib.util
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from utils.errors import UserError

# LPIPS's name of the network -> torchvision's name, which its weight files begin with
BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}
# Pixels; below this, AlexNet's strides leave nothing of the picture.
MIN_SIDE = 31

# Operators of torchvision whose absence stops its import where its compiled part does not fit torch's build (a CUDA
# build of it beside a CPU build of torch). The backbones use none of them; declaring them is enough.
_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# Operators vanish with the library object that declared them.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators cannot be loaded. ImportError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")


@dataclass
class PerceptualMetrics:
    """The LPIPS networks that are available. lines: one a network, to show the user at the start."""

    networks: dict[str, nn.Module]
    lines: list[str]
    device: torch.device
    # so that a message that holds for every picture is told once
    notes: set[str] = field(default_factory=set)

    @torch.no_grad()
    def measure(self, a: Tensor, b: Tensor) -> dict[str, float | None]:
        """{"lpips_alex": ..., "lpips_vgg": ...} of two pictures [H, W, 3] in [0, 1].

        None for a network that is missing, and for pictures smaller than MIN_SIDE (said once in `notes`).
        """
        values: dict[str, float | None] = {f"lpips_{name}": None for name in BACKBONES}
        if min(a.shape[:2]) < MIN_SIDE:
            self.notes.add(f"LPIPS: n/a, pictures of {a.shape[1]}x{a.shape[0]} are smaller than {MIN_SIDE} pixels")
            return values
        a, b = (image.to(self.device).permute(2, 0, 1)[None].float() * 2.0 - 1.0 for image in (a, b))
        for name, network in self.networks.items():
            values[f"lpips_{name}"] = network.to(self.device)(a, b).item()
        return values

    def release(self) -> None:
        """Move the networks off the device, so that training's memory does not count them."""
        for network in self.networks.values():
            network.to("cpu")


def load_perceptual_metrics(weights_dir: str | None, device: torch.device | str) -> PerceptualMetrics:
    """The LPIPS networks whose backbone weights are at hand, and for the others the reason why not.

    Looks for alexnet*.pth and vgg16*.pth in `weights_dir`, then in torch hub's cache. A file may be torchvision's
    state dict or only its `features.*`. Raises UserError if `weights_dir` is given but does not exist, holds neither
    file, or holds a damaged or a wrong one.
    """
    folder = None if weights_dir is None else Path(weights_dir)
    if folder is not None:
        check_weights_folder(folder)
    networks, lines = {}, []
    for name, backbone in BACKBONES.items():
        found = _load_one(name, backbone, folder)
        if isinstance(found, str):
            lines.append(f"lpips_{name}: n/a, {found}")
        else:
            networks[name] = found
            lines.append(f"lpips_{name}: available")
    return PerceptualMetrics(networks, lines, torch.device(device))


def weights_line(weights_dir: str | None) -> str:
    """Whether the backbones' weights are at hand, as one line for the user; looks at the names of files only."""
    folders = [Path(weights_dir)] if weights_dir else []
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    there = {name: any(_find(folder, backbone) for folder in folders) for name, backbone in BACKBONES.items()}
    told = ", ".join(f"{name} {'there' if found else 'missing (n/a in tables)'}" for name, found in there.items())
    remedy = "" if all(there.values()) else f"; they are looked for in {' and '.join(map(str, folders))}"
    return f"LPIPS weights: {told}{remedy}"


def check_weights_folder(folder: Path) -> None:
    """Raise UserError if the folder of --lpips_weights does not exist or holds no backbone's file."""
    if not folder.is_dir():
        raise UserError(f"--lpips_weights {folder}: no such folder")
    if not any(_find(folder, backbone) for backbone in BACKBONES.values()):
        raise UserError(f"--lpips_weights {folder} holds neither alexnet*.pth nor vgg16*.pth")


def _load_one(name: str, backbone: str, folder: Path | None) -> nn.Module | str:
    """The network, or the reason (one line) why there is none."""
    asked_for = _find(folder, backbone) if folder is not None else None
    # torchvision's files are named after their checksum: alexnet-owt-7be5be79.pth, vgg16-397923af.pth
    path = asked_for or _find(Path(torch.hub.get_dir()) / "checkpoints", backbone)
    if path is None:
        return (
            f'no {backbone} weights: fetch them once, in this folder, by python -c "from components.perceptual import '
            f"import_torchvision as tv; tv().models.{backbone}(weights='DEFAULT')\", or give --lpips_weights DIR"
        )
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed: pip install lpips"
    try:
        network = _build(name)
    except ImportError as error:
        return f"lpips cannot be imported ({error}): install the versions in requirements.txt"
    try:
        _fill(network, _read_features(path), path)
    except UserError as error:
        if asked_for:
            raise
        return str(error)
    return network


def _find(folder: Path, backbone: str) -> Path | None:
    paths = sorted(folder.glob(f"{backbone}*.pth"))
    # vgg16_bn is another network
    return next((path for path in paths if not path.name.startswith(f"{backbone}_bn")), None)


def _read_features(path: Path) -> dict[str, Tensor]:
    """{"0.weight": ...}: the convolution weights of a backbone's file, by torchvision's index."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "features."
        return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    except Exception as error:  # garbage makes the reader fail in any way at all
        raise UserError(f"{path} is damaged or holds no weights: replace it by torchvision's file") from error


def _build(name: str) -> nn.Module:
    """LPIPS with its linear heads and an untrained backbone, on the CPU, in evaluation mode."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        import_torchvision()
        lpips = importlib.import_module("lpips")
        network = lpips.LPIPS(net=name, version="0.1", pnet_rand=True, verbose=False)
    return network.eval().requires_grad_(False)


@contextmanager
def _quiet():
    """lpips and torchvision warn of their own use of old interfaces, which is nothing to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fill(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy backbone weights into LPIPS's slices, whose layers keep torchvision's index; UserError if they differ."""
    slices = [layers for name, layers in network.net.named_children() if name.startswith("slice")]
    try:
        for layers in slices:
            layers.load_state_dict({key: weights[key] for key in layers.state_dict()})
    except (RuntimeError, KeyError) as error:
        message = f"{path} does not hold the weights that its name says: replace it by torchvision's file"
        raise UserError(message) from error
