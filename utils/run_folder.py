"""The folder of one run: its name, what it means to find it there, and files that are whole or absent."""

import errno
import json
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.errors import RunFolderError
from utils.files import parse_json, read_bounded, reason

# All that a run writes. `--overwrite` removes these and nothing else.
RUN_FILES = (
    "ckpt_*.th",
    "ckpt_*.th.damaged",
    "metrics.jsonl",
    "events.out.*",
    "mesh.ply",
    "overview.png",
    "views.npz",
    "run.log",
    "failed.json",
    "args.json",
)
# Without these a broken scene is refused: a run that ended without them would have been the same with them.
ONLY_FOR_BROKEN = ("skip_missing_frames",)
LEFTOVERS = ".*.tmp"  # what a killed run was writing
# How the system says that there is something else where a file should be, and that nothing can be written.
_NO_FILE = (errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ELOOP)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
RUN_FOLDERS = ("imgs_vis", "imgs_test_all", "imgs_train_all", "imgs_path_all")


def run_folder(save_dir: str, up_folder_name: str, dataset: str, scene: str, tag: str, seed: int) -> Path:
    """save_dir/up_folder_name/dataset/scene/tag/seed{n}.

    Raises RunFolderError if a part is empty or would leave its place (a path separator, `.` or `..`).
    """
    parts = {"up_folder_name": up_folder_name, "nerf_dataset": dataset, "nerf_scene": scene, "tag": tag}
    for option, part in parts.items():
        if not part.strip() or part in (".", "..") or re.search(r"[/\\\x00]", part):
            raise RunFolderError(f"--{option} {part!r} cannot name a folder: give a name without / or \\")
    return Path(save_dir, *parts.values(), f"seed{seed}")


def prepare_run_folder(folder: Path, options: Mapping[str, Any], exempt: set[str], overwrite: bool) -> str:
    """Make the folder, or say what an earlier run left in it: 'new', 'resume' or 'finished'.

    options: the resolved options, saved as args.json unless the run is finished. exempt: options that may differ
    from the earlier run's (where to print, how often). overwrite: remove what an earlier run wrote, start afresh.
    Raises RunFolderError if the settings differ, args.json is damaged or missing beside a run's files, or the
    folder cannot be written.
    """
    folder = Path(folder)
    with naming_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _remove_run(folder)
    state = check_run_folder(folder, options, exempt)
    if state != "finished":
        with naming_os_errors(folder):
            for path in folder.glob(LEFTOVERS):
                path.unlink()
        write_json_atomic(folder / "args.json", options)
    return state


def check_run_folder(folder: Path, options: Mapping[str, Any], exempt: set[str]) -> str:
    """What an earlier run left in a folder: 'new', 'resume' or 'finished'; changes nothing.

    Raises RunFolderError if the settings differ, or args.json is damaged or missing beside a run's files.
    """
    folder = Path(folder)
    with naming_os_errors(folder):
        state = _state_of(folder)
    if state != "new":
        old = read_json(folder / "args.json")
        if state == "finished" and isinstance(old, dict):
            exempt = exempt | {name for name in ONLY_FOR_BROKEN if old.get(name) is False}
        _refuse_other_settings(folder, old, json_value(options), exempt)
    return state


def _state_of(folder: Path) -> str:
    results, checkpoints = folder / "results.json", any(folder.glob("ckpt_*.th"))
    if not (folder / "args.json").exists():
        if results.exists() or checkpoints:
            raise RunFolderError(f"{folder} holds a run without its args.json: --overwrite it or choose another --tag")
        return "new"
    return "finished" if results.exists() else "resume"


def _refuse_other_settings(folder: Path, old: Any, new: Mapping[str, Any], exempt: set[str]) -> None:
    if not isinstance(old, dict):
        raise RunFolderError(f"{folder / 'args.json'} is damaged (not a table of options): start with --overwrite")
    absent = object()
    differing = [k for k in sorted((old.keys() | new.keys()) - exempt) if old.get(k, absent) != new.get(k, absent)]
    if differing:
        changes = ", ".join(f"{k}: {_told(old, k)} -> {_told(new, k)}" for k in differing)
        raise RunFolderError(
            f"{folder} belongs to a run with other settings ({changes}): choose another "
            "--up_folder_name (for a single run another --tag will do), or --overwrite it"
        )


def _told(options: Mapping[str, Any], name: str) -> str:
    text = str(options.get(name, "(absent)"))
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _remove_run(folder: Path) -> None:
    # results.json goes first, so that nobody takes for finished what is half removed, and args.json last: an
    # interrupted removal then still says whose files these are.
    (folder / "results.json").unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        path = folder / name
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    for pattern in (LEFTOVERS, *RUN_FILES):
        for path in folder.glob(pattern):
            if not _is_own_output(path):
                path.unlink()


def _is_own_output(path: Path) -> bool:
    """Whether this process' standard output goes to the file: then it is this run's, not an earlier one's."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:  # there may be no standard output at all
        return False


@contextmanager
def naming_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a RunFolderError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        blocker = error.filename2 or error.filename
        if error.errno in _NO_FILE and blocker:
            raise RunFolderError(f"{blocker} is in the way ({reason(error)}): move or remove it") from error
        raise _unwritable(path, error) from error


@contextmanager
def naming_full_disks(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block that says that a disk is full or read-only into a RunFolderError, whatever was
    written: `folder`, the run's, or its output, which may lie elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise _unwritable(error.filename or f"{folder} or the output of this run", error) from error


def _unwritable(what: object, error: OSError) -> RunFolderError:
    remedy = "free some space or choose a --save_dir that can be written"
    return RunFolderError(f"cannot write {what} ({reason(error)}): {remedy}")


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Write `path` through a temporary file beside it, synced and renamed: afterwards it is whole, or as it was.

    mode: "wb" or "w" (UTF-8). Raises RunFolderError if the disk is full, read-only or forbidden.
    """
    path = Path(path)
    # A name of its own: processes of two machines may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming_os_errors(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once its folder is synced; Windows has no such call.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as strict JSON (see `json_value`), whole or not at all. Raises RunFolderError."""
    text = json.dumps(json_value(value), indent=2, allow_nan=False)
    with atomic_file(path, "w") as file:
        file.write(text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; RunFolderError if it is missing or damaged, or holds numbers that are not finite."""
    try:
        return parse_json(read_bounded(Path(path)).decode("utf-8"), finite=True)
    except OSError as error:
        raise RunFolderError(f"cannot read {path} ({reason(error)}): check the folder and its permissions") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged (not JSON): remove it or start the run with --overwrite") from error


def json_value(value: Any) -> Any:
    """`value` in terms of JSON: NaN and infinities become null, tuples and sets lists, paths text, and numpy's and
    torch's scalars and arrays numbers and lists. TypeError for anything else."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [json_value(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def git_commit() -> str:
    """Commit of the repository that this code lies in, `-dirty` if tracked files are modified; 'unknown' without.

    Not those in benchmarks/results: measurements write them one after another, and nothing is computed from them."""
    root = Path(__file__).resolve().parents[1]
    # Without the variables a calling git hook sets, which would point to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        commit = git("rev-parse", "--short=12", "HEAD")
        modified = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return commit + ("-dirty" if modified else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
