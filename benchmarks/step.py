"""Time and memory of one training step: every way of computing it beside the dense twin, before and after the mask.

    python -m benchmarks.step            # all variants and all samplers, several minutes on a CPU
    python -m benchmarks.step --quick    # packed and twin in under a minute; writes nothing

Variants: `packed`, the kernels of models/kernels that this machine would choose; `bf16`, the same with --mlp_dtype
bfloat16; `torch`, what a machine without compiler and Triton would choose; `definition`, the same with torch's
grid_sample for lookups; `twin`, the dense tests/reference.py; on CUDA alone `replayed`, packed steps replayed as CUDA
graphs, as training makes them there. Every variant runs in a fresh process, because a process's peak memory includes
all that ran in it before. They alternate, so that a change of load meets all.

This step draws no rays: the four samplers' phase is timed in the trainer's own step (benchmarks/scaling.py, after the
mask); drawing from full-size images, and building a sampler, by benchmarks/samplers.py.

Writes benchmarks/results/step_{device}.json: on a CPU only of the whole measurement, all variants with 4096 rays, which
the README shows; on CUDA always (benchmarks/gpu_check.py reads it), save with --quick. The last line is
`twin/fast before-mask R1 after-mask R2`, the ratios of the median step times.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = ("packed", "bf16", "torch", "definition", "twin")
ON_CUDA = ("replayed",)
COMPARED = ("packed", "twin")
FIELDS = ("before", "after")
PHASES = ("step", "forward", "backward", "optimizer")
RAYS = 4096


def variant_of(name: str, field_name: str, device):
    """(field, optimizer, render) of a variant, in a process that has chosen no kernels yet."""
    import torch

    from benchmarks.fields import after_mask, as_reference, before_mask
    from models.kernels import Kernels, compiled, torch_lookups, torch_rendering
    from models.optimizers import BETAS, make_adam
    from tests.reference import dense_render
    from utils.memory import keep_freed_memory

    if name in ("torch", "definition"):
        compiled.COMPILERS = ()
        sys.modules["triton"] = None  # importing it fails
    field = (before_mask if field_name == "before" else after_mask)(device)
    if name == "twin":
        as_reference(field)
        optimizer = torch.optim.Adam(field.param_groups(0.02, 1e-3), betas=BETAS)
        return field, optimizer, lambda *arguments: dense_render(field, *arguments)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py
    if name == "bf16":
        field.set_mlp_dtype("bfloat16")
    if name == "definition":
        field.kernels = Kernels("torch-definition", torch_lookups, torch_rendering)
    return field, make_adam(field.param_groups(0.02, 1e-3)), field.render


def measure(variant: str, field_name: str, n_rays: int, repeats: int, device_name: str) -> dict:
    """One variant on one field, in this process: milliseconds a step by phase (medians) and memory."""
    import torch

    from benchmarks.fields import camera_rays
    from components.grids import training_samples
    from components.regularisers import L1Density
    from models.kernels import threads
    from utils.device import choose_device
    from utils.memory import MemoryMeter, tensors_mb
    from utils.seeds import make_generator
    from utils.timing import PhaseTimer

    device, twin = choose_device(device_name), variant == "twin"
    if variant == "replayed":
        from benchmarks import replayed_step

        return replayed_step.measure(field_name, n_rays, repeats, device)
    field, optimizer, render = variant_of(variant, field_name, device)
    rays = camera_rays(n_rays, 0, device)
    target = torch.rand(n_rays, 3, generator=torch.Generator().manual_seed(3)).to(device)
    generator = make_generator(0, "jitter", device)
    l1 = L1Density(4e-5)
    n_samples = training_samples(field.grid_size, field.config.step_ratio, 10**6)
    start = {name: p.detach().clone() for name, p in field.named_parameters()}
    memory = MemoryMeter(device)
    memory.start()
    times, counts = [], {}
    with contextlib.nullcontext() if twin else threads.taking_over():
        for repeat in range(repeats + 1):
            timer = PhaseTimer(device)
            clock = time.perf_counter()
            with timer.phase("forward"):
                jitter = field.draw_jitter(n_rays, n_samples, generator)
                out = render(rays, 1.0, jitter, n_samples)
                loss = (out.rgb - target).square().mean() + l1(field, 1.0)
            with timer.phase("backward"):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            with timer.phase("optimizer"):
                optimizer.step()
            timer.collect()
            seconds = time.perf_counter() - clock
            if repeat:  # the first step warms up
                times.append({"step": 1000 * seconds, **timer.ms_per_step(1)})
            n_live = out.n_density if twin else out.n_live
            counts = {"live_per_ray": n_live / n_rays, "colour_per_ray": out.n_colour / n_rays}
            del out, loss
            # Training on noise would change how much work a step is: every step starts from the same field.
            with torch.no_grad():
                for name, p in field.named_parameters():
                    p.copy_(start[name])
    state = [v for values in optimizer.state.values() for v in values.values()]
    memory.close_segment(tensors_mb(state) + (tensors_mb(start.values()) * 2 if device.type == "cuda" else 0.0))
    return {
        "variant": variant,
        "kernels": "dense twin" if twin else field.kernels.name,
        "field": field_name,
        "rays": n_rays,
        "ms": {phase: statistics.median(t[phase] for t in times) for phase in PHASES},
        "step_ms_all": [t["step"] for t in times],
        "step_memory_mb": memory.step_mb(),
        **counts,
    }


def measure_in_fresh_process(variant: str, field_name: str, options: argparse.Namespace) -> dict:
    """The same in a process of its own."""
    from benchmarks.script import result_of

    command = [str(Path(__file__).resolve()), "--variant", variant, "--field", field_name]
    command += ["--rays", str(options.rays), "--repeats", str(options.repeats), "--device", options.device]
    return result_of(command, f"{variant} {field_name}")


def merge(runs: list[dict]) -> dict:
    """Repeated measurements of one variant as one: median times, largest memory."""
    merged = dict(runs[0])
    merged["ms"] = {phase: statistics.median(run["ms"][phase] for run in runs) for phase in runs[0]["ms"]}
    merged["step_ms_all"] = [ms for run in runs for ms in run["step_ms_all"]]
    merged["step_memory_mb"] = max(run["step_memory_mb"] for run in runs)
    return merged


def compare(results: list[dict]) -> dict[str, dict]:
    """Ratios of median step times and of step memory by field: of all variants to packed, and the twin's alone."""
    ratios: dict[str, dict] = {key: {} for key in ("time_over_packed", "memory_over_packed")}
    for field in FIELDS:
        own = {r["variant"]: r for r in results if r["field"] == field}
        packed = own["packed"]
        ratios["time_over_packed"][field] = {v: r["ms"]["step"] / packed["ms"]["step"] for v, r in own.items()}
        ratios["memory_over_packed"][field] = {
            v: r["step_memory_mb"] / packed["step_memory_mb"] for v, r in own.items()
        }
    twin = {
        f"{kind}_ratio_twin_over_packed": {field: ratios[f"{kind}_over_packed"][field]["twin"] for field in FIELDS}
        for kind in ("time", "memory")
    }
    if any(r["variant"] == "replayed" for r in results):
        over = ratios["time_over_packed"]
        twin["time_ratio_twin_over_replayed"] = {f: over[f]["twin"] / over[f]["replayed"] for f in FIELDS}
    return {**twin, **ratios}


def print_results(results: list[dict], ratios: dict[str, dict]) -> None:
    """A table of the variants."""
    print(
        "| field | path | ms a step | to packed | forward | backward | optimizer | step memory MB | to packed |", end=""
    )
    print(" lookups, colours a ray |\n" + 10 * "|---" + "|")
    for r in results:
        time, memory = (ratios[key][r["field"]][r["variant"]] for key in ("time_over_packed", "memory_over_packed"))
        ms = [f"{r['ms'][phase]:.3g}" for phase in PHASES]
        cells = [f"{r['field']} mask", r["variant"], ms[0], f"{time:.2f}", *ms[1:], f"{r['step_memory_mb']:.0f}"]
        per_ray = f"{r['live_per_ray']:.1f}, {r['colour_per_ray']:.1f}"
        print(f"| {' | '.join([*cells, f'{memory:.2f}', per_ray])} |")


def measure_samplers(n_rays: int, device_name: str) -> list[dict]:
    """The phases of the trainer's step with each of the four samplers, printed as a table; a process each."""
    from benchmarks.scaling import BASE, STRATEGIES, measure_in_fresh_process

    print("| strategy | ms a step | sampler | forward | backward | optimizer |\n|---|---|---|---|---|---|")
    rows = []
    for strategy in STRATEGIES:
        point = {**BASE, "axis": "images", "strategy": strategy, "rays": n_rays}
        r = measure_in_fresh_process(point, device_name)
        rows.append({key: r[key] for key in ("strategy", "rays_per_step", "ms")})
        ms = " | ".join(f"{r['ms'][phase]:.3g}" for phase in ("step", "sampler", *PHASES[1:]))
        print(f"| {strategy} | {ms} |", flush=True)
    return rows


def main() -> None:
    from benchmarks.script import positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="packed and twin, few repetitions, no JSON")
    parser.add_argument("--rays", type=positive, default=RAYS, help="others than 4096: no JSON on a CPU")
    parser.add_argument("--repeats", type=positive, default=8, help="timed steps a process")
    parser.add_argument("--rounds", type=positive, default=3, help="processes a variant")
    parser.add_argument("--only", help="some variants: no samplers, no JSON on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", choices=VARIANTS + ON_CUDA, help=argparse.SUPPRESS)
    parser.add_argument("--field", choices=FIELDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.field, options.rays, options.repeats, options.device)))
        return
    import torch

    from utils.device import choose_device, device_name
    from utils.run_folder import git_commit

    device = choose_device(options.device)
    known = VARIANTS + (ON_CUDA if device.type == "cuda" else ())
    variants = tuple(options.only.split(",")) if options.only else known
    if set(variants) - set(known) or set(COMPARED) - set(variants):
        parser.error(f"--only {options.only}: choose among {','.join(known)}; packed and twin are always needed")
    if options.quick:
        options.repeats, options.rounds, variants = 3, 1, COMPARED
    cases = [(variant, field) for field in FIELDS for variant in variants]
    rounds = [[measure_in_fresh_process(*case, options) for case in cases] for _ in range(options.rounds)]
    results = [merge(list(runs)) for runs in zip(*rounds, strict=True)]
    ratios = compare(results)
    print_results(results, ratios)
    samplers = measure_samplers(options.rays, options.device) if variants == known else []
    whole = variants == known and options.rays == RAYS
    if options.quick or (device.type == "cpu" and not whole):
        print("no JSON was written: this is not the whole measurement")
    else:
        report = {
            "device": device_name(device),
            "torch": torch.__version__,
            "commit": git_commit(),
            "batch": options.rays,
            **ratios,
            "results": results,
            "samplers": samplers,
        }
        path = ROOT / "benchmarks" / "results" / f"step_{device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    for kind, words in (("memory", "twin/packed step memory"), ("time", "twin/fast")):
        ratio = ratios[f"{kind}_ratio_twin_over_packed"]
        print(f"{words} before-mask {ratio['before']:.2f} after-mask {ratio['after']:.2f}")
    if "replayed" in variants:
        ratio = ratios["time_ratio_twin_over_replayed"]
        print(f"twin/replayed before-mask {ratio['before']:.2f} after-mask {ratio['after']:.2f}")


if __name__ == "__main__":
    from benchmarks.script import exit_code

    sys.exit(exit_code(main))
