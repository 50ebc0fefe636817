"""Time and memory of one training step: the packed path beside the dense twin, before and after the alpha mask.

    python -m benchmarks.step            # all variants, several minutes on a CPU
    python -m benchmarks.step --quick    # under a minute

Every variant runs in a fresh process, because a process's peak memory includes all that ran in it before. The two
sides alternate, so that a change of the machine's load meets both. Writes benchmarks/results/step_{device}.json;
the last line is `twin/fast before-mask R1 after-mask R2`, the ratios of the median step times.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("packed", "twin")
FIELDS = ("before", "after")


def measure(variant: str, field_name: str, n_rays: int, repeats: int, device_name: str) -> dict:
    """One variant on one field, in this process: milliseconds a step by phase (medians) and memory."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.fields import after_mask, before_mask, camera_rays
    from components.grids import training_samples
    from components.regularisers import L1Density
    from models.kernels import threads
    from models.optimizers import make_adam
    from tests.reference import dense_render
    from utils.memory import MemoryMeter, keep_freed_memory, tensors_mb
    from utils.seeds import make_generator
    from utils.timing import PhaseTimer

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py; both sides
    field = (before_mask if field_name == "before" else after_mask)(device)
    rays = camera_rays(n_rays, 0, device)
    target = torch.rand(n_rays, 3, generator=torch.Generator().manual_seed(3)).to(device)
    generator = make_generator(0, "jitter", device)
    l1 = L1Density(4e-5)
    n_samples = training_samples(field.grid_size, field.config.step_ratio, 10**6)
    if variant == "packed":
        if device.type == "cpu":
            keep_freed_memory()  # as train.py
        optimizer, render = make_adam(field.param_groups(0.02, 1e-3)), field.render
    else:
        for parameter in field.parameters():  # the reference's layout
            parameter.data = parameter.data.contiguous()
        optimizer = torch.optim.Adam(field.param_groups(0.02, 1e-3), betas=(0.9, 0.99))

        def render(*arguments):
            return dense_render(field, *arguments)

    start = {name: p.detach().clone() for name, p in field.named_parameters()}
    memory = MemoryMeter(device)
    memory.start()
    times, counts = [], {}
    takeover = threads.taking_over() if variant == "packed" else contextlib.nullcontext()
    with takeover:
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
            n_live = out.n_live if variant == "packed" else out.n_density
            counts = {"live_per_ray": n_live / n_rays, "colour_per_ray": out.n_colour / n_rays}
            del out, loss
            # Training on noise would change how much work a step is: every step starts from the same field.
            with torch.no_grad():
                for name, p in field.named_parameters():
                    p.copy_(start[name])
    state = [v for values in optimizer.state.values() for v in values.values()]
    memory.close_segment(tensors_mb(state) + (tensors_mb(start.values()) * 2 if device.type == "cuda" else 0.0))
    phases = ("step", "forward", "backward", "optimizer")
    return {
        "variant": variant,
        "field": field_name,
        "rays": n_rays,
        "ms": {phase: statistics.median(t[phase] for t in times) for phase in phases},
        "step_ms_all": [t["step"] for t in times],
        "step_memory_mb": memory.step_mb(),
        **counts,
    }


def measure_in_fresh_process(variant: str, field_name: str, options: argparse.Namespace) -> dict:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--variant", variant, "--field", field_name]
    command += ["--rays", str(options.rays), "--repeats", str(options.repeats), "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{variant} {field_name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def merge(runs: list[dict]) -> dict:
    """Repeated measurements of one variant as one: median times, largest memory."""
    merged = dict(runs[0])
    merged["ms"] = {phase: statistics.median(run["ms"][phase] for run in runs) for phase in runs[0]["ms"]}
    merged["step_ms_all"] = [ms for run in runs for ms in run["step_ms_all"]]
    merged["step_memory_mb"] = max(run["step_memory_mb"] for run in runs)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, no JSON")
    parser.add_argument("--rays", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=8, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--field", choices=FIELDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.field, options.rays, options.repeats, options.device)))
        return
    if options.quick:
        options.repeats, options.rounds = 3, 1
    sys.path.insert(0, str(ROOT))
    import torch

    from utils.device import device_name
    from utils.run_folder import git_commit

    cases = [(variant, field) for field in FIELDS for variant in VARIANTS]
    rounds = [[measure_in_fresh_process(*case, options) for case in cases] for _ in range(options.rounds)]
    results = [merge(list(runs)) for runs in zip(*rounds, strict=True)]
    by_case = {(r["variant"], r["field"]): r for r in results}
    ratios, memory = {}, {}
    print("| field | path | ms a step | forward | backward | optimizer | step memory MB | lookups, colours a ray |")
    print("|---|---|---|---|---|---|---|---|")
    for field in FIELDS:
        for variant in VARIANTS:
            r = by_case[variant, field]
            ms = " | ".join(f"{r['ms'][p]:.3g}" for p in ("step", "forward", "backward", "optimizer"))
            per_ray = f"{r['live_per_ray']:.1f}, {r['colour_per_ray']:.1f}"
            print(f"| {field} mask | {variant} | {ms} | {r['step_memory_mb']:.0f} | {per_ray} |")
        twin, packed = by_case["twin", field], by_case["packed", field]
        ratios[field] = twin["ms"]["step"] / packed["ms"]["step"]
        memory[field] = twin["step_memory_mb"] / packed["step_memory_mb"]
    if not options.quick:
        device = torch.device(options.device)
        report = {
            "device": device_name(device),
            "torch": torch.__version__,
            "commit": git_commit(),
            "batch": options.rays,
            "time_ratio_twin_over_packed": ratios,
            "memory_ratio_twin_over_packed": memory,
            "results": results,
        }
        path = ROOT / "benchmarks" / "results" / f"step_{device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"twin/packed step memory before-mask {memory['before']:.2f} after-mask {memory['after']:.2f}")
    print(f"twin/fast before-mask {ratios['before']:.2f} after-mask {ratios['after']:.2f}")


if __name__ == "__main__":
    main()
