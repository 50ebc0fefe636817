"""What starts the runs of a sweep, several at once: the protocol, and processes of this machine."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from utils.errors import OptionError
from utils.jobs import Job, Outcome
from utils.processes import RunProcess, start_run

PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Event:
    """Something happened to a run: it started (no outcome), or it ended. Without a job: time has passed."""

    job: Job | None = None
    outcome: Outcome | None = None


class Launcher(Protocol):
    """Carries out jobs; each must go through `utils.processes.start_run` on the machine that runs it."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Event]:
        """Carry out the jobs; yields an Event() at least every second. A job that is not started has no event."""
        ...

    def stop(self, signum: int) -> None:
        """Start no more, and pass a signal on to what runs; `run` ends when that has ended."""
        ...


class LocalLauncher:
    """Processes of this machine, one at a time in every slot.

    command: the program of a run (see `utils.processes`). slots: for each, the environment variables that its runs
    get besides ours.
    """

    def __init__(self, command: Sequence[str], slots: Sequence[Mapping[str, str]]):
        self._command, self._slots = list(command), list(slots)
        self._running: dict[RunProcess, Mapping[str, str]] = {}
        self._stopping = False

    def run(self, jobs: Sequence[Job]) -> Iterator[Event]:
        """See Launcher."""
        waiting, free = deque(jobs), deque(self._slots)
        try:
            while self._running or (waiting and not self._stopping):
                while waiting and free and not self._stopping:
                    job = waiting.popleft()
                    started = start_run(self._command, job, free[0])
                    if isinstance(started, Outcome):
                        yield Event(job, started)
                    else:
                        self._running[started] = free.popleft()
                        yield Event(job)
                for process in list(self._running):
                    outcome = process.poll()
                    if outcome:
                        free.append(self._running.pop(process))
                        yield Event(process.job, outcome)
                yield Event()
                time.sleep(PAUSE_SECONDS)
        finally:  # nobody listens any more
            self.stop(signal.SIGTERM)
            for process in self._running:
                process.close()

    def stop(self, signum: int) -> None:
        """See Launcher."""
        self._stopping = True
        for process in self._running:
            process.stop(signum)


def local_slots(gpus: str | None, jobs: int, n_devices: int) -> list[dict[str, str]]:
    """The environment of each of the runs that go on at once: its GPU, and its part of the CPU.

    gpus: "all", or numbers with commas, of the n_devices CUDA devices that this process sees; None for `jobs` runs
    that share what there is. Raises OptionError for a device that is not there.
    """
    slots = [{"CUDA_VISIBLE_DEVICES": name} for name in _gpu_names(gpus, n_devices)] if gpus else [{}] * jobs
    if len(slots) == 1 or "OMP_NUM_THREADS" in os.environ:
        return slots
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{**slot, "OMP_NUM_THREADS": str(max(cores // len(slots), 1))} for slot in slots]


def _gpu_names(gpus: str, n_devices: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the devices; a scheduler may have given us some of the machine's only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (visible.split(",") if visible else [str(number) for number in range(n_devices)])[:n_devices]
    wanted = range(len(names)) if gpus == "all" else [int(number) for number in gpus.split(",")]
    if len({*wanted}) < len(wanted):
        raise OptionError(f"--gpus {gpus}: names a device twice; each takes one run at a time")
    absent = [number for number in wanted if number >= len(names)]
    if absent or not names:
        remedy = ", counted from 0; name those there are, or" if names else ";"
        raise OptionError(
            f"--gpus {gpus}: this machine has {len(names)} CUDA devices{remedy} give --jobs N for N runs at once "
            "without them"
        )
    return [names[number].strip() for number in wanted]
