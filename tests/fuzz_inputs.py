"""Damaged inputs of all kinds, each of which must be accepted or refused in words, soon and in little memory.

    python -m tests.fuzz_inputs --count 10000 --seed 1        all kinds; writes benchmarks/results/fuzz.json
    python -m tests.fuzz_inputs --kind "scene syn" --only 77   one input again, in this process, with its traceback

Inputs are read in processes of their own, so that one which hangs or kills its process is known by its number.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import IO

import psutil

# Of processor time, and of the clock, which runs on while other programs have the processor.
SECONDS, CLOCK_SECONDS = 5.0, 40.0
START_SECONDS = 300.0
START_METHOD = "spawn"
# Beyond what the process held before: an input may cost this much, and ask for as much again before it is stopped.
MEGABYTES, LIMIT_MEGABYTES = 600, 6000
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
GOOD = ("accepted", "refused")
PROGRESS = re.compile(rb"\r[^\r\n]*")


def inputs(count: int, seed: int, kind: str | None = None) -> list[tuple[str, int]]:
    """(kind, number) of each input, kinds in the proportions of TARGETS."""
    from tests.fuzz_targets import TARGETS

    r, kinds = Random(seed), [kind] if kind else list(TARGETS)
    chosen = r.choices(kinds, [TARGETS[name][1] for name in kinds], k=count)
    return [(name, 1_000_000 * seed + number) for number, name in enumerate(chosen)]


def attempt(kind: str, seed: int) -> tuple[str, str]:
    """(outcome, what it says): one of GOOD, or what is wrong with how the input was met."""
    from tests.fuzz_targets import run_one

    before = peak_megabytes(reset=True)
    with warnings.catch_warnings(record=True) as caught, silence() as output:
        warnings.simplefilter("always")
        try:
            outcome, said = run_one(kind, seed), ""
        except BaseException:
            return "exception", traceback.format_exc()[-3000:]
        written = PROGRESS.sub(b"", read_back(output))
    # Of our own, told to the user; all others are a library's, about which the user can do nothing.
    foreign = [w for w in caught if w.category is not UserWarning or not str(w.filename).startswith(str(ROOT))]
    if foreign:
        return "warning", f"{foreign[0].category.__name__}: {foreign[0].message} ({foreign[0].filename})"
    if written:
        return "output", f"on stdout or stderr: {written[:300]!r}"
    grown = peak_megabytes() - before
    return (outcome, said) if grown < MEGABYTES else ("memory", f"{grown:.0f} MB")


def read_back(file: IO[bytes]) -> bytes:
    """What was written to a file that is still open."""
    sys.stdout.flush(), sys.stderr.flush()
    file.seek(0)
    return file.read()


@contextlib.contextmanager
def silence() -> Iterator:
    """Both output streams of the process, libraries' too, into a file, which is yielded."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            yield file
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for target, source in zip((1, 2), kept, strict=True):
                os.dup2(source, target)
                os.close(source)


def peak_megabytes(reset: bool = False) -> float:
    """The process's peak of resident memory, on Linux since the last reset."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(pipe: Connection) -> None:
    """In a process of its own: answer inputs until there are no more."""
    import torch

    from tests.fuzz_targets import prepare

    torch.set_num_threads(1)
    prepare()
    with contextlib.suppress(OSError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = held + LIMIT_MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(None)
    while True:
        kind, seed = pipe.recv()
        pipe.send(attempt(kind, seed))


class Worker:
    """A process that is given one input after another, and is replaced when it hangs or dies."""

    def __init__(self) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.clock = psutil.Process(self.process.pid)
        self.task, self.started, self.ready = None, time.monotonic(), False
        self.used = 0.0

    def give(self, task: tuple[str, int]) -> None:
        """Start an input."""
        self.task, self.started, self.used = task, time.monotonic(), self.processor_seconds()
        self.pipe.send(task)

    def processor_seconds(self) -> float:
        """What the process has used so far; of one that has ended, nothing."""
        with contextlib.suppress(psutil.Error):
            return sum(self.clock.cpu_times()[:2])
        return 0.0

    def late(self) -> bool:
        """Whether its input, or its start, takes too long."""
        elapsed = time.monotonic() - self.started
        if not self.ready:
            return elapsed > START_SECONDS
        if not self.task or elapsed < SECONDS:
            return False
        return elapsed > CLOCK_SECONDS or self.processor_seconds() - self.used > SECONDS

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def run_all(tasks: Sequence[tuple[str, int]], n_workers: int) -> list[tuple[str, int, str, str]]:
    """(kind, seed, outcome, what it says) of all inputs, in the order in which they ended."""
    waiting, done = list(reversed(tasks)), []
    workers = [Worker() for _ in range(n_workers)]
    try:
        while len(done) < len(tasks):
            ready = wait([w.pipe for w in workers], timeout=0.2)
            for number, worker in enumerate(workers):
                answer = None
                if worker.pipe in ready:
                    try:
                        answer = worker.pipe.recv()
                        worker.ready = True
                    except EOFError:
                        worker.process.join()
                        answer = ("crash", f"the process ended with {worker.process.exitcode}")
                elif worker.late():
                    answer = ("timeout", f"more than {SECONDS:g} s")
                if answer and worker.task:
                    done.append((*worker.task, *answer))
                if answer and answer[0] in ("crash", "timeout"):
                    if not worker.task:
                        raise RuntimeError(f"a process cannot start: {answer[1]}")
                    worker.stop()
                    workers[number] = Worker()
                elif worker.pipe in ready:
                    worker.task = None
                    if waiting:
                        worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.stop()
    return done


def table(done: Sequence[tuple[str, int, str, str]]) -> dict[str, dict[str, int]]:
    """Counts of outcomes by kind of input, and in all."""
    counts: dict[str, Counter] = {}
    for kind, _, outcome, _ in done:
        counts.setdefault(kind, Counter())[outcome] += 1
    counts = dict(sorted(counts.items()))
    counts["all"] = sum(counts.values(), Counter())
    return {kind: dict(counter) for kind, counter in counts.items()}


def markdown(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a table."""
    outcomes = [*GOOD, *sorted({outcome for row in counts.values() for outcome in row} - set(GOOD))]
    lines = [["input", *outcomes], ["---"] * (1 + len(outcomes))]
    lines += [[kind, *(str(row.get(outcome, 0)) for outcome in outcomes)] for kind, row in counts.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """The command line; 1 if any input was met badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--kind")
    parser.add_argument("--only", type=int, help="with --kind: the number of one input")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.only is not None:
        from tests.fuzz_targets import run_one

        print(run_one(options.kind, options.only))
        return 0
    started = time.perf_counter()
    done = run_all(inputs(options.count, options.seed, options.kind), options.workers)
    counts = table(done)
    bad = [entry for entry in done if entry[2] not in GOOD]
    for kind, seed, outcome, said in bad:
        print(f'--- {outcome}: python -m tests.fuzz_inputs --kind "{kind}" --only {seed}\n{said}')
    print(markdown(counts))
    import torch  # late: it takes seconds, which the workers need not wait for

    from utils.device import device_name
    from utils.run_folder import git_commit

    seconds = time.perf_counter() - started
    print(f"{len(done)} inputs in {seconds:.0f} s, {len(bad)} met badly")
    facts = {
        "count": len(done),
        "seed": options.seed,
        "processor_seconds_allowed": SECONDS,
        "megabytes_allowed": MEGABYTES,
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
    }
    findings = [{"kind": kind, "number": seed, "outcome": outcome} for kind, seed, outcome, _ in bad]
    options.out.write_text(json.dumps({**facts, "counts": counts, "findings": findings}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
