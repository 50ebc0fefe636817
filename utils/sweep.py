"""A sweep from its plan to its end: runs started, told of and counted; signals passed on."""

import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

from utils.console import say
from utils.errors import RunFolderError, RunsFailed, RunsLeft, UserError
from utils.jobs import RETRY_HINT, Job, Outcome, Planned, State, folder_state, leaves_failed
from utils.launchers import Launcher
from utils.overview import Overview
from utils.run_lock import held_here
from utils.signals import Preempted, stop_if_asked, stop_requests

OVERWRITE_HINT = (
    "careful: --overwrite starts every run of its command afresh, finished ones too; give it with --nerf_scene, "
    "--strategy and --seed of one run (a failed run without a checkpoint needs --retry_failed alone)"
)


def carry_out(plan: Sequence[Planned], launcher: Launcher, after_run: Callable[[Job], None]) -> None:
    """Start what a plan wants to be started and wait for its end.

    after_run: called after every run that ended here, to bring tables up to date; its UserErrors and OSErrors are told
    and stop nothing. Raises Preempted if this process or some of its runs were asked to stop (`utils.signals`) before
    all was done, RunsLeft if runs were left to processes that may no longer live, RunsFailed if runs have failed, now
    or before.
    """
    starting = [planned.job for planned in plan if planned.starts]
    outcomes = {p.job.name: Outcome(p.state, p.reason) for p in plan}
    waiting = {job.name for job in starting}
    idle = [planned for planned in plan if not planned.starts and planned.state is not State.FINISHED]
    for line in _by_reason([(planned.job, f"{planned.state}: {planned.reason}") for planned in idle], " not started"):
        say(line)
    if leaves_failed(plan):
        say(RETRY_HINT)
    with stop_requests():
        overview = Overview(len(starting))
        try:
            with closing(launcher.run(starting)) as events:
                asked = False
                for event in events:
                    if not asked:
                        asked = _pass_on(launcher)
                    overview.show(event)
                    if event.job and event.outcome:
                        waiting.discard(event.job.name)
                        outcomes[event.job.name] = event.outcome
                        _tolerantly(after_run, event.job)
        finally:
            overview.close()
    stopped = waiting | {job.name for job in starting if outcomes[job.name].state in (State.NEW, State.STARTED)}
    counts = Counter(outcome.state for outcome in outcomes.values())
    say(f"{len(plan)} runs: {', '.join(f'{counts[state]} {state}' for state in State if counts[state])}")
    ended = [(planned.job, outcomes[planned.job.name]) for planned in plan]
    failed = [(job, end.reason) for job, end in ended if end.state in (State.FAILED, State.REFUSED)]
    told = [f"{len(failed)} of {len(plan)} runs failed:", *_by_reason(failed)]
    if any("--overwrite" in reason for _, reason in failed):
        told.append(OVERWRITE_HINT)
    if stopped:
        lines = [f"stopped with {len(stopped)} of {len(plan)} runs to go; the same command again goes on"]
        raise Preempted("\n".join((told if failed else []) + lines))
    left = [planned.job for planned in plan if outcomes[planned.job.name].state is State.RUNNING]
    if left:
        say(f"left to other processes: {', '.join(job.name for job in left)}")
    unsure = [job.name for job in left if not _in_good_hands(job)]
    if unsure:
        lines = [f"not seen to be alive: the processes of {', '.join(unsure)}; ask again, with the same command"]
        raise RunsLeft("\n".join((told if failed else []) + lines))
    if failed:
        raise RunsFailed("\n".join(told))


def _by_reason(runs: Sequence[tuple[Job, str]], how: str = "") -> list[str]:
    """Lines that give each run's reason; of runs with one reason, but for the folder in it, the names stand beneath."""
    groups: dict[str, list[tuple[Job, str]]] = {}
    for job, reason in runs:
        groups.setdefault(reason.replace(str(job.folder), "(its folder)"), []).append((job, reason))
    lines = []
    for shared, group in groups.items():
        if len(group) == 1:
            lines.append(f"{group[0][0].name}{how}: {group[0][1]}")
        else:
            lines += [f"{len(group)} runs{how}: {shared}", *(f"  {job.name}" for job, _ in group)]
    return lines


def _in_good_hands(job: Job) -> bool:
    """Whether a run is finished, or a living process of this machine is at it; of others one cannot be sure."""
    try:
        return folder_state(job.folder)[0] is State.FINISHED or held_here(job.folder)
    except RunFolderError:
        return False


def _pass_on(launcher: Launcher) -> bool:
    """Ask the runs to stop if this process was asked to; whether it was."""
    try:
        stop_if_asked()
    except Preempted as stop:
        say(f"{str(stop).partition(';')[0]}: the runs save a checkpoint and end")
        launcher.stop(signal.SIGTERM)
        return True
    return False


def _tolerantly(after_run: Callable[[Job], None], job: Job) -> None:
    try:
        after_run(job)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {job.name}: {error}\n")
