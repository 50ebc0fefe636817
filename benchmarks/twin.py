"""lego200 trained by the dense twin in the renderer's place: what the same mathematics takes without packed samples.

    python -m benchmarks.twin --data_folder data --save_dir logtwin

One run of seed 0 (or another --seed) with strategy full, by tests/reference.py's rendering, torch's Adam and all of
torch's threads; everything else, and the evaluations, are the trainer's own. Minutes on a CPU. Writes
benchmarks/results/speed_lego200_dense-twin_cpu.json.
Options it does not know go to the run.
"""

import argparse
import contextlib
import sys

import torch

import train
from benchmarks.lego200 import write_report
from benchmarks.script import exit_code
from components.regularisers import l1_norm
from models import optimizers
from models.field import Field
from opt import parse_options
from tests.reference import dense_render

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
    _, rest = parser.parse_known_args()
    argv = ["--config", "configs/lego200.txt", "--seed", "0", *rest]
    options = parse_options([*argv, "--strategy", "full", "--tag", TAG])
    put_twin_in_place()
    results = train.run(options) | {"kernels": "dense twin"}
    write_report(TAG, [results], prefix="speed_lego200")


if __name__ == "__main__":
    sys.exit(exit_code(main))
