"""What test_survival.py has done in processes of their own, which it kills."""

import contextlib
import ctypes
import ctypes.util
import json
import os
import shutil
import threading
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

import run
import train
from opt import parse_options
from utils.checkpoints import latest_checkpoint, load_checkpoint
from utils.errors import UserError


def train_once(arguments: list[str], output: str) -> None:
    """Train as `run.py` would, its output appended to a file, and end with its exit code."""
    assert psutil.Process(os.getppid()).num_threads() == 1  # else locks may be held in the copy that nobody frees
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a killed process
    with open(output, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = run.exit_code(lambda: train.run(parse_options(arguments)))
    os._exit(code)


def train_on_a_small_disk(arguments: list[str], folder: str, sizes_kb: list[int], output: str) -> None:
    """Train in `folder` on a disk of its own of growing size, until there is room; what happened, as JSON.

    For each size: the message, the iteration of the last checkpoint (None without one) and whether that is whole.
    """
    torch.set_num_threads(1)
    mount = _private_mounts()
    if mount is None:
        Path(output).write_text(json.dumps("not permitted"))
        return
    place, happened = Path(folder), []
    mount(place, 0, f"size={sizes_kb[0]}k")
    for size in sizes_kb:
        mount(place, 32, f"size={size}k")  # MS_REMOUNT
        message = None
        try:
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                train.run(parse_options(arguments))
        except UserError as error:
            message = str(error)
        path = next((latest_checkpoint(path.parent) for path in place.rglob("ckpt_*.th")), None)
        iteration = None if path is None else load_checkpoint(path)["iteration"]
        happened.append({"size_kb": size, "message": message, "iteration": iteration})
        if message is None:
            break
    shutil.copytree(place, f"{folder}_afterwards")
    Path(output).write_text(json.dumps(happened))


def _private_mounts():
    """mount(place, flags, options) of a tmpfs that only this process sees; None where that is not permitted."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    user, group = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return None
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")

    def mount(place: Path, flags: int, options: str) -> None:
        if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    return mount
