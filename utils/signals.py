"""Being asked to stop: by a scheduler that wants the machine back, by a person at the terminal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# EX_TEMPFAIL of sysexits.h, "try again later": what a scheduler can requeue a job on.
PREEMPTED_EXIT_CODE = 75
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

_listening = False
_asked_by: str | None = None


class Preempted(BaseException):
    """The work was asked to stop, and has. It is no error: `except Exception` must let it pass."""


def stop_if_asked() -> None:
    """Raise Preempted if one of STOP_SIGNALS has come; for places where the work can stop and lose nothing."""
    if _asked_by is not None:
        raise Preempted(f"stopped by {_asked_by}; the same command again goes on from what was saved, if anything")


@contextmanager
def stop_requests() -> Iterator[None]:
    """Within, SIGTERM, SIGINT and SIGUSR1 only ask to stop (see `stop_if_asked`); a second SIGINT interrupts at once.

    May be nested. Does nothing outside of the main thread, the only one in which Python takes signals.
    """
    global _listening, _asked_by
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]  # Windows lacks one
    before = {number: signal.getsignal(number) for number in numbers}
    # What the caller ignores (nohup, a shell's background job) stays ignored; None cannot be put back by Python.
    replaced = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    _listening, _asked_by = True, None
    for number in replaced:
        signal.signal(number, _note)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, before[number])
        _listening, _asked_by = False, None


def _note(number: int, frame: object) -> None:
    # Only a note: whatever runs at this moment, the writing of a checkpoint perhaps, is to end in order.
    global _asked_by
    if _asked_by is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked_by = _asked_by or signal.Signals(number).name
