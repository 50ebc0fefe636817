"""Checkpoints: written whole or not at all, and read without running any code they might hold."""

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from utils.checkpoint_parts import fault_of_parts
from utils.console import say
from utils.errors import CheckpointError, DamagedCheckpointError
from utils.files import is_regular, open_regular
from utils.pickle_depth import tuple_depth
from utils.run_folder import atomic_file, naming_os_errors
from utils.shortage import is_shortage

Loaded = TypeVar("Loaded")
# torch's old format is that many pickles one after another; ours and TensoRF's hold tuples in tuples three deep.
OLD_FORMAT_PICKLES, MAX_TUPLE_DEPTH = 5, 12
CHECKPOINT_NAME = re.compile(r"ckpt_(\d+)\.th")


def _reconstruct(kind: type, shape: tuple, typecode: bytes) -> np.ndarray:
    """An array that its state will fill, as numpy pickles it; numpy's own function reserves whatever it is told."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("no array as numpy writes it")
    return np.empty(0, np.uint8)


# TensoRF's files hold their packed alpha mask as a numpy array of uint8; this is what rebuilds one, and nothing
# more. Files written with numpy 1 and 2 name the function differently.
_SAFE_GLOBALS = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint8)),
]

# How torch's restricted reader says that a file asks for an object outside its list.
_REFUSAL = re.compile(r"GLOBAL|call reduce|Can only (create|build)|[Uu]nsupported class")


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` (tensors and plain values) to `path`; an older file there stays intact until the new one is
    safe on disk. Raises RunFolderError if the disk is full, read-only or forbidden."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's zip writer hides the disk's error behind its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """The dictionary in a checkpoint, this program's or TensoRF's, read with weights_only.

    Raises CheckpointError if the file is missing or holds objects that could run code, DamagedCheckpointError if it
    is damaged.
    """
    path = Path(path)
    if not is_regular(path):
        if path.is_symlink() or path.exists():
            raise DamagedCheckpointError(f"{path} is no file, so no checkpoint: choose another one")
        raise CheckpointError(f"{path}: no such checkpoint; check --ckpt")
    _check_sums(path)
    _check_pickles(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's remark on old pickles; what follows says it all
            state = torch.load(path, map_location=map_location, weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except Exception as error:  # garbage makes the reader fail in any way at all
        # An archive's parts have the sizes that they claim, or torch refuses them; only the old format asks before.
        if is_shortage(error) and zipfile.is_zipfile(path):
            raise
        if isinstance(error, pickle.UnpicklingError) and _REFUSAL.search(str(error)):
            message = f"{path} holds objects that could run code; refused: use a checkpoint of tensors and plain values"
            raise CheckpointError(message) from error
        raise _damaged(path) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no dictionary, so it is no checkpoint of a field: choose another file")
    fault = fault_of_parts(state)
    if fault:
        raise CheckpointError(f"{path} holds {fault}, which no checkpoint has: use another one")
    return state


def _check_sums(path: Path) -> None:
    """Raise DamagedCheckpointError if a part of the file has another check sum than was written; torch reads over
    that. Takes a tenth of a second for 250 MB."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch compresses nothing; what claims to hold more than the file has room for is not worth unpacking.
            plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            fits = sum(part.file_size for part in parts) <= path.stat().st_size
            if not (plain and fits) or archive.testzip() is not None:
                raise _damaged(path)
    except (DamagedCheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what a forged position leads to
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        # TensoRF's older files are plain pickles, no zip files.
        if zipfile.is_zipfile(path):
            raise _damaged(path) from error


def _check_pickles(path: Path) -> None:
    """Raise DamagedCheckpointError if reading the file's pickles could take forever."""
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old text
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
            else:
                pickles = [file] * OLD_FORMAT_PICKLES
            for number, content in enumerate(pickles):
                if number == 0 and content is file:
                    file.seek(0)
                if tuple_depth(content, MAX_TUPLE_DEPTH) > MAX_TUPLE_DEPTH:
                    raise _damaged(path)
    except (ValueError, LookupError, TypeError, EOFError, OSError, MemoryError, OverflowError, zipfile.BadZipFile):
        # Malformed, or no pickle: the reader proper says so.
        return


def _damaged(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} is damaged or no checkpoint: remove it, or use an older one")


def load_latest(folder: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What `load` makes of the latest checkpoint in `folder` that is whole; there must be a checkpoint.

    Damaged ones after it are set aside under another name, with a line each. If all are damaged they stay, and
    DamagedCheckpointError is raised; whatever else `load` raises is passed on.
    """
    paths = _checkpoints(folder)
    damaged: list[Path] = []
    for path in reversed(paths):
        try:
            loaded = load(path)
        except DamagedCheckpointError:
            damaged.append(path)
            continue
        for bad in damaged:
            aside = bad.with_name(f"{bad.name}.damaged")
            with naming_os_errors(bad):
                bad.replace(aside)
            say(f"{bad} is damaged and now named {aside.name}; {path.name} takes its place")
        return loaded
    names = " and ".join(path.name for path in paths)
    raise DamagedCheckpointError(
        f"{folder / names} is damaged or no checkpoint, and none is left: restore it, or remove it to start anew"
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The ckpt_{iteration}.th of the highest iteration in `folder`, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def prune_checkpoints(folder: Path, keep: int = 2) -> None:
    """Remove all but the `keep` (>= 1) latest checkpoints, and what a killed run left half written.

    Raises RunFolderError if one cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    for path in [*_checkpoints(folder)[:-keep], *Path(folder).glob(".ckpt_*.tmp")]:
        with naming_os_errors(path):
            path.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, by iteration."""
    named = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in Path(folder).glob("ckpt_*.th")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]
