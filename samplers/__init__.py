"""Ray samplers: how the pixels of a training step are chosen and weighed. A new one is one file and one line here."""

from collections.abc import Callable

import torch

from components.pixel_sets import PixelSet
from components.types import Sampler, Scene
from samplers.egra import EgraSampler
from samplers.expansive import ExpansiveSampler
from samplers.soft_mining import SoftMiningSampler
from samplers.standard import StandardSampler
from utils.errors import OptionError

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "full": StandardSampler,
    "egra": EgraSampler,
    "soft": SoftMiningSampler,
    "expansive": ExpansiveSampler,
}


def check_strategy(name: str) -> None:
    """Raises OptionError if no sampler has this name."""
    if name not in SAMPLERS:
        raise OptionError(f"--strategy {name}: no sampler has this name; available: {', '.join(sorted(SAMPLERS))}")


def build_sampler(name: str, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> Sampler:
    """The sampler called `name` over the kept pixels of a scene; options: see opt.py; generator: its own stream."""
    check_strategy(name)
    return SAMPLERS[name](scene, kept, options, generator)
