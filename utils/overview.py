"""What a sweep shows while it goes on: runs done, running with their PSNR and time left, failed."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.console import say
from utils.errors import RunFolderError
from utils.jobs import Job, Outcome, State
from utils.launchers import Event
from utils.run_folder import read_json
from utils.timing import eta_text

REFRESH_SECONDS = 1.0
TAIL_BYTES = 8192


class Overview:
    """Bars on a terminal, one for the sweep and one for every run that goes on; a line for every run that ends.

    n_runs: how many are to be started.
    """

    def __init__(self, n_runs: int):
        self._live = sys.stderr.isatty()
        self._n_runs, self._n_ended, self._n_failed = n_runs, 0, 0
        self._bars: dict[str, _RunBar] = {}
        self._all = tqdm(total=n_runs, desc="runs", unit="run", position=0, disable=not self._live)
        self._shown = 0.0

    def show(self, event: Event) -> None:
        """Take note of an event of the launcher."""
        job, outcome = event.job, event.outcome
        if job and not outcome:
            self._bars[job.name] = _RunBar(job, self._free_position(), self._live)
        elif job:
            self._end(job, outcome)
        if self._live and time.monotonic() > self._shown + REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._count()
            for bar in self._bars.values():
                bar.refresh()

    def close(self) -> None:
        """Leave the sweep's bar, take the others away."""
        self._count()
        for bar in (*(run.bar for run in self._bars.values()), self._all):
            bar.close()

    def _count(self) -> None:
        self._all.set_postfix(running=len(self._bars), failed=self._n_failed)

    def _end(self, job: Job, outcome: Outcome) -> None:
        run = self._bars.pop(job.name, None)
        if run:
            run.bar.close()
        self._n_ended += 1
        self._n_failed += outcome.state in (State.FAILED, State.REFUSED)
        self._all.update()
        told = outcome.reason or (_result(job.folder) if outcome.state is State.FINISHED else "")
        how = "stopped" if outcome.state in (State.NEW, State.STARTED) else outcome.state
        say(f"{self._n_ended} of {self._n_runs}: {job.name} {how}{': ' if told else ''}{told}")

    def _free_position(self) -> int:
        taken = {run.position for run in self._bars.values()}
        return next(position for position in range(1, len(taken) + 2) if position not in taken)


class _RunBar:
    """The bar of one run, from what it writes to metrics.jsonl."""

    def __init__(self, job: Job, position: int, live: bool):
        self._log = job.folder / "metrics.jsonl"
        self._before = _stamp(self._log)  # what an earlier start wrote is old
        self.position, total = position, job.options["n_iters"]
        self.bar = tqdm(total=total, desc=job.name, unit="step", position=position, leave=False, disable=not live)

    def refresh(self) -> None:
        last = last_scalars(self._log) if _stamp(self._log) != self._before else None
        if last:
            step = int(last["step"])
            if not self.bar.n:
                self.bar.initial = self.bar.n = step  # steps of an earlier start say nothing about the speed
            self.bar.set_postfix(psnr=f"{last['train/PSNR']:.2f}", refresh=False)
            self.bar.update(step - self.bar.n)
        self.bar.refresh()


def last_scalars(path: Path) -> Mapping[str, Any] | None:
    """The last whole line with a training PSNR of a metrics.jsonl, None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # being written, or cut by the seek
        if isinstance(record, dict) and isinstance(record.get("train/PSNR"), float) and "step" in record:
            return record
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _result(folder: Path) -> str:
    """Quality and time of a finished run."""
    try:
        results = read_json(folder / "results.json")
        psnr = results["psnr"] if results["psnr"] is not None else results["psnr_5view"]
        return f"PSNR {psnr:.2f} dB, {eta_text(results['train_seconds'])} of training"
    except (RunFolderError, KeyError, TypeError):
        return ""
