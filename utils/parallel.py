"""The same work on many things at once, with a progress bar."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

MAX_WORKERS = 16
Result = TypeVar("Result")


def in_threads(work: Callable[[int], Result], count: int, label: str, unit: str, progress: bool = True) -> list[Result]:
    """[work(0), ..., work(count - 1)], in threads, as many as there are cores to use.

    For work that spends its time in libraries that release Python's lock. What one piece of work raises is raised.
    """
    with ThreadPoolExecutor(_n_workers()) as pool:
        done = pool.map(work, range(count))
        return list(tqdm(done, total=count, desc=label, unit=unit, leave=False, disable=not progress))


def _n_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, usable)
