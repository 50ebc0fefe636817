"""Reading files that nobody vouches for: regular ones only, of bounded size; JSON of bounded depth."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import IO, Any

# The largest description of a scene or result that is read: some 17,000 frames of a transforms.json. Hostile JSON of
# that size takes seconds and half a gigabyte.
MAX_TEXT_BYTES = 16 * 2**20
# Deeper JSON than this is nothing of ours, and would exhaust Python's stack in places.
MAX_JSON_DEPTH = 32
# Longer whole numbers become floats: none of ours need more, and Python's grow without bound.
_MAX_DIGITS = 18


def is_regular(path: Path) -> bool:
    """Whether `path` is a file with content (also through links): no folder, pipe or device, and a name that the
    system can look up at all."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading. OSError for anything else, without waiting: opening a pipe blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "no possible name of a file", str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; OSError if it is none, larger, or cannot be read."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit / 2**20:.3g} MiB, which no such file is", str(path))
    return content


def reason(error: Exception) -> str:
    """What an OSError or another error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def parse_json(text: str, finite: bool = False) -> Any:
    """The value in a JSON text. ValueError if it is malformed or nested deeper than 32; with `finite` also if it
    holds NaN or infinities. Whole numbers of more than 18 digits become floats."""

    def number(word: str) -> float:
        value = float(word)
        if finite and not math.isfinite(value):
            raise ValueError(f"{word[:20]} is no finite number")
        return value

    def whole(word: str) -> int | float:
        return int(word) if len(word) <= _MAX_DIGITS else number(word)

    try:
        value = json.loads(text, parse_float=number, parse_constant=number, parse_int=whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for container in level for item in _items(container) if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError("nested too deeply")


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()
