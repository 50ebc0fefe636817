"""A sweep from its plan to its end: runs started, told of and counted; signals passed on."""

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from utils.console import say
from utils.errors import RunsFailed, SweepStopped, UserError
from utils.jobs import Job, Outcome, Planned, State
from utils.launchers import Launcher
from utils.overview import Overview
from utils.processes import stop_signals


def carry_out(plan: Sequence[Planned], launcher: Launcher, after_run: Callable[[Job], None]) -> None:
    """Start what a plan wants to be started and wait for its end.

    after_run: called after every run that ended here, to bring tables up to date; its UserErrors stop nothing.
    Raises SweepStopped if a signal (SIGINT, SIGTERM, SIGUSR1) came, which the runs were passed, or RunsFailed if runs
    have failed, now or before.
    """
    starting = [planned.job for planned in plan if planned.starts]
    outcomes = {p.job.name: Outcome(p.state, p.reason) for p in plan}
    waiting = {job.name for job in starting}
    for planned in plan:
        if not planned.starts and planned.state is not State.FINISHED:
            say(f"{planned.job.name} is not started: {planned.state}: {planned.reason}")
    with _signals_caught() as caught:
        overview = Overview(len(starting))
        try:
            with closing(launcher.run(starting)) as events:
                for event in events:
                    while caught:
                        signum = caught.pop()
                        say(f"{signal.Signals(signum).name}: asking the runs to save a checkpoint and end")
                        launcher.stop(signum)
                    overview.show(event)
                    if event.job and event.outcome:
                        waiting.discard(event.job.name)
                        outcomes[event.job.name] = event.outcome
                        _tolerantly(after_run, event.job)
        finally:
            overview.close()
    stopped = waiting | {job.name for job in starting if outcomes[job.name].state is State.STARTED}
    counts = Counter(outcome.state for outcome in outcomes.values())
    say(f"{len(plan)} runs: {', '.join(f'{counts[state]} {state}' for state in State if counts[state])}")
    failed = [n for n, outcome in outcomes.items() if outcome.state in (State.FAILED, State.REFUSED)]
    told = [f"{len(failed)} of {len(plan)} runs failed:", *(f"{name}: {outcomes[name].reason}" for name in failed)]
    if stopped:
        lines = [f"stopped with {len(stopped)} of {len(plan)} runs to go; the same command again goes on"]
        raise SweepStopped("\n".join((told if failed else []) + lines))
    if failed:
        raise RunsFailed("\n".join(told))


def _tolerantly(after_run: Callable[[Job], None], job: Job) -> None:
    try:
        after_run(job)
    except UserError as error:
        sys.stderr.write(f"error: {job.name}: {error}\n")


@contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """Signals that ask for an end are collected in a list instead of ending the process."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda signum, _: caught.append(signum)) for number in stop_signals()}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
