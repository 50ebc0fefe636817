"""How much memory a training step needs, exactly: the peak of torch's own allocations in one step of a run.

    python -m benchmarks.step_memory log200/runs/syn/lego/full/seed0 log200/runs/syn/lego/expansive/seed0

Resident memory, which results.json reports on a CPU, also holds what malloc keeps for later and does not tell small
differences. For each finished run folder this trains anew, with its options, until the first alpha mask and profiles
every fourth step on the way; then it profiles some steps from the run's last checkpoint. Writes
benchmarks/results/step_memory.json: the largest, MB (2^20 bytes) beyond what stays, by run.
"""

import argparse
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The profiler otherwise reports its own stages on the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

EVERY, LAST_STEPS = 4, 5


def peak_of(trainer) -> float:
    """Peak of the allocations, MB, of one step of a trainer whose last gradients are gone; CPU only."""
    from torch.autograd.profiler import profile

    trainer.optimizer.zero_grad(set_to_none=True)
    with profile(profile_memory=True) as profiler:
        trainer.step()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    if not peak:
        raise RuntimeError("the profiler saw no allocation")
    return peak / 2**20


def measure(folder: Path) -> dict:
    """The step memory of a finished run, before its first alpha mask and at its end."""
    import torch

    from components.perceptual import load_perceptual_metrics
    from train import Trainer, load_split
    from utils.checkpoints import latest_checkpoint
    from utils.device import device_name
    from utils.memory import MemoryMeter
    from utils.run_folder import git_commit, read_json

    options = Namespace(**read_json(folder / "args.json"))
    device = torch.device("cpu")
    scenes = {split: load_split(options, split) for split in ("train", "test")}
    perceptual = load_perceptual_metrics(None, device)
    trainer = Trainer(options, folder, device, scenes, perceptual, MemoryMeter(device))
    trainer.begin()
    peaks = []
    while trainer.iteration <= options.update_AlphaMask_list[0]:
        if trainer.iteration % EVERY == EVERY - 1:
            peaks.append(peak_of(trainer))
        else:
            trainer.step()
        trainer.iteration += 1
    report = {"before_mask_mb": max(peaks)}
    trainer.restore(latest_checkpoint(folder))
    trainer.step()  # the first step after loading sets things up
    report |= {"after_mask_mb": max(peak_of(trainer) for _ in range(LAST_STEPS))}
    facts = {"device": device_name(device), "torch": torch.__version__, "commit": git_commit()}
    return {"run": str(Path(*folder.parts[-2:])), **report, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    runs = []
    for folder in parser.parse_args().folders:
        runs.append(measure(folder))
        r = runs[-1]
        print(f"{r['run']}: {r['before_mask_mb']:.1f} MB before the mask, {r['after_mask_mb']:.1f} after it")
    facts = {key: ", ".join(sorted({run[key] for run in runs})) for key in ("device", "torch", "commit")}
    path = ROOT / "benchmarks" / "results" / "step_memory.json"
    path.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    from benchmarks.script import exit_code

    sys.exit(exit_code(main))
