"""A run in a process of its own: how it is started, told to stop, and how its end is understood.

The process gets its job as a line on its standard input, which stays open: when the other end is gone, whatever killed
it, the run stops too. Results and errors come back as files in the run's folder and as the exit code.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from utils.errors import RunFolderError
from utils.jobs import Job, Outcome, State, clear_failure, folder_state, may_start, read_failure, record_failure
from utils.run_folder import naming_os_errors
from utils.signals import PREEMPTED_EXIT_CODE, STOP_SIGNALS

LOG = "run.log"
# Exit code of a run whose folder another process has: no failure.
LOCKED_EXIT_CODE = 73
# What a run that lost its parent gets to save a checkpoint.
GRACE_SECONDS = 60.0


def start_run(command: Sequence[str], job: Job, environment: Mapping[str, str]) -> "RunProcess | Outcome":
    """Start a run, unless its folder shows that somebody else has started or finished it meanwhile.

    command: the program that calls `receive_job`. environment: variables that the process gets besides ours.
    """
    try:
        state, reason = folder_state(job.folder)
        if not may_start(job, state):
            return Outcome(state, reason)
        return RunProcess(command, job, environment)
    except RunFolderError as error:
        return Outcome(State.FAILED, str(error))
    except OSError as error:  # no memory, too many processes
        return Outcome(State.FAILED, f"its process cannot be started ({error.strerror or error})")


class RunProcess:
    """A run's process; its output goes to run.log in the run's folder. Raises RunFolderError if that is impossible."""

    def __init__(self, command: Sequence[str], job: Job, environment: Mapping[str, str]):
        self.job = job
        with naming_os_errors(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
            clear_failure(job.folder)
            log = open(job.folder / LOG, "wb" if job.options["overwrite"] else "ab")  # noqa: SIM115 - closed below
        with log:
            # A session of its own: Ctrl-C reaches it once, through us.
            self._process = subprocess.Popen(
                [*command, job.name],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
            )
        with suppress(BrokenPipeError):  # it ended at once: `poll` says how
            self._process.stdin.write(job.to_json().encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def stop(self, signum: int) -> None:
        """Pass a signal on; the run saves a checkpoint and ends."""
        self._process.send_signal(signum)

    def poll(self) -> Outcome | None:
        """How the run ended, None while it has not."""
        code = self._process.poll()
        if code is None:
            return None
        self.close()
        try:
            return self._outcome(code)
        except RunFolderError as error:
            return Outcome(State.FAILED, str(error))

    def _outcome(self, code: int) -> Outcome:
        if code == 0:
            return Outcome(State.FINISHED)
        if code in (PREEMPTED_EXIT_CODE, LOCKED_EXIT_CODE) or -code in _stop_signals():
            state, reason = folder_state(self.job.folder)
            if state is not State.FAILED:  # whoever failed meanwhile, it was not this process
                return Outcome(state, "before it began" if state is State.NEW else reason)
        return Outcome(State.FAILED, read_failure(self.job.folder) or self._unexplained(code))

    def close(self) -> None:
        """Let go of the process; if it still runs, it takes us for gone and stops."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _unexplained(self, code: int) -> str:
        """The failure of a process that had no time to leave one."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = " (the machine may be out of memory)" if -code == getattr(signal, "SIGKILL", None) else ""
        error = f"its process {how}{hint}; see {self.job.folder / LOG}"
        try:
            record_failure(self.job.folder, error, "killed" if code < 0 else "exit", code)
        except RunFolderError as trouble:  # then the outcome alone tells of it; perhaps it is why the process ended
            return f"{error}; {trouble}"
        return error


def _stop_signals() -> list[int]:
    return [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]


def receive_job() -> Job:
    """In the process that was started: the job. From now on the process stops when the one that started it is gone."""
    stream = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - as long as the process lives
    job = Job.from_json(stream.readline())

    def watch() -> None:
        while stream.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
    return job
