"""Ray samplers: how the pixels of a training step are chosen and weighed. A new one is one file and one line here."""

from collections.abc import Callable

import torch

from components.pixel_sets import PixelSet
from components.types import Sampler, Scene
from samplers.standard import StandardSampler
from utils.errors import OptionError

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "full": StandardSampler,
}


def check_strategy(name: str) -> None:
    """Raises OptionError if no sampler has this name."""
    if name not in SAMPLERS:
        raise OptionError(
            f"--strategy {name} is not implemented in this version; available: {', '.join(sorted(SAMPLERS))}"
        )


def build_sampler(name: str, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> Sampler:
    """The sampler called `name` over the kept pixels of a scene; options: see opt.py; generator: its own stream."""
    check_strategy(name)
    return SAMPLERS[name](scene, kept, options, generator)
