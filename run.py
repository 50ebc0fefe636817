"""The experiments. Uncomment one in `main`, or give options, which are passed on and win:

python run.py --demo                                the built-in scene, no data needed
python run.py --nerf_scene chair --n_iters 5000     another scene of the same data set
python run.py --config configs/flower.txt           another data set
python run.py --multi_data --seeds 3                all scenes found, three seeds each
python run.py --compare --seeds 3                   all four strategies, then tables and figures side by side
python run.py --strategies full,expansive:es_ratio=0.5   strategies with settings of their own
"""

import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

from opt import REPOSITORY, parse_options
from utils.errors import OptionError, SceneError, UserError
from utils.signals import PREEMPTED_EXIT_CODE, Preempted
from utils.variants import Variant, parse_variants

CONFIG = str(REPOSITORY / "configs/lego.txt")
STRATEGIES = "full,egra,soft,expansive"
EXPANSIVE_ONLY = frozenset(
    ["es_ratio", "es_beta_a", "es_search", "es_normalize", "lamda_a", "lamda_s", "a_s_add", "use_mse", "batch_size"]
)
# Whoever names one of these chooses the scene anew, and CONFIG stays out of it.
CHOOSES_SCENE = ("--config", "--nerf_dataset", "--demo")


def main() -> None:
    """The experiments that `python run.py` runs."""
    run_standard_nerf(use_cuda=0)
    # run_egra_nerf(use_cuda=0)
    # run_soft_nerf(use_cuda=0)
    # run_expansive_nerf(use_cuda=0)
    # compare_strategies(use_cuda=0)


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


def compare_strategies(use_cuda: int = 0) -> None:
    """All four, one after another, and a comparison (`--strategies` chooses others)."""
    run_experiment("full", use_cuda, "--compare")


class RunsFailed(Exception):
    """Some of several runs failed; the message lists them, a line each."""


def run_experiment(strategy: str, use_cuda: int, *extra: str) -> None:
    """Run one strategy, or those of `--strategies`, on every scene and seed of the command line, one after the other.

    use_cuda: index of the CUDA device that `--device auto` means, where there is CUDA. extra: arguments before the
    user's. Raises UserError if nothing can be run, and what went wrong in a single run; of several runs the others
    go on, and RunsFailed ends it.
    """
    plan = planned_runs(compose(strategy, [*extra, *sys.argv[1:]]), use_cuda)
    if plan and plan[0].check_only:
        return check_scenes(plan)
    failures = []
    for options in plan:
        name = f"{options.nerf_scene}, {options.tag}, seed {options.seed}"
        try:
            run_one(options, isolated=options.compare)
        except Exception as error:
            if len(plan) == 1:
                raise
            failures.append(f"{name}: {str(error) or type(error).__name__}")
            report(error, f"{name}: ", options.debug)
    for scene in dict.fromkeys(options.nerf_scene for options in plan if options.compare):
        tell_comparison(plan[0], scene)
    if failures:
        raise RunsFailed("\n".join([f"{len(failures)} of {len(plan)} runs failed:", *failures]))


def planned_runs(arguments: Sequence[str], use_cuda: int) -> list[Namespace]:
    """The options of every run that a command line asks for. Raises UserError for what can be known to be wrong."""
    chosen = [parse_options(arguments)]
    if chosen[0].compare or chosen[0].strategies:
        chosen = [parse_options([*arguments, *more]) for more in variant_arguments(chosen[0], arguments)]
    for options in chosen:
        options.device = choose_device(options.device, use_cuda)
    if not all(is_finished(options) for options in chosen):
        for options in chosen:
            check_ready(options)
    scenes = chosen_scenes(chosen[0])
    return [
        Namespace(**vars(options) | {"nerf_scene": scene, "seed": seed})
        for scene in scenes
        for seed in range(chosen[0].seed, chosen[0].seed + chosen[0].seeds)
        for options in chosen
    ]


def variant_arguments(options: Namespace, arguments: Sequence[str]) -> list[list[str]]:
    """What each entry of `--strategies` adds to the command line, its tag included.

    In a comparison, expansive supervision with fewer rays is set beside the standard sampler with as few.
    """
    if any(argument.partition("=")[0] == "--tag" for argument in arguments):
        raise OptionError("--tag: several strategies cannot share one; delete it, each is named after its settings")
    variants = parse_variants(options.strategies or STRATEGIES)
    if options.compare:
        for variant, resolved in [(v, parse_options([*arguments, *v.arguments])) for v in tuple(variants)]:
            if resolved.strategy == "expansive" and resolved.es_ratio < 1:
                n_rays = max(int(resolved.es_ratio * resolved.batch_size), 1)
                # Whatever else the entry changes, its control changes too.
                others = [change for change in variant.changes if change[0] not in EXPANSIVE_ONLY]
                control = Variant("full", (*others, ("batch_size", str(n_rays))))
                if control not in variants:
                    variants.append(control)
    cp = ["_cp" if options.model_name == "TensorCP" else ""] * len(variants)
    return [[*v.arguments, "--tag", v.tag + suffix] for v, suffix in zip(variants, cp, strict=True)]


def is_finished(options: Namespace) -> bool:
    """Whether all seeds of a scene are finished, so that nothing needs its data."""
    from utils.run_folder import run_folder

    place = (options.save_dir, options.up_folder_name, options.nerf_dataset, options.nerf_scene or "-", options.tag)
    seeds = range(options.seed, options.seed + options.seeds)
    finished = all((run_folder(*place, seed) / "results.json").exists() for seed in seeds)
    return finished and not (options.overwrite or options.render_only or options.multi_data)


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


def check_scenes(plan: Sequence[Namespace]) -> None:
    """With --check_only: say of every scene of the plan what there is and all that is wrong. Raises SceneError, after
    all of them, if any has problems."""
    import train

    # A scene's seeds and strategies share its data; what a strategy's own settings ask for is looked at for each.
    first_seed = [options for options in plan if options.seed == plan[0].seed]
    lines = {(o.nerf_dataset, o.nerf_scene): {} for o in first_seed}
    faulty = set()
    for options in first_seed:
        scene = options.nerf_dataset, options.nerf_scene
        told, problems = train.check_lines(options)
        lines[scene] |= dict.fromkeys(told)
        if problems:
            faulty.add(scene)
    for (dataset, name), told in lines.items():
        print("\n  ".join([f"{dataset}/{name}: {'problems' if (dataset, name) in faulty else 'good'}", *told]))
    if faulty:
        raise SceneError(f"{len(faulty)} of {len(lines)} scenes have problems, see above")


def run_one(options: Namespace, isolated: bool = False) -> None:
    """Train one run, then bring the data set's tables, and the comparison if there is one, up to date.

    isolated: in a process of its own; what one run leaves behind in a process would else be hidden in the peak
    memory of the next.
    """
    (train_isolated if isolated else train_one)(options)
    if not options.render_only:
        from utils.tables import write_tables

        folder = Path(options.save_dir) / options.up_folder_name / options.nerf_dataset
        write_tables(folder)
        if options.compare:
            from utils.comparison import write_comparison

            write_comparison(folder / options.nerf_scene)


def train_one(options: Namespace) -> None:
    """Train (or render) as the options say, in this process."""
    import train

    train.run(options)


def train_isolated(options: Namespace) -> None:
    """The same in a process of its own; what it raises is raised."""
    # spawn: a fork would inherit the parent's threads in whatever state they are.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        pool.submit(train_one, options).result()


def end_with_parent() -> None:
    """In a child process: end it when its parent is gone, killed perhaps; nobody else would."""

    def watch() -> None:
        wait([parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def tell_comparison(options: Namespace, scene: str) -> None:
    """Say where a scene's comparison lies."""
    from utils.comparison import FOLDER

    folder = Path(options.save_dir) / options.up_folder_name / options.nerf_dataset / scene / FOLDER
    if folder.is_dir():
        print(f"comparison: {folder} (overview.png, table.md, table.csv, figures)")


def report(error: Exception, prefix: str, debug: bool) -> None:
    """Tell of an error on stderr: one line if it is the user's to mend, with its traceback if it is a bug."""
    if debug or not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"error: {prefix}{error}", file=sys.stderr)


def exit_code(experiments: Callable[[], None]) -> int:
    """Run `experiments`; 0, or 1 if some of several runs failed, 2 for an error to mend, 75 when asked to stop with all
    work saved, 130 when interrupted."""
    try:
        experiments()
    except UserError as error:
        report(error, "", "--debug" in sys.argv)
        return 2
    except RunsFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
