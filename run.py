"""The experiments. Uncomment one in `main`, or give options, which are passed on and win:

python run.py --demo                                the built-in scene, no data needed
python run.py --nerf_scene chair --n_iters 5000     another scene of the same data set
python run.py --config configs/flower.txt           another data set
python run.py --multi_data --seeds 3                all scenes found, three seeds each
python run.py --compare --seeds 3                   all four strategies, then tables and figures side by side
python run.py --strategies full,expansive:es_ratio=0.5   strategies with settings of their own
"""

import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from opt import OPTIONS, REPOSITORY, RUN_IDENTITY_EXEMPT, parse_options, resolved_dict
from utils.errors import OptionError, RunLockedError, RunsFailed, RunsLeft, SceneError, UserError, printable
from utils.signals import PREEMPTED_EXIT_CODE, Preempted, stop_if_asked, stop_requests
from utils.variants import Variant, parse_variants

CONFIG = str(REPOSITORY / "configs/lego.txt")
STRATEGIES = "full,egra,soft,expansive"
EXPANSIVE_ONLY = frozenset(
    ["es_ratio", "es_beta_a", "es_search", "es_normalize", "lamda_a", "lamda_s", "a_s_add", "use_mse", "batch_size"]
)
# Whoever names one of these chooses the scene anew, and CONFIG stays out of it.
CHOOSES_SCENE = ("--config", "--nerf_dataset", "--datasets", "--demo")
# How a launcher starts a run in a process of its own; the name of the run follows, for who looks at the process.
JOB_FLAG = "--job"
JOB_COMMAND = (sys.executable, str(REPOSITORY / "run.py"), JOB_FLAG)


def main() -> None:
    """The experiments that `python run.py` runs."""
    run_standard_nerf(use_cuda=0)
    # run_egra_nerf(use_cuda=0)
    # run_soft_nerf(use_cuda=0)
    # run_expansive_nerf(use_cuda=0)
    # compare_strategies(use_cuda=0)
    # run_all_scenes(use_cuda=0)
    # run_everything(use_cuda=0)


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


def run_all_scenes(use_cuda: int = 0) -> None:
    """Every scene found of the data set with all four strategies."""
    run_experiment("full", use_cuda, "--multi_data", "--strategies", STRATEGIES)


def run_everything(use_cuda: int = 0) -> None:
    """Every scene found of the published data sets, all four strategies, three seeds each: a week."""
    run_experiment("full", use_cuda, "--config", "configs/cluster/week.txt")


def run_experiment(strategy: str, use_cuda: int, *extra: str) -> None:
    """Run one strategy, or those of `--strategies`, on every data set, scene and seed of the command line.

    use_cuda: index of the CUDA device that `--device auto` means, where there is CUDA. extra: arguments before the
    user's. A single run is trained in this process, several in processes of their own. Raises UserError if nothing
    can be run, and what went wrong in a single run; of several the others go on, and RunsFailed ends it.
    """
    arguments = compose(strategy, [*extra, *sys.argv[1:]])
    chosen = parse_options(arguments)
    if chosen.check_only:
        absent: list[str] = []
        return check_scenes(planned_runs(arguments, use_cuda, absent), absent)
    plan = planned_runs(arguments, use_cuda)
    several = any(getattr(chosen, name) for name in ("compare", "dry_run", "shard", "gpus"))
    if len(plan) == 1 and not several and chosen.launcher == "local":
        return run_one(plan[0])
    return run_several(plan, chosen)


def run_several(runs: Sequence[Namespace], chosen: Namespace) -> None:
    """The runs of a sweep that are not finished yet, or with --dry_run only its plan; then its tables.

    chosen: the options of the command line, which say how the sweep is carried out.
    """
    from utils.jobs import plan_lines, plan_runs, shard_of

    jobs = [job_of(options, chosen.retry_failed) for options in runs]
    plan = plan_runs(shard_of(jobs, chosen.shard or "0/1"), RUN_IDENTITY_EXEMPT)
    if chosen.dry_run:
        print("\n".join(plan_lines(plan)))
        return
    from utils.reports import tell_comparison, update_tables
    from utils.resources import folder_fault
    from utils.sweep import carry_out

    stop_if_asked()
    fault = folder_fault(Path(chosen.save_dir))
    if fault:  # once, not a run each
        raise OptionError(f"--save_dir {chosen.save_dir}: {fault}; choose a folder that can be written")
    fresh: set[tuple[str, str]] = set()

    def update(job) -> None:
        if not chosen.render_only:
            update_tables(job.options, chosen.compare)
            fresh.add((job.options["nerf_dataset"], job.options["nerf_scene"]))

    failures = None
    try:
        carry_out(plan, make_launcher(chosen), update)
    except RunsFailed as error:
        failures = error
    # What an earlier sweep finished may lack tables, or lie beside older ones.
    scenes = {(job.options["nerf_dataset"], job.options["nerf_scene"]): job for job in jobs}
    trouble = None
    for scene, job in scenes.items():
        try:
            if scene not in fresh:
                update(job)
            if chosen.compare:
                tell_comparison(job.options)
        except (UserError, OSError) as error:
            trouble = error
    if failures:
        if trouble:
            print(f"error: {trouble}", file=sys.stderr)
        raise failures
    if trouble:
        raise trouble


def job_of(options: Namespace, retry: bool = False):
    """The job of a run; its options say nothing about the sweep that it belongs to."""
    from utils.jobs import Job

    own = resolved_dict(options) | {option.name: option.default for option in OPTIONS["several runs"]}
    folder = run_folder_of(options)
    return Job("/".join(folder.parts[-4:]), folder, own, retry)


def make_launcher(chosen: Namespace):
    """What carries out the runs of a sweep. Raises OptionError if the command line asks for what is not there."""
    if chosen.launcher == "ray":
        from utils.ray_launcher import RayLauncher

        return RayLauncher(JOB_COMMAND)
    from utils.launchers import LocalLauncher, local_slots

    n_devices = 0
    if chosen.gpus:
        import torch

        n_devices = torch.cuda.device_count()
    return LocalLauncher(JOB_COMMAND, local_slots(chosen.gpus, chosen.jobs, n_devices))


def planned_runs(arguments: Sequence[str], use_cuda: int, absent: list[str] | None = None) -> list[Namespace]:
    """The options of every run that a command line asks for. Raises UserError for what can be known to be wrong.

    absent: takes what is wrong with those of --datasets that are not there, which otherwise is an error.
    """
    datasets = parse_options(arguments).datasets
    if not datasets:
        return dataset_runs(arguments, use_cuda)
    one = ("--datasets", "None", "--multi_data", "--nerf_dataset")
    plan, there, missing = [], [], []
    for name in datasets:
        try:
            plan += dataset_runs([*arguments, *one, name], use_cuda)
            there.append(name)
        except SceneError as error:
            missing.append(str(error))
    if missing and absent is None:
        hint = f"\nor name those you have: --datasets {','.join(there)}" if there else ""
        raise SceneError("\n".join(missing) + hint)
    if absent is not None:
        absent += missing
    return plan


def dataset_runs(arguments: Sequence[str], use_cuda: int) -> list[Namespace]:
    """The same within one data set."""
    chosen = [parse_options(arguments)]
    if chosen[0].compare or chosen[0].strategies:
        chosen = [parse_options([*arguments, *more]) for more in variant_arguments(chosen[0], arguments)]
    for options in chosen:
        if options.launcher == "local":  # Ray's machines are not this one
            options.device = "cuda:0" if options.gpus else choose_device(options.device, use_cuda)
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
    if options.overwrite or options.render_only or options.multi_data:
        return False
    seeds = range(options.seed, options.seed + options.seeds)
    runs = [Namespace(**vars(options) | {"nerf_scene": options.nerf_scene or "-", "seed": seed}) for seed in seeds]
    return all((run_folder_of(run) / "results.json").exists() for run in runs)


def run_folder_of(options: Namespace) -> Path:
    """Where a run lies."""
    from utils.run_folder import run_folder

    o = options
    return run_folder(o.save_dir, o.up_folder_name, o.nerf_dataset, o.nerf_scene, o.tag, o.seed)


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
        wanted = options.nerf_scene or "its scenes"
        message = f"{folder} is not there: data/README.md says where to get {wanted} and where to put it"
        hint = "\nto start without any data, train on the built-in scene: python run.py --demo"
        raise SceneError(f"{message} (or --data_folder){'' if options.multi_data else hint}")


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


def check_scenes(plan: Sequence[Namespace], absent: Sequence[str]) -> None:
    """With --check_only: say of every scene of the plan what there is and all that is wrong. Raises SceneError, after
    all of them, if any has problems or a data set is not there (absent: lines that say so)."""
    import train
    from components.perceptual import weights_line

    # A scene's seeds and strategies share its data; what a strategy's own settings ask for is looked at for each.
    first_seed = [options for options in plan if options.seed == plan[0].seed]
    lines = {(o.nerf_dataset, o.nerf_scene): {} for o in first_seed}
    faulty = set()
    for options in first_seed:
        stop_if_asked()
        scene = options.nerf_dataset, options.nerf_scene
        told, problems = train.check_lines(options, run_folder_of(options))
        lines[scene] |= dict.fromkeys(told)
        if problems:
            faulty.add(scene)
    for (dataset, name), told in lines.items():
        print("\n  ".join([f"{dataset}/{name}: {'problems' if (dataset, name) in faulty else 'good'}", *told]))
    for line in dict.fromkeys(weights_line(options.lpips_weights) for options in first_seed):
        print(line)
    faults = [f"{len(faulty)} of {len(lines)} scenes have problems, see above"] if faulty else []
    if faults or absent:
        raise SceneError("\n".join([*faults, *absent]))


def run_one(options: Namespace) -> None:
    """Train one run in this process, then bring the data set's tables up to date, though it fail."""
    from utils.jobs import check_settings, clear_failure, leave_failure
    from utils.reports import update_tables

    if options.render_only:  # which changes nothing about how the run stands
        return train_one(options)
    folder = run_folder_of(options)
    check_settings(folder, resolved_dict(options), set(RUN_IDENTITY_EXEMPT))
    clear_failure(folder)
    try:
        train_one(options)
    except RunLockedError:
        raise
    except Exception as error:
        if not (folder / "results.json").exists():
            leave_failure(folder, error)
        try:
            update_tables(vars(options), compare=False)
        except (UserError, OSError) as trouble:
            print(f"error: {trouble}", file=sys.stderr)
        raise
    update_tables(vars(options), compare=False)


def train_one(options: Namespace) -> None:
    """Train (or render) as the options say, in this process."""
    import train
    from utils.run_folder import naming_full_disks

    stop_if_asked()
    with naming_full_disks(run_folder_of(options)):
        train.run(options)


def train_isolated(options: Namespace) -> None:
    """The same in a process of its own. Raises RunsFailed if it fails."""
    from utils.jobs import plan_runs
    from utils.sweep import carry_out

    plan = plan_runs([job_of(options, retry=True)], RUN_IDENTITY_EXEMPT)
    carry_out(plan, make_launcher(options), lambda job: None)


def run_job() -> int:
    """In a process that a launcher started: train the job that it hands over; returns the exit code."""
    from utils.jobs import leave_failure
    from utils.processes import LOCKED_EXIT_CODE, receive_job

    job = receive_job()

    def experiment() -> None:
        try:
            train_one(Namespace(**job.options))
        except RunLockedError as error:
            report(error, job.options["debug"])
            raise SystemExit(LOCKED_EXIT_CODE) from error
        except Exception as error:
            leave_failure(job.folder, error)
            raise

    return exit_code(experiment, job.options["debug"])


def report(error: Exception, debug: bool) -> None:
    """Tell of an error on stderr: one line if it is the user's to mend, with its traceback if it is a bug."""
    if debug or not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)


def exit_code(experiments: Callable[[], None], debug: bool | None = None) -> int:
    """Run `experiments`; 0, or 1 if some of several runs failed, 2 for an error to mend, 75 when asked to stop with all
    work saved or when runs are left to other machines, 130 when interrupted.

    debug: tracebacks; default: as the command line says.
    """
    try:
        with stop_requests():  # from the first moment, while modules are still imported
            experiments()
    except UserError as error:
        report(error, "--debug" in sys.argv if debug is None else debug)
        return 2
    except RunsFailed as error:
        print(error, file=sys.stderr)
        return PREEMPTED_EXIT_CODE if isinstance(error, RunsLeft) else 1
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def one_line_warning(message: Warning | str, *place: object) -> str:
    """A warning as a user needs it; where in the code it was raised is of no use to him."""
    return f"warning: {printable(' '.join(str(message).split()))}\n"


if __name__ == "__main__":
    warnings.formatwarning = one_line_warning
    sys.exit(run_job() if sys.argv[1:2] == [JOB_FLAG] else exit_code(main))
