"""lego200 trained by the dense twin in the renderer's place: what the same mathematics takes without packed samples.

    python -m benchmarks.twin --data_folder data --save_dir logtwin --seeds 3

Runs of strategy full, seed 0 and so on (or one of another --seed), by tests/reference.py's rendering, torch's Adam and
all of torch's threads; everything else, and the evaluations, are the trainer's own. Each has a process of its own,
minutes on a CPU; with --save_dir, those that are finished there are not repeated. Writes
benchmarks/results/speed_lego200_dense-twin_cpu.json.
Options it does not know go to the run.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import train
from benchmarks.lego200 import write_report
from benchmarks.script import exit_code, positive, require_own_seeds
from components.regularisers import l1_norm
from models import optimizers
from models.field import Field
from opt import parse_options
from tests.reference import dense_render
from utils.run_folder import read_json

ROOT = Path(__file__).resolve().parent.parent
TAG = "dense-twin"


def plain_adam(groups: list[dict]) -> torch.optim.Adam:
    """torch's Adam; the factors lie in memory as the reference has them."""
    for parameter in (p for group in groups for p in group["params"]):
        parameter.data = parameter.data.contiguous()
    return torch.optim.Adam(groups, betas=optimizers.BETAS)


def put_twin_in_place() -> None:
    """From now on this process trains with the dense twin."""
    packed = Field.render

    def render(field, rays, background, jitter=None, n_samples=None):
        if not torch.is_grad_enabled():
            return packed(field, rays, background, jitter, n_samples)
        out = dense_render(field, rays, background, jitter, n_samples)
        out.n_live = out.n_density  # as the trainer names it
        return out

    Field.render = render
    Field.density_l1 = lambda field: l1_norm(*field.density_factors())
    train.make_adam = optimizers.make_adam = plain_adam
    train.threads.taking_over = contextlib.nullcontext
    train.keep_freed_memory = lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    if own.one:
        put_twin_in_place()
        train.run(parse_options(rest))
        return
    require_own_seeds(parser, own.seeds, rest)
    runs = []
    with tempfile.TemporaryDirectory(prefix="logtwin_") as temporary:
        for seed in range(own.seeds):
            argv = ["--config", "configs/lego200.txt", "--save_dir", temporary, "--seed", str(seed), *rest]
            runs.append(trained([*argv, "--strategy", "full", "--tag", TAG]))
    write_report(TAG, runs, prefix="speed_lego200")


def trained(argv: list[str]) -> dict:
    """results.json of a run by the twin in a process of its own."""
    o = parse_options(argv)
    folder = train.run_folder(o.save_dir, o.up_folder_name, o.nerf_dataset, o.nerf_scene, o.tag, o.seed)
    done = subprocess.run([sys.executable, "-m", "benchmarks.twin", "--one", *argv], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return read_json(folder / "results.json") | {"kernels": "dense twin"}


if __name__ == "__main__":
    sys.exit(exit_code(main))
