"""One process at a time in a run folder.

The lock is a file, made by linking a finished one to its name: atomic, and whole from the start, on local disks and
on network folders alike, where flock may do nothing or be known to one machine only. It names its owner, who renews
its time again and again. An owner on this machine is looked up among the processes; of others only that time tells.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from utils.console import say
from utils.errors import RunFolderError, RunLockedError
from utils.files import open_regular
from utils.run_folder import naming_os_errors
from utils.signals import stop_if_asked

LOCK_NAME = "run.lock"
RENEW_SECONDS, STALE_SECONDS = 20.0, 300.0
# How often a lock is tried for that comes and goes, and the pause in between: a network folder may be seconds behind.
MOST_TRIES, PAUSE_SECONDS = 100, 0.1
# Start times of processes are told to a hundredth of a second, but against a clock that may be set anew meanwhile.
START_SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. machine: what tells machines and containers apart that share a host name; started: seconds
    from the machine's start to the process's; token: this very lock."""

    host: str
    machine: str
    pid: int
    started: float
    since: str
    token: str


_UNKNOWN = Owner("an unknown machine", "", 0, 0.0, "some moments ago", "unknown")


@contextmanager
def run_lock(folder: Path) -> Iterator["RunLock"]:
    """Make `folder` this process's own; both go away afterwards, the folder if nothing else came into it.

    Raises RunLockedError if another process has it, naming that one, RunFolderError if the folder cannot be written.
    """
    with naming_os_errors(folder):
        made = _make_folders(folder)
    try:
        lock = RunLock(folder)
        lock.acquire()
        try:
            yield lock
        finally:
            lock.release()
    finally:
        for path in made:
            with suppress(OSError):  # not empty: the run has begun
                path.rmdir()


class RunLock:
    """The lock of a run folder; see `run_lock`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._me = _myself()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, from an owner that is gone too. Raises RunLockedError, RunFolderError."""
        mine = self._path.with_name(f".{LOCK_NAME}.{self._me.token}")
        gone: list[Owner] = []
        with naming_os_errors(self._path):
            try:
                mine.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
                other = _take(self._path, mine, self._me, gone)
            finally:
                mine.unlink(missing_ok=True)
        if other is not None:
            raise RunLockedError(
                f"{self._path.parent} is in use by process {other.pid} on {other.host} since {other.since}: wait for "
                f"it, or choose another --tag (a lock that nobody renews counts for {STALE_SECONDS / 60:.0f} minutes)"
            )
        for owner in gone:
            say(f"{self._path.parent}: process {owner.pid} on {owner.host} is gone and left its lock; taken over")
        self._remove_remains()
        self._heart = threading.Thread(target=self._renew, daemon=True, name="run-lock")
        self._heart.start()

    def _remove_remains(self) -> None:
        """Files of starts that were killed before they had the lock."""
        now = self._path.stat().st_mtime
        for path in self._path.parent.glob(f".{LOCK_NAME}.*"):
            with suppress(OSError):  # a start beside this one, which just removed it
                if _is_gone(_read(path), self._me, age=now - path.stat().st_mtime):
                    path.unlink()

    def release(self) -> None:
        """Give the lock back, if it is ours."""
        if self._heart is None:
            return
        self._ended.set()
        self._heart.join()
        self._heart = None
        with suppress(OSError):  # what went wrong before matters more, and the next start sees that nobody has it
            if self._is_mine():
                self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunLockedError if the lock was lost: to a process that had to believe this one gone, RunFolderError
        if that cannot be seen."""
        with naming_os_errors(self._path):
            mine = self._is_mine()
        if not mine:
            raise RunLockedError(
                f"{self._path.parent} was taken over by another process, or its {LOCK_NAME} removed, while this one "
                "stood still: look who trains there before starting again"
            )

    def _is_mine(self) -> bool:
        try:
            return _read(self._path).token == self._me.token
        except FileNotFoundError:
            return False

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # a network folder that is away for a moment
                if self._is_mine():
                    os.utime(self._path)


def holder(folder: Path) -> str:
    """Who works in a run's folder at the moment, in words; "" if nobody does. Changes nothing."""
    path = Path(folder) / LOCK_NAME
    try:
        owner, age = _read(path), time.time() - path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return "" if _is_gone(owner, _myself(), age) else f"process {owner.pid} on {owner.host} since {owner.since}"


def held_here(folder: Path) -> bool:
    """Whether a living process of this machine works in a run's folder. Raises RunFolderError if that is not seen."""
    path, me = Path(folder) / LOCK_NAME, _myself()
    with naming_os_errors(path), suppress(FileNotFoundError):
        owner, age = _read(path), time.time() - path.stat().st_mtime
        return (owner.host, owner.machine) == (me.host, me.machine) and not _is_gone(owner, me, age)
    return False


def _myself() -> Owner:
    process, since = psutil.Process(), time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(socket.gethostname(), _machine(), process.pid, _start(process), since, secrets.token_hex(8))


def _take(path: Path, mine: Path, me: Owner, gone: list[Owner]) -> Owner | None:
    """Make `path` a lock of ours, whose content is that of `mine`; the living owner who has it instead.

    A dead owner's lock is replaced by whoever first takes a second one, named after that very lock: so no one
    replaces what a faster one has put there meanwhile. That second one may itself have been left behind, and so on.
    Raises RunFolderError if something is there all the time that is no lock.
    """
    for _ in range(MOST_TRIES):
        if _link(mine, path):
            return None
        try:
            found, age = _read(path), mine.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:  # given back just now, or a link to nowhere
            time.sleep(PAUSE_SECONDS)
            stop_if_asked()
            continue
        if not _is_gone(found, me, age):
            return found
        claim = path.with_name(f".{LOCK_NAME}.after.{found.token}")
        other = _take(claim, mine, me, [])
        if other is not None:
            return other
        if path.exists() and _read(path) == found:
            os.replace(claim, path)
            gone.append(found)
            return None
        claim.unlink(missing_ok=True)
    raise RunFolderError(f"{path} can neither be taken nor read; if it is a link to nowhere, remove it")


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name, unless there is such a file already: then False."""
    try:
        os.link(source, target)
    except FileExistsError:
        # A network folder may do as told, lose its answer, and then say this to the question asked again.
        return source.stat().st_nlink > 1
    except OSError:  # a file system without links; the next best is to be the one that makes the file
        try:
            with open(target, "x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> Owner:
    """The owner in a lock, an unknown one if the file cannot be understood. Raises FileNotFoundError, or another
    OSError if it is no file."""
    with open_regular(path) as file:
        try:
            owner = Owner(**json.loads(file.read(2000).decode("utf-8")))
        except (ValueError, TypeError, RecursionError):
            return _UNKNOWN
    plain = isinstance(owner.pid, int) and owner.pid > 0 and isinstance(owner.started, float)
    return owner if plain and re.fullmatch(r"[0-9a-f]{16}", str(owner.token)) else _UNKNOWN


def _is_gone(owner: Owner, me: Owner, age: float) -> bool:
    """Whether the owner of a lock renewed `age` seconds ago, by the file system's own clock, no longer runs."""
    if (owner.host, owner.machine) != (me.host, me.machine):
        return age > STALE_SECONDS
    try:
        process = psutil.Process(owner.pid)
        reused = abs(_start(process) - owner.started) > START_SLACK_SECONDS
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return age > STALE_SECONDS


def _start(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's: the same whenever asked, though the clock be set anew."""
    return process.create_time() - psutil.boot_time()


@cache
def _machine() -> str:
    """This start of this machine and this space of process numbers, where the system tells (Linux): containers and
    machines may share a host name, and a process is only looked up where its number means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _make_folders(folder: Path) -> list[Path]:
    """Make the folder; those that were not there, innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made
