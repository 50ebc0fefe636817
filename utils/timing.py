"""Where a training step's time goes, without slowing the step down, and durations in words."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PHASES = ("sampler", "forward", "backward", "optimizer", "grow")

# Pairs of CUDA events that may wait before they are resolved unasked; bounds memory if nobody calls `collect`.
MAX_PENDING = 4096


class PhaseTimer:
    """Accumulates the seconds of each phase of a training step.

    On CUDA a phase is bracketed by two events on the current stream and nothing waits for the device; the events
    are read in `collect`, which does wait, so call it seldom. Elsewhere a phase is timed with `perf_counter`.
    Phases do not nest.
    """

    def __init__(self, device: torch.device | str):
        self._uses_events = torch.device(device).type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._counts = dict.fromkeys(PHASES, 0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._pool: list[torch.cuda.Event] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`, one of PHASES (else KeyError). A block that raises is not counted."""
        if name not in self._seconds:
            raise KeyError(f"unknown phase {name!r}; the phases are {', '.join(PHASES)}")
        if self._uses_events:
            start, end = self._event(), self._event()
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
            if len(self._pending) >= MAX_PENDING:
                self.collect()
        else:
            start_seconds = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start_seconds)

    def collect(self) -> None:
        """Read the events recorded so far; waits for the device to reach the last one. Does nothing on a CPU."""
        if not self._pending:
            return
        self._pending[-1][2].synchronize()
        for name, start, end in self._pending:
            self._add(name, start.elapsed_time(end) / 1000.0)
            self._pool += (start, end)
        self._pending.clear()

    @property
    def seconds(self) -> dict[str, float]:
        """Collected seconds of each phase since the run began, resumed segments included."""
        return dict(self._seconds)

    def ms_per_step(self, steps: int | None = None) -> dict[str, float]:
        """Milliseconds a step of each phase, {phase: ms}; a phase that not every step has is spread over all steps.

        steps: how many steps the totals cover; None takes the count of the most frequent phase (right when a step
        enters each phase at most once).
        """
        self.collect()
        steps = max(self._counts.values()) if steps is None else steps
        return {name: 1000.0 * seconds / max(steps, 1) for name, seconds in self._seconds.items()}

    def state_dict(self) -> dict:
        """Totals so far, plain numbers."""
        self.collect()
        return {"seconds": dict(self._seconds), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from the totals of `state_dict`, dropping what was timed here before."""
        self.collect()
        self._seconds = {name: float(state["seconds"].get(name, 0.0)) for name in PHASES}
        self._counts = {name: int(state["counts"].get(name, 0)) for name in PHASES}

    def _event(self) -> torch.cuda.Event:
        return self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds
        self._counts[name] += 1


def eta_text(seconds: float) -> str:
    """A duration in its two largest units: "2 d 3 h", "1 h 12 min", "5 min 10 s" or "45 s"."""
    total = max(round(seconds), 0)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(total / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(total / 3600)
    return f"{hours // 24} d {hours % 24} h"
