"""Several runs: what each is, the state that its folder shows, which of them are to be started, and how they end.

All that processes know of each other's runs they read from the runs' folders; so any number of them, on any number of
machines that share a file system, may work through the same sweep.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from utils.checkpoints import latest_checkpoint
from utils.errors import RunFolderError, UserError
from utils.results import fault_of_results
from utils.run_folder import check_run_folder, naming_os_errors, read_json, write_json_atomic
from utils.run_lock import holder

FAILURE = "failed.json"
RETRY_HINT = "runs that failed before are left out: --retry_failed starts them again"


class State(StrEnum):
    """What is known of a run."""

    NEW = "new"
    STARTED = "started"
    RUNNING = "running elsewhere"
    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Job:
    """One run: dataset/scene/tag/seedN, its folder, and its resolved options as args.json holds them.

    retry: start it although it has failed before.
    """

    name: str
    folder: Path
    options: dict[str, Any]
    retry: bool = False

    def to_json(self) -> str:
        """One line, to be read by `from_json` in another process."""
        values = {"name": self.name, "folder": str(self.folder), "options": self.options, "retry": self.retry}
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Job":
        """The job that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"folder": Path(values["folder"])})


@dataclass(frozen=True)
class Outcome:
    """How a run stands after it was to be started, and why, in a line."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: its state now, the reason for it in a line, and whether it is to be started."""

    job: Job
    state: State
    reason: str
    starts: bool


# --- the state of a run ---
def folder_state(folder: Path) -> tuple[State, str]:
    """What a run's folder shows, whatever its settings, and a line about it.

    Raises RunFolderError if that cannot be seen.
    """
    folder = Path(folder)
    with naming_os_errors(folder):
        if (folder / "results.json").exists():
            fault = _fault_of(folder / "results.json")
            return (State.REFUSED, fault) if fault else (State.FINISHED, "")
        owner = holder(folder)
        if owner:
            return State.RUNNING, owner
        failure = read_failure(folder)
        if failure:
            return State.FAILED, failure
        checkpoint = latest_checkpoint(folder)
        if checkpoint:
            return State.STARTED, f"goes on from {checkpoint.name}"
        if (folder / "args.json").exists():
            return State.STARTED, "before its first checkpoint"
        return State.NEW, ""


def _fault_of(path: Path) -> str:
    """What is wrong with a results.json and what to do about it; "" if tables can be made of it."""
    try:
        fault = fault_of_results(read_json(path))
    except RunFolderError as error:
        return str(error)
    return f"{path} is damaged ({fault}): remove it or start the run with --overwrite" if fault else ""


def may_start(job: Job, state: State) -> bool:
    """Whether a run in this state is to be started."""
    if state is State.RUNNING:
        return False
    if job.options["overwrite"] or job.options["render_only"]:
        return True
    return state in (State.NEW, State.STARTED) or (state is State.FAILED and job.retry)


def plan_runs(jobs: Sequence[Job], exempt: frozenset[str]) -> list[Planned]:
    """The state of every run, and which of them are to be started; changes nothing.

    exempt: options in which a run may differ from its earlier start.
    """
    return [_planned(job, set(exempt)) for job in jobs]


def _planned(job: Job, exempt: set[str]) -> Planned:
    try:
        state, reason = folder_state(job.folder)
        check_settings(job.folder, job.options, exempt)
    except RunFolderError as error:
        return Planned(job, State.REFUSED, str(error), starts=False)
    return Planned(job, state, reason, may_start(job, state))


def check_settings(folder: Path, options: Mapping[str, Any], exempt: set[str]) -> None:
    """Raise RunFolderError if a folder holds a run with other settings that a start would go on with; changes nothing.

    options: the resolved options of the run that is to be started. exempt: those that may differ.
    """
    if not (options["overwrite"] or options["render_only"] or _left_nothing(folder)):
        check_run_folder(folder, options, exempt)


def plan_lines(plan: Sequence[Planned]) -> list[str]:
    """A plan as text: a line a run, then the counts."""
    width = max((len(planned.job.name) for planned in plan), default=0)
    lines = []
    for planned in plan:
        afresh = planned.starts and planned.job.options["overwrite"] and planned.state is not State.NEW
        left = not planned.starts and planned.state is not State.FINISHED
        notes = [planned.reason, "starts afresh" if afresh else "", "is not started" if left else ""]
        told = f"{planned.job.name:{width}}  {planned.state}"
        lines.append(": ".join([told, "; ".join(filter(None, notes))]) if any(notes) else told)
    counts = Counter(planned.state for planned in plan)
    told = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
    lines.append(f"{len(plan)} runs{': ' if told else ''}{told}; {sum(p.starts for p in plan)} to start")
    return lines + ([RETRY_HINT] if leaves_failed(plan) else [])


def leaves_failed(plan: Sequence[Planned]) -> bool:
    """Whether runs of the plan are left out because they failed before."""
    return any(planned.state is State.FAILED and not planned.starts for planned in plan)


def shard_of(jobs: Sequence[Job], shard: str) -> list[Job]:
    """Part i of n of the jobs. shard: "i/n", i from 0 to n - 1.

    Strategy after strategy is dealt round, so that no part gets more of the slow ones than another.
    """
    part, n = map(int, shard.split("/"))
    order = sorted(range(len(jobs)), key=lambda number: jobs[number].options["tag"])
    return [jobs[number] for number in sorted(order[part::n])]


# --- failures ---
def record_failure(folder: Path, error: str, kind: str, exit_code: int) -> None:
    """Leave failed.json in a run's folder. Raises RunFolderError if it cannot be written."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    facts = {"error": error, "kind": kind, "exit_code": exit_code, "time": stamp, "host": socket.gethostname()}
    write_json_atomic(Path(folder) / FAILURE, facts)


def leave_failure(folder: Path, error: Exception) -> None:
    """The same for an error that ended a run, if the run has a folder."""
    if Path(folder).is_dir():
        code = 2 if isinstance(error, UserError) else 1
        with suppress(RunFolderError):  # on a full disk, say: the error itself matters more
            record_failure(folder, str(error) or type(error).__name__, type(error).__name__, code)


def clear_failure(folder: Path) -> None:
    """Remove what an earlier, failed start left; if that is all there is, its settings too, so that others may be
    tried. Raises RunFolderError if that is impossible."""
    with naming_os_errors(folder):
        if _left_nothing(folder):
            (Path(folder) / "args.json").unlink(missing_ok=True)
        (Path(folder) / FAILURE).unlink(missing_ok=True)


def _left_nothing(folder: Path) -> bool:
    """Whether a run failed before there was anything to protect: a checkpoint, results."""
    kept = (folder / "results.json").exists() or any(Path(folder).glob("ckpt_*"))
    return (folder / FAILURE).exists() and not kept


def read_failure(folder: Path) -> str:
    """Why a run failed, in a line; "" if it did not."""
    path = Path(folder) / FAILURE
    if not path.exists():
        return ""
    try:
        return str(read_json(path)["error"])
    except (RunFolderError, KeyError, TypeError):
        return f"{path} is damaged; --retry_failed starts the run again"
