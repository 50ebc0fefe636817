"""The CPU's threads: shares of a step's work side by side, without OpenMP.

OpenMP's threads wait for their next share by spinning. Beside any other process on the machine that makes a step five
to fifty times slower (600 to 5400 ms instead of 113 on two cores), and even alone they fight with threads of our own.
So while these threads work, torch has one: its operations run inside the shares. What is all C++ shares its work out
there (shares.h), among `count()` threads; `together` is for shares that hold operations of torch.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache

import torch

_taken: int | None = None
_own = threading.local()  # `in_share`: set while a thread is at one of `together`'s calls


def count() -> int:
    """How many threads there are: as many as torch would use (OMP_NUM_THREADS, torch.set_num_threads); to a share of
    `together`, which has the others beside it, one."""
    return 1 if getattr(_own, "in_share", False) else _taken or torch.get_num_threads()


@contextmanager
def taking_over() -> Iterator[None]:
    """Within, torch's own operations use one thread, and `together` all of them. May be nested."""
    global _taken
    if _taken is not None:
        yield
        return
    _taken = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_taken)
        _taken = None


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    # OpenMP's number of threads is a setting of each thread; a new one has the machine's cores again.
    return ThreadPoolExecutor(size, thread_name_prefix="kernels", initializer=torch.set_num_threads, initargs=(1,))


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls that do not touch each other's results, each when a thread is free. The first error is raised, and
    after one - Ctrl-C too - no other call is begun."""
    if len(calls) <= 1 or count() == 1:
        for call in calls:
            call()
        return
    remaining, mode, over = iter(list(calls)), torch.is_grad_enabled(), threading.Event()

    def work() -> None:
        _own.in_share = True
        try:
            with torch.set_grad_enabled(mode):  # a thread's own setting
                for call in remaining:
                    if over.is_set():
                        return
                    call()
        except BaseException:
            over.set()
            raise
        finally:
            _own.in_share = False

    with taking_over():
        helpers = [_pool(count() - 1).submit(work) for _ in range(min(count(), len(calls)) - 1)]
        try:
            work()
            wait(helpers)
        except BaseException:
            over.set()
            wait(helpers)
            raise
        for helper in helpers:
            helper.result()
