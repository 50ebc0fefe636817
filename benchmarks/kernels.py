"""Time of each kernel, Triton's beside torch's, forward and backward, on the fields of benchmarks/fields.py.

    python -m benchmarks.kernels --device cuda

Medians of CUDA events (of marching, which waits for the device, launches and all); the last line is JSON. GB/s count
the bytes that a kernel asks for (10^9 a second): rows of the factors as often as they are read or added to, mostly
from the caches, so that more than the memory's bandwidth is no fault. `before` has no colours yet: every 20th live
sample stands for them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.fields import after_mask, before_mask, camera_rays
from benchmarks.script import exit_code, positive
from components.grids import training_samples
from models import kernels
from models.chunks import in_chunks
from models.field import Field
from models.kernels import gather_lookups, torch_rendering
from utils.device import choose_device

FIELDS = {"before": before_mask, "after": after_mask}
WARM_UP = 3


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call on the device."""
    times = []
    for repeat in range(WARM_UP + repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead: launching is not timed
            start.record()
            call()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            clock = time.perf_counter()
            call()
            elapsed = 1000.0 * (time.perf_counter() - clock)
        if repeat >= WARM_UP:
            times.append(elapsed)
    return statistics.median(times)


def cases(field: Field, n_rays: int, device: torch.device) -> dict[str, tuple]:
    """By kernel: (function of a backend that returns differentiable outputs, what they are differentiated by, bytes
    asked for forward, bytes backward)."""
    c, rays = field.config, camera_rays(n_rays, 0, device)
    jitter = field.draw_jitter(n_rays, 1, torch.Generator(device).manual_seed(0))
    n_samples = training_samples(field.grid_size, c.step_ratio, 10**6)
    march = (rays, field.aabb, c.near, c.far, field.step, n_samples, jitter, field.alpha_mask)
    activation = (c.density_activation, c.density_shift, c.distance_scale)
    samples = torch_rendering.march_box(*march)
    (planes, lines), (app_planes, app_lines) = field.density_factors(), field.appearance_factors()
    basis = field.basis_mat.weight
    feature = gather_lookups.vm_density(planes, lines, samples.position).detach().requires_grad_()
    weights = torch_rendering.ray_weights(feature, samples, *activation).detach().requires_grad_()
    coloured = (weights > c.weight_threshold).nonzero()[:, 0]
    if not len(coloured):
        coloured = torch.arange(0, len(samples), 20, device=device)
    position = samples.position[coloured]
    colour = torch.rand(len(coloured), 3, device=device).requires_grad_()
    n, m = len(samples), len(coloured)
    # A point reads 4 rows of each plane and 2 of each line; backward reads them again and adds to as many.
    density_rows, appearance_rows = (6 * 4 * sum(counts) for counts in (c.n_density, c.n_appearance))
    features = 4 * c.n_features

    def until_opaque(backend: kernels.Kernels) -> Tensor:
        with torch.no_grad():
            if backend.weights_until_opaque is not None:
                return backend.weights_until_opaque(planes, lines, samples, *activation)
            found = backend.lookups.vm_density(planes, lines, samples.position)
            return backend.rendering.ray_weights(found, samples, *activation)

    module, ray = field.renderModule, samples.ray[coloured]
    inputs = torch.rand(m, c.n_features, device=device).requires_grad_()

    def network(backend: kernels.Kernels) -> Tensor:
        if backend.network is not None and backend.network.takes(module, inputs, rays.directions):
            return backend.network.colours(module, inputs, rays.directions, ray, None)
        return in_chunks(module, 1 << 17, inputs, rays.directions[ray], position)

    return {
        "march": (lambda b: b.rendering.march_box(*march).t, None, 28 * n, 0),
        "density": (
            lambda b: b.lookups.vm_density(planes, lines, samples.position),
            [*planes, *lines],
            n * (density_rows + 16),
            n * (2 * density_rows + 16),
        ),
        "weights": (lambda b: b.rendering.ray_weights(feature, samples, *activation), [feature], 16 * n, 20 * n),
        "appearance": (
            lambda b: b.lookups.vm_appearance(app_planes, app_lines, basis, position),
            [*app_planes, *app_lines, basis],
            m * (appearance_rows + 12 + features),
            m * (2 * appearance_rows + 12 + features),
        ),
        "network": (
            network,
            [inputs, *module.parameters()],
            m * (features + 32),
            m * (2 * features + 44),
        ),
        "composite": (
            lambda b: b.rendering.composite(weights, samples, coloured, colour)[0],
            [weights, colour],
            8 * n + 24 * m,
            12 * n + 52 * m,
        ),
        "until_opaque": (until_opaque, None, n * (density_rows + 16), 0),
    }


def measure(field_name: str, device: torch.device, n_rays: int, repeats: int) -> dict:
    """By kernel and backend: ms and GB/s, forward and backward."""
    field = FIELDS[field_name](device)
    torches = kernels.Kernels("torch-gather", gather_lookups, torch_rendering)
    report: dict[str, dict] = {}
    for name, (call, leaves, bytes_forward, bytes_backward) in cases(field, n_rays, device).items():
        report[name] = {}
        for backend in dict.fromkeys((kernels.select(device), torches)):
            ms = milliseconds(lambda call=call, backend=backend: call(backend), device, repeats)
            times = {"forward_ms": ms, "forward_gb_s": bytes_forward / ms / 1e6}
            if leaves:
                out = call(backend)
                upstream = torch.rand_like(out)
                ms = milliseconds(
                    lambda out=out, leaves=leaves, upstream=upstream: torch.autograd.grad(
                        out, leaves, upstream, retain_graph=True
                    ),
                    device,
                    repeats,
                )
                times |= {"backward_ms": ms, "backward_gb_s": bytes_backward / ms / 1e6}
            report[name][backend.name] = times
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rays", type=positive, default=4096)
    parser.add_argument("--repeats", type=positive, default=30)
    options = parser.parse_args()
    device, report = choose_device(options.device), {}
    for field_name in FIELDS:
        report[field_name] = measure(field_name, device, options.rays, options.repeats)
        print(f"| {field_name} mask | backend | forward ms | GB/s | backward ms | GB/s |")
        print("|---|---|---|---|---|---|")
        for name, backends in report[field_name].items():
            for backend, t in backends.items():
                back = f"{t['backward_ms']:.3f} | {t['backward_gb_s']:.0f}" if "backward_ms" in t else "- | -"
                print(f"| {name} | {backend} | {t['forward_ms']:.3f} | {t['forward_gb_s']:.0f} | {back} |")
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
