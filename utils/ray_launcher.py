"""Runs on the machines of a Ray cluster (`--launcher ray`), which share the folders of code, data and runs.

Ray finds each run a machine with the GPU or the CPUs that it asks for. A task there starts the run as the local
launcher does and waits for it; results come back as files. What a run does wrong is an outcome, and not tried again.
Only when Ray loses a task, with its machine or its worker, the run is handed in anew, and goes on from its last
checkpoint.
"""

import importlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.console import say
from utils.errors import OptionError, RunFolderError
from utils.jobs import Job, Outcome, State, record_failure
from utils.launchers import Event
from utils.processes import LOG, start_run
from utils.run_folder import naming_os_errors
from utils.run_lock import STALE_SECONDS

RAY_VERSION = "2.60.0"
# How often a run is handed in again; some runs take their machine down with them every time.
MOST_LOSSES = 10
# What a lost run's lock may need to be recognised as left behind, if its machine can no longer be asked.
WAIT_FOR_LOCK_SECONDS = STALE_SECONDS + 60.0
PAUSE_SECONDS, PROBE_SECONDS = 0.5, 10.0
# Outcomes are a few bytes; Ray would take a third of the memory.
OBJECT_STORE_BYTES = 100 * 2**20
ARGS = "args.json"
TOKENS = "; all machines need the same token (~/.ray/auth_token) and RAY_AUTH_MODE, or neither"
STOPPED = "stopped; goes on from its last checkpoint"


@dataclass
class _Task:
    """A job in Ray's hands. losses: how often it was lost. log_before: what its log was when it was handed in,
    args_before: its args.json when that happened first."""

    job: Job
    args_before: tuple[int, int] | None
    losses: int = 0
    log_before: tuple[int, int] | None = None
    started: bool = False


class RayLauncher:
    """See `utils.launchers.Launcher`. Uses the cluster at RAY_ADDRESS, without that variable this machine alone.

    command: the program of a run (see `utils.processes`), at the same path on every machine. OMP_NUM_THREADS is how
    many threads a run has, and so how many CPUs it asks for; 1 without it. Raises OptionError if Ray is not there.
    """

    def __init__(self, command: Sequence[str]):
        self._ray = _import_ray()
        self._command = list(command)
        self._threads = max(int(os.environ.get("OMP_NUM_THREADS", "1")), 1)
        self._tasks: dict[Any, _Task] = {}
        self._stopping = False

    def run(self, jobs: Sequence[Job]) -> Iterator[Event]:
        """See Launcher. Raises OptionError if the cluster cannot be reached."""
        if not jobs:
            return
        with _connected(self._ray), _mark(jobs) as mark:
            has_gpus = self._ray.cluster_resources().get("GPU", 0) > 0
            for job in jobs:
                self._submit(_Task(_placed(job, has_gpus), _stamp(job.folder / ARGS)), mark)
            self._tell_shortage()
            try:
                while self._tasks:
                    done, _ = self._ray.wait(list(self._tasks), timeout=PAUSE_SECONDS)
                    for reference in done:
                        yield from self._end(reference, mark)
                    yield from self._starts()
                    yield Event()
            finally:  # nobody listens any more
                self.stop(signal.SIGTERM)

    def stop(self, signum: int) -> None:
        """See Launcher. Whatever the signal, runs get SIGTERM."""
        self._stopping = True
        for reference in self._tasks:
            self._ray.cancel(reference, force=False)

    def _submit(self, task: _Task, mark: str) -> None:
        task.log_before = _stamp(task.job.folder / LOG)
        remote = self._ray.remote(carry_out_job).options(max_retries=0, **self._request(task.job))
        environment = {"OMP_NUM_THREADS": str(self._threads)}
        text = task.job.to_json()
        again = {"again": task.losses > 0, "args_before": task.args_before}
        reference = remote.remote(self._command, text, environment, os.getcwd(), mark, **again)
        self._tasks[reference] = task

    def _request(self, job: Job) -> dict[str, float]:
        return {"num_cpus": self._threads, "num_gpus": int(job.options["device"].startswith("cuda"))}

    def _end(self, reference: Any, mark: str) -> Iterator[Event]:
        """What became of a task: an outcome, or it is handed in again."""
        task, errors = self._tasks.pop(reference), self._ray.exceptions
        try:
            state, reason = self._ray.get(reference)
            outcome = Outcome(State(state), reason)
            # Not by us: its machine is wanted back.
            if outcome.state in (State.NEW, State.STARTED) and not self._stopping:
                outcome = self._lost(task, mark, "was told to stop")
        except errors.TaskCancelledError:  # while it waited; perhaps for another machine
            outcome = Outcome(State.STARTED, STOPPED) if task.started else None
        except errors.RayTaskError as error:
            outcome = Outcome(State.FAILED, f"its Ray task failed: {error.cause!r}")
        except errors.RayError as error:
            outcome = self._lost(task, mark, f"lost its machine or worker ({type(error).__name__})")
        if outcome:
            yield Event(task.job, outcome)

    def _lost(self, task: _Task, mark: str, how: str) -> Outcome | None:
        """Hand a run in again that another machine can finish; an outcome if there is no point in it."""
        task.losses += 1
        if self._stopping:
            return Outcome(State.STARTED, how)
        if task.losses > MOST_LOSSES:
            reason = f"{how}, the last of {task.losses} times"
            with suppress(RunFolderError):  # a run that never began has no folder
                record_failure(task.job.folder, reason, "lost", 1)
            return Outcome(State.FAILED, reason)
        say(f"{task.job.name} {how}; it is handed in again")
        self._submit(task, mark)
        return None

    def _starts(self) -> Iterator[Event]:
        """An event for every run whose log shows that it has begun."""
        for task in self._tasks.values():
            if not task.started and _stamp(task.job.folder / LOG) != task.log_before:
                task.started = True
                yield Event(task.job)

    def _tell_shortage(self) -> None:
        """Say so if a run waits for what no machine has; one that has it may still join the cluster."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for request in {tuple(self._request(task.job).values()) for task in self._tasks.values()}:
            if not any(m.get("CPU", 0) >= request[0] and m.get("GPU", 0) >= request[1] for m in machines):
                say(f"no machine of the Ray cluster has {request[0]} CPUs and {request[1]} GPUs; runs wait for one")


# --- in the worker ---
def carry_out_job(
    command: Sequence[str],
    job_text: str,
    environment: dict[str, str],
    folder: str,
    mark: str,
    again: bool,
    args_before: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """The task: start a run as a process of this machine and wait for its end; returns its state and why.

    folder: the working folder of who started the sweep. mark: a file that shows that run folders are the same there
    and here. again: the run was lost before; its first process may still be ending, or seem to be alive.
    args_before: what shows whether the run's args.json has changed since it was first handed in.
    """
    try:
        os.chdir(folder)
    except OSError:
        mark = ""
    if not mark or not Path(mark).exists():
        where = f"{folder} on {os.uname().nodename} is not what it is where the sweep was started"
        return State.FAILED, f"{where}: code, data and runs must lie in folders that all machines of the cluster share"
    job = Job.from_json(job_text)
    process, give_up = None, time.monotonic() + (WAIT_FOR_LOCK_SECONDS if again else 0.0)
    while True:
        try:
            if again and _stamp(job.folder / ARGS) != args_before:  # what was to be overwritten is gone
                job = replace(job, options={**job.options, "overwrite": False})
            process = process or start_run(command, job, environment)
            outcome = process if isinstance(process, Outcome) else process.poll()
            if outcome and (outcome.state is not State.RUNNING or time.monotonic() > give_up):
                return outcome.state, outcome.reason
            process = None if outcome else process  # somebody else has the folder: ask again
            time.sleep(PAUSE_SECONDS)
        except KeyboardInterrupt:  # the task was cancelled
            if process is None or isinstance(process, Outcome):
                return State.STARTED, STOPPED
            process.stop(signal.SIGTERM)


# --- where the sweep was started ---
def _import_ray() -> ModuleType:
    """Ray, told to send no usage statistics, and without a cluster to join, to stay on the loopback address: it
    replaces 127.0.0.1 by the machine's outward address unless this variable, which it reads when imported, is 0."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    elif _has_token():  # `ray start` asks for it by default, a program that names an address does not send it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise OptionError(
            f"--launcher ray needs the package ray: pip install ray=={RAY_VERSION}, or leave --launcher out"
        ) from None


def _has_token() -> bool:
    """Whether this user has a token for Ray's clusters, where Ray looks for one."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    with suppress(OSError):
        return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).stat().st_size > 0
    return False


@contextmanager
def _connected(ray: ModuleType) -> Iterator[None]:
    """Connected to the cluster at RAY_ADDRESS, or to one of this machine alone that ends with the block."""
    address = os.environ.get("RAY_ADDRESS")
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1"}
    before = signal.getsignal(signal.SIGTERM)
    try:
        _probe(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        reason = f"RAY_ADDRESS={address or '(none)'}: {' '.join(str(error).split())[:200]}{TOKENS if address else ''}"
        raise OptionError(f"--launcher ray: no connection to {reason}") from error
    signal.signal(signal.SIGTERM, before)  # Ray takes it, but whoever called us has a use for it
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str | None) -> None:
    """Raise OSError if nobody listens at host:port; Ray itself would ask for many minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()


@contextmanager
def _mark(jobs: Sequence[Job]) -> Iterator[str]:
    """A file beside the runs, to be found by every machine that sees the same folders."""
    path = Path(jobs[0].options["save_dir"] if jobs else ".") / f".sweep-{secrets.token_hex(8)}"
    with naming_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _placed(job: Job, has_gpus: bool) -> Job:
    """The job on the one GPU that Ray gives it, if it wants one and there is one."""
    device = job.options["device"]
    wants = device.startswith("cuda") or (device == "auto" and has_gpus)
    return replace(job, options={**job.options, "device": "cuda:0"}) if wants else job


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
