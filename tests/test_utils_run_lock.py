"""The lock of a run folder: one owner at a time, and none that is gone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest

import utils.run_lock as module
from tests.helpers import ROOT
from utils.errors import RunFolderError
from utils.jobs import folder_state
from utils.run_lock import LOCK_NAME, STALE_SECONDS, Owner, run_lock
from utils.signals import Preempted, stop_requests

TOKEN = "0123456789abcdef"
NO_SUCH_PROCESS = 2**22 + 1  # above Linux's largest


def me(**changes) -> Owner:
    process = psutil.Process()
    facts = {"host": socket.gethostname(), "machine": module._machine(), "pid": process.pid}
    facts |= {"started": module._start(process), "since": "2026-01-02 03:04:05", "token": TOKEN}
    return Owner(**facts | changes)


def leave_lock(folder, owner, seconds_ago=0.0, name=LOCK_NAME):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(owner if isinstance(owner, str) else json.dumps(asdict(owner)))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_lock_and_a_folder_made_for_it_are_gone_afterwards(tmp_path):
    with run_lock(tmp_path / "a" / "b"):
        assert names(tmp_path / "a" / "b") == [LOCK_NAME]
    assert names(tmp_path) == []
    with run_lock(tmp_path / "a"):
        (tmp_path / "a" / "args.json").write_text("")
    assert names(tmp_path / "a") == ["args.json"]


def test_an_error_releases_the_lock_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_second_owner_is_refused_with_the_first_ones_name(tmp_path):
    with run_lock(tmp_path):
        since = json.loads((tmp_path / LOCK_NAME).read_text())["since"]
        with pytest.raises(RunFolderError) as caught, run_lock(tmp_path):
            pass
        assert names(tmp_path) == [LOCK_NAME]
    message = str(caught.value)
    for part in (str(tmp_path), f"process {os.getpid()} on {socket.gethostname()}", f"since {since}", "--tag"):
        assert part in message
    assert "\n" not in message
    with run_lock(tmp_path):
        pass


GONE = {
    "no such process": (me(pid=NO_SUCH_PROCESS), 0),
    "another process with its number": (me(started=me().started - 100), 0),
    "another machine, long silent": (me(host="elsewhere"), STALE_SECONDS + 60),
    "a container of the same name, long silent": (me(machine="another", pid=1), STALE_SECONDS + 60),
    "an unreadable lock, long silent": ("{", STALE_SECONDS + 60),
}


@pytest.mark.parametrize("case", GONE)
def test_a_lock_whose_owner_is_gone_is_taken_over_with_one_line(tmp_path, case, capsys):
    owner, seconds_ago = GONE[case]
    leave_lock(tmp_path, owner, seconds_ago)
    with run_lock(tmp_path) as lock:
        lock.check()
        assert names(tmp_path) == [LOCK_NAME]
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "is gone and left its lock; taken over" in line


def test_a_killed_process_that_nobody_has_waited_for_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(child.pid)
    leave_lock(tmp_path, me(pid=child.pid, started=module._start(process)))
    with pytest.raises(RunFolderError, match=f"process {child.pid}"), run_lock(tmp_path):
        pass
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with run_lock(tmp_path):
        pass
    child.wait()


ALIVE = {
    "this process, however silent": (me(), 10 * STALE_SECONDS),
    "another machine": (me(host="elsewhere"), STALE_SECONDS - 60),
    "a container of the same name": (me(machine="another", pid=NO_SUCH_PROCESS), STALE_SECONDS - 60),
    "a lock that is just being written": ("", 0),
    "something else": ("[" * 5000, 0),
    "a lock with a path for a token": (me(token="../../x"), 0),
}


@pytest.mark.parametrize("case", ALIVE)
def test_a_lock_whose_owner_may_run_is_respected(tmp_path, case):
    leave_lock(tmp_path, *ALIVE[case])
    with pytest.raises(RunFolderError, match="is in use by"), run_lock(tmp_path):
        pass
    assert names(tmp_path) == [LOCK_NAME]


def test_an_owner_renews_its_lock_and_another_machine_respects_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)
    with run_lock(tmp_path):
        then = time.time() - 2 * STALE_SECONDS
        os.utime(tmp_path / LOCK_NAME, (then, then))
        time.sleep(0.5)
        monkeypatch.setattr(module, "_machine", lambda: "another")
        with pytest.raises(RunFolderError, match="is in use by"), run_lock(tmp_path):
            pass


def test_an_owner_notices_that_its_lock_was_taken_over_and_leaves_it_alone(tmp_path):
    with run_lock(tmp_path) as lock:
        lock.check()
        leave_lock(tmp_path, me(host="elsewhere"))
        with pytest.raises(RunFolderError, match="taken over by another process"):
            lock.check()
    assert names(tmp_path) == [LOCK_NAME]


def test_a_lock_that_cannot_be_read_is_an_error_in_one_line(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(116, "Stale file handle")

    with run_lock(tmp_path) as lock:
        monkeypatch.setattr("utils.run_lock._read", stale)
        with pytest.raises(RunFolderError, match=r"run\.lock \(Stale file handle\)"):
            lock.check()
        monkeypatch.undo()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_a_lock_that_is_no_file_is_named_and_nobody_waits_for_it(tmp_path, make):
    make(tmp_path / LOCK_NAME)
    message = re.escape(f"{tmp_path / LOCK_NAME} is in the way (not a regular file): move or remove it")
    with pytest.raises(RunFolderError, match=message), run_lock(tmp_path):
        pass
    with pytest.raises(RunFolderError, match=message):
        folder_state(tmp_path)
    assert names(tmp_path) == [LOCK_NAME]


@pytest.mark.parametrize("links", [True, False])
def test_a_lock_that_is_a_link_to_nowhere_is_named_after_some_tries(tmp_path, monkeypatch, links):
    def no_links(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    if not links:
        monkeypatch.setattr(module.os, "link", no_links)
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "gone")
    with (
        pytest.raises(RunFolderError, match=r"run\.lock can neither be taken nor read; .* remove it"),
        run_lock(tmp_path),
    ):
        pass
    assert names(tmp_path) == [LOCK_NAME]


def test_who_tries_for_a_lock_again_and_again_can_be_stopped(tmp_path, monkeypatch):
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "gone")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    with stop_requests():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted), run_lock(tmp_path):
            pass
    assert names(tmp_path) == [LOCK_NAME]


def test_a_takeover_that_was_killed_half_way_stops_nobody(tmp_path):
    dead = me(pid=NO_SUCH_PROCESS)
    second = me(pid=NO_SUCH_PROCESS, token="f" * 16)
    leave_lock(tmp_path, dead)
    leave_lock(tmp_path, second, name=f".{LOCK_NAME}.after.{TOKEN}")
    leave_lock(tmp_path, me(pid=NO_SUCH_PROCESS, token="e" * 16), name=f".{LOCK_NAME}.after.{'f' * 16}")
    with run_lock(tmp_path) as lock:
        lock.check()
        assert names(tmp_path) == [LOCK_NAME]


def test_what_killed_starts_left_is_removed_and_what_others_are_about_to_use_is_not(tmp_path):
    leave_lock(tmp_path, "", STALE_SECONDS + 60, name=f".{LOCK_NAME}.{'a' * 16}")
    leave_lock(tmp_path, me(pid=NO_SUCH_PROCESS), name=f".{LOCK_NAME}.{'b' * 16}")
    leave_lock(tmp_path, "", name=f".{LOCK_NAME}.{'c' * 16}")
    leave_lock(tmp_path, me(), STALE_SECONDS + 60, name=f".{LOCK_NAME}.{'d' * 16}")
    with run_lock(tmp_path):
        assert names(tmp_path) == [f".{LOCK_NAME}.{'c' * 16}", f".{LOCK_NAME}.{'d' * 16}", LOCK_NAME]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*file"), run_lock(tmp_path / "file" / "run"):
        pass


# Forty processes that all start at one moment; who gets the lock keeps it until all have tried.
RACE = """
import os, sys, time
from pathlib import Path
import utils.run_lock as module
from utils.errors import RunFolderError

def no_links(source, target):
    raise PermissionError("no links here")

folder, links = Path(sys.argv[1]), sys.argv[2] == "links"
if not links:
    module.os.link = no_links
start, tried = time.monotonic() + 0.3, os.pipe()
children = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        time.sleep(start - time.monotonic() - 0.01)
        while time.monotonic() < start:
            pass
        code = 3
        try:
            with module.run_lock(folder):
                for _ in range(39):
                    os.read(tried[0], 1)
                code = 1
        except RunFolderError as error:
            os.write(tried[1], b"x")
            code = 0 if "is in use by" in str(error) else 2
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes.count(1), codes.count(0))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("links", ["links", "no links"])
@pytest.mark.parametrize("before", ["nothing", "a dead lock", "a dead takeover"])
def test_of_many_processes_that_start_at_once_exactly_one_gets_the_lock(tmp_path, before, links):
    if before != "nothing":
        leave_lock(tmp_path, me(pid=NO_SUCH_PROCESS))
    if before == "a dead takeover":
        leave_lock(tmp_path, me(pid=NO_SUCH_PROCESS, token="f" * 16), name=f".{LOCK_NAME}.after.{TOKEN}")
    command = [sys.executable, "-c", RACE, str(tmp_path), links]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["1 39"], done.stdout + done.stderr
    assert names(tmp_path) == []
