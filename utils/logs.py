"""The log of a run: metrics.jsonl for programs, TensorBoard events for eyes."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.run_folder import atomic_file, json_value, naming_os_errors


class RunLog:
    """Writes {folder}/metrics.jsonl, one line per logged step, and TensorBoard events beside it.

    resume_step: the first step that will be logged again; later points of an earlier segment are dropped, so that
    no step appears twice. None starts an empty log. Every line is flushed. Raises RunFolderError if the folder
    cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        self._path = Path(folder) / "metrics.jsonl"
        if resume_step is None or not self._path.exists():
            kept = []
        else:
            with naming_os_errors(self._path):
                kept = _lines_before(self._path, resume_step)
        with atomic_file(self._path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        with naming_os_errors(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - stays open until close()
            self._board = _summary_writer(folder, resume_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one step, {tag: value}; NaN and infinities become null in metrics.jsonl."""
        line = json.dumps({"step": step, **json_value(values)}, allow_nan=False)
        with naming_os_errors(self._path):
            self._file.write(line + "\n")
            self._file.flush()
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Show a picture [H, W, 3], uint8 or float in [0, 1], in TensorBoard."""
        with naming_os_errors(self._path):
            self._board.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is pending and close both logs."""
        with naming_os_errors(self._path):
            self._file.close()
            self._board.close()


def _summary_writer(folder: Path, resume_step: int | None):
    # Imported here, because it takes a second that programs which only read results should not pay.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=resume_step)


def _lines_before(path: Path, step: int) -> list[str]:
    """The whole lines of earlier steps; a line torn by a crash is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("step", step) < step:
            kept.append(line)
    return kept
