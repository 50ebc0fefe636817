"""The experiments. Uncomment one in `main`, or give options, which are passed on and win:

python run.py --demo                                the built-in scene, no data needed
python run.py --nerf_scene chair --n_iters 5000     another scene of the same data set
python run.py --config configs/flower.txt           another data set
python run.py --multi_data --seeds 3                all scenes found, three seeds each
"""

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from opt import REPOSITORY, parse_options
from utils.errors import OptionError, SceneError, UserError

CONFIG = str(REPOSITORY / "configs/lego.txt")
# Whoever names one of these chooses the scene anew, and CONFIG stays out of it.
CHOOSES_SCENE = ("--config", "--nerf_dataset", "--demo")


def main() -> None:
    """The experiments that `python run.py` runs."""
    run_standard_nerf(use_cuda=0)
    # run_egra_nerf(use_cuda=0)
    # run_soft_nerf(use_cuda=0)
    # run_expansive_nerf(use_cuda=0)


def run_standard_nerf(use_cuda: int = 0) -> None:
    """All pixels alike, in epochs without replacement: what every other strategy is compared with."""
    run_experiment("full", use_cuda)


def run_egra_nerf(use_cuda: int = 0) -> None:
    """EGRA: more rays around the edges of the images."""
    run_experiment("egra", use_cuda)


def run_soft_nerf(use_cuda: int = 0) -> None:
    """Soft mining (arXiv:2312.00075): walkers that move to where the error is."""
    run_experiment("soft", use_cuda)


def run_expansive_nerf(use_cuda: int = 0) -> None:
    """Expansive supervision (arXiv:2409.08056): edge pixels, and a few others that stand for the rest."""
    run_experiment("expansive", use_cuda)


class RunsFailed(Exception):
    """Some of several runs failed; the message lists them, a line each."""


def run_experiment(strategy: str, use_cuda: int) -> None:
    """Run one strategy on every scene and seed that the command line asks for, one after the other.

    use_cuda: index of the CUDA device that `--device auto` means, where there is CUDA. Raises UserError if nothing
    can be run, and what went wrong in a single run; of several runs the others go on, and RunsFailed ends it.
    """
    options = parse_options(compose(strategy, sys.argv[1:]))
    check_ready(options)
    options.device = choose_device(options.device, use_cuda)
    runs = [(scene, options.seed + i) for scene in chosen_scenes(options) for i in range(options.seeds)]
    failures = []
    for scene, seed in runs:
        try:
            run_one(options, scene, seed)
        except Exception as error:
            if len(runs) == 1:
                raise
            failures.append(f"{scene}, seed {seed}: {str(error) or type(error).__name__}")
            report(error, f"{scene}, seed {seed}: ", options.debug)
    if failures:
        raise RunsFailed("\n".join([f"{len(failures)} of {len(runs)} runs failed:", *failures]))


def compose(strategy: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of an experiment: its scene, unless the user chooses another, its strategy, then the user's."""
    named = {argument.partition("=")[0] for argument in arguments}
    scene = [] if named.intersection(CHOOSES_SCENE) else ["--config", CONFIG]
    return [*scene, "--strategy", strategy, *arguments]


def check_ready(options: Namespace) -> None:
    """Raise UserError if the strategy or the data set is not there, before anything is written."""
    from dataLoader import FORMATS
    from samplers import check_strategy

    check_strategy(options.strategy)
    folder = Path(options.data_folder) / FORMATS[options.nerf_dataset].folder
    if options.nerf_dataset != "demo" and not folder.is_dir():
        wanted = options.nerf_scene or "the scenes"
        raise SceneError(
            f"{folder} is not there: data/README.md says where to get {wanted} and where to put it (or --data_folder)\n"
            "to start without any data, train on the built-in scene: python run.py --demo"
        )


def choose_device(name: str, use_cuda: int) -> str:
    """`--device`, with auto resolved to CUDA device `use_cuda` where there is CUDA."""
    import torch

    if name != "auto" or not torch.cuda.is_available():
        return name
    if not 0 <= use_cuda < torch.cuda.device_count():
        raise OptionError(f"use_cuda={use_cuda}: this machine has {torch.cuda.device_count()} CUDA devices, from 0 on")
    return f"cuda:{use_cuda}"


def chosen_scenes(options: Namespace) -> list[str]:
    """The scene of the options, or with --multi_data all that are on disk (the demo has only its own)."""
    from dataLoader import scene_names

    if options.multi_data and options.nerf_dataset != "demo":
        return scene_names(options.nerf_dataset, options.data_folder)
    return [options.nerf_scene]


def run_one(options: Namespace, scene: str, seed: int) -> None:
    """Train one scene with one seed, then bring the data set's table of results up to date."""
    import train
    from utils.tables import write_tables

    train.run(Namespace(**vars(options) | {"nerf_scene": scene, "seed": seed}))
    if not options.render_only:
        write_tables(Path(options.save_dir) / options.up_folder_name / options.nerf_dataset)


def report(error: Exception, prefix: str, debug: bool) -> None:
    """Tell of an error on stderr: one line if it is the user's to mend, with its traceback if it is a bug."""
    if debug or not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"error: {prefix}{error}", file=sys.stderr)


def exit_code(experiments: Callable[[], None]) -> int:
    """Run `experiments`; 0, or 1 if some of several runs failed, 2 for an error to mend, 130 when interrupted."""
    try:
        experiments()
    except UserError as error:
        report(error, "", "--debug" in sys.argv)
        return 2
    except RunsFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
