"""How long a training step takes, tried out on a field that is thrown away."""

import time
from dataclasses import replace

import torch

from components.cameras import cast_rays
from components.grids import training_samples
from components.pixel_sets import pixel_batch
from components.types import Scene
from models import field_state, restore_field
from models.field import Field
from models.optimizers import make_adam

REHEARSED_STEPS = 3


def step_seconds(
    field: Field, scene: Scene, batch_size: int, step_ratio: float, max_samples: int, generator: torch.Generator
) -> float:
    """Seconds of a step with `batch_size` rays on a copy of `field`, which stays as it is, and nothing else changes.

    A field without an alpha mask is too thin for colours, which soon take most of the time: there, every sample gets
    one, so that the step is about the dearest of the run.
    """
    field = restore_field(field_state(field), scene.device)
    if field.alpha_mask is None:
        field.config = replace(field.config, weight_threshold=-1.0)
    optimizer = make_adam(field.param_groups(0.0, 0.0))
    n_samples = training_samples(field.grid_size, step_ratio, max_samples)
    for number in range(REHEARSED_STEPS + 1):
        if number == 1:  # the first step pays for what is set up only once
            clock = time.perf_counter()
        index = torch.randint(scene.n_pixels, (batch_size,), generator=generator, device=scene.device)
        pixels = pixel_batch(index, scene.height, scene.width)
        rays = cast_rays(scene, pixels)
        jitter = field.draw_jitter(len(rays), n_samples, generator)
        out = field.render(rays, float(scene.white_background), jitter, n_samples)
        loss = (out.rgb - scene.colors(pixels)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - clock) / REHEARSED_STEPS
