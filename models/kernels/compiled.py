"""C++ beside this file, compiled for this CPU on first use.

A library is plain C called through ctypes, so building it needs a compiler (c++, g++ or clang++) and nothing of torch
or Python; it is kept in the user's cache folder and built again when its source, compiler or CPU is another one.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from utils.console import say

COMPILERS = ("c++", "g++", "clang++")
# Nothing needs errno or traps.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
# By library. Marching has to round exactly as torch does, without fused products.
OWN_FLAGS = {"lookups": (), "rendering": ("-ffp-contract=off",), "adam": (), "l1": (), "network": ()}
COMPILE_SECONDS = 300


class _Library(ctypes.CDLL):
    """A library whose functions return 0, or another number where memory does not suffice (shares.h): a MemoryError."""

    def __getitem__(self, name: str):
        function = super().__getitem__(name)
        function.errcheck = _raise_shortage
        return function


def _raise_shortage(status: int, function, _arguments) -> int:
    if status:
        raise MemoryError(f"out of memory in the CPU's {function.__name__} (models/kernels)")
    return status


@functools.cache
def libraries() -> dict[str, ctypes.CDLL] | None:
    """The compiled libraries by name, built if they must be; None, and one line that says why, if they cannot be."""
    try:
        return {name: _Library(str(_built(name))) for name in OWN_FLAGS}
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())[:200]
        say(
            f"the CPU kernels could not be compiled ({reason}): torch's own operations serve, 7 to 25 times slower; "
            "install g++ or clang++"
        )
        return None


def _built(name: str) -> Path:
    """The library's file. Raises OSError without a compiler, SubprocessError if it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is installed")
    source, flags = Path(__file__).with_name(f"{name}.cpp"), (*FLAGS, *OWN_FLAGS[name])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    text = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    identity = "\n".join([*text, version, " ".join(flags), _cpu()])
    path = _cache_folder() / f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        say(f"compiling the CPU's {name} into {path.parent} (some seconds)")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *flags, str(source), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
            os.replace(built, path)  # whole or not at all, whoever else is building it
    return path


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return "\n".join([platform.machine(), platform.processor(), *[x for x in lines if x.startswith("flags")][:1]])


def _cache_folder() -> Path:
    """A folder for the libraries: the user's cache, or a temporary one if that cannot be written."""
    where = "the user's cache folder"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        where = folder = base / "expansive-supervision"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a home that is read-only, not there or unknown
        pass
    return _temporary_folder(str(where))


@functools.cache
def _temporary_folder(instead_of: str) -> Path:
    """A folder of this process, which goes with it; a line says so."""
    say(
        f"{instead_of} cannot be written: every run compiles the CPU kernels anew; set XDG_CACHE_HOME to another folder"
    )
    folder = tempfile.mkdtemp(prefix="expansive-supervision-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
