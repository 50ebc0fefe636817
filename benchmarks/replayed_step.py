"""step.py's variant `replayed`: `packed` as training makes it on CUDA, replayed as graphs (models/fixed_steps.py), a
window of steps at a time that nothing waits for."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.fields import after_mask, before_mask, camera_scene
from benchmarks.step import PHASES
from components.cameras import cast_rays
from components.grids import training_samples
from components.regularisers import L1Density
from models.fixed_steps import SEEN, WINDOW, FixedSteps, Record, graph_recorder
from models.optimizers import make_adam
from utils.memory import MemoryMeter, tensors_mb
from utils.seeds import make_generator
from utils.timing import PhaseTimer


def measure(
    field_name: str, n_rays: int, repeats: int, device: torch.device, recorder: Callable[[], Record] = graph_recorder
) -> dict:
    """What step.measure says of a variant, of replayed steps of the same field and rays."""
    field = (before_mask if field_name == "before" else after_mask)(device)
    optimizer = make_adam(field.param_groups(0.02, 1e-3))
    scene, pixels = camera_scene(n_rays, 0, device)
    l1, generator = L1Density(4e-5), make_generator(0, "jitter", device)
    n_samples = training_samples(field.grid_size, field.config.step_ratio, 10**6)
    start = {name: p.detach().clone() for name, p in field.named_parameters()}
    memory = MemoryMeter(device)
    memory.start()

    # A first step by itself, after which the optimiser has its moments and the numbers of samples are known.
    out = field.render(cast_rays(scene, pixels), 1.0, field.draw_jitter(n_rays, n_samples, generator), n_samples)
    (out.rgb.square().mean() + l1(field, 1.0)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    fixed = FixedSteps(recorder)
    for _ in range(SEEN):
        fixed.see(out.n_live, out.n_colour)
    counts = {"live_per_ray": out.n_live / n_rays, "colour_per_ray": out.n_colour / n_rays}
    del out
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.copy_(start[name])
    step = fixed.make(field, scene, optimizer, [l1], pixels=pixels, n_samples=n_samples)
    memory.unseen_mb = step.replayed_mb
    step.weight.fill_(1.0)
    times = []
    for repeat in range(repeats + 1):
        step.stopped.zero_()
        timer, clock = PhaseTimer(device), time.perf_counter()
        for _ in range(WINDOW):
            with timer.phase("forward"):
                step.give(pixels, 1.0, generator)
                step.show()
            with timer.phase("backward"):
                step.set_penalty_weights()
                step.learn()
            with timer.phase("optimizer"):
                # Training on noise would change how much work a step is: all is done, but nothing moves.
                step.set_rates([0.0 for _ in optimizer.param_groups])
                step.update()
        timer.collect()
        if step.stopped.item():
            raise RuntimeError(f"{step.needs.tolist()} samples, room for {step.capacity}: updates were skipped")
        if repeat:  # the first window warms up
            ms = 1000 * (time.perf_counter() - clock) / WINDOW
            times.append({"step": ms, **timer.ms_per_step(WINDOW)})
    state = [v for values in optimizer.state.values() for v in values.values()]
    pictures = tensors_mb([scene.images])
    memory.close_segment(tensors_mb(state) + tensors_mb(start.values()) * 2 + pictures)
    return {
        "variant": "replayed",
        "kernels": f"{field.kernels.name}, CUDA graphs",
        "field": field_name,
        "rays": n_rays,
        "ms": {phase: statistics.median(t[phase] for t in times) for phase in PHASES},
        "step_ms_all": [t["step"] for t in times],
        "step_memory_mb": memory.step_mb(),
        **counts,
    }
