"""The log of a run: metrics.jsonl for programs, TensorBoard events for eyes."""

import io
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import to_uint8
from utils.run_folder import atomic_file, json_value, naming_os_errors

EVENTS = "events.out.tfevents."


def checked_position(value: object) -> dict[str, int]:
    """`value` if it is what `RunLog.position` says: bytes by name of file. Raises TypeError otherwise."""
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and type(v) is int and v >= 0 for k, v in value.items()
    ):
        raise TypeError("the log's position is no table of sizes")
    return value


class RunLog:
    """Writes {folder}/metrics.jsonl, one line per logged step, and TensorBoard events beside it.

    position: what `position` said when the state was saved that the run goes on from; all that was logged after it
    is dropped, so that nothing appears twice. None starts an empty log. next_step: the first step that will be
    logged, for a TensorBoard that watches and has seen more. Raises RunFolderError if the folder cannot be written.

    Everything is on its way to disk when a call returns: TensorBoard's own writer is a thread, which a full disk ends
    unseen.
    """

    def __init__(self, folder: Path, position: Mapping[str, int] | None = None, next_step: int = 0):
        position = position or {}
        self._path = Path(folder) / "metrics.jsonl"
        with naming_os_errors(self._path):
            kept = self._path.read_bytes() if self._path.exists() else b""
            kept = kept[: position.get(self._path.name, 0)]
            kept = kept[: kept.rfind(b"\n") + 1]  # lines that a dying machine did not save whole
            with atomic_file(self._path) as file:
                file.write(kept)
            self._file = open(self._path, "ab")  # noqa: SIM115 - stays open until close()
            self._events = _Events(Path(folder), position, next_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one step, {tag: value}; NaN and infinities become null in metrics.jsonl."""
        line = json.dumps({"step": step, **json_value(values)}, allow_nan=False)
        with naming_os_errors(self._path):
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            self._events.scalars(step, values)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Show a picture [H, W, 3], uint8 or float in [0, 1], in TensorBoard."""
        with naming_os_errors(self._path):
            self._events.image(step, tag, to_uint8(image))

    def position(self) -> dict[str, int]:
        """Where the log ends, {file name: bytes}, all of which is safe on disk."""
        with naming_os_errors(self._path):
            os.fsync(self._file.fileno())
            return {self._path.name: self._file.tell(), **self._events.position()}

    def close(self) -> None:
        """Close both logs."""
        with naming_os_errors(self._path):
            self._file.close()
            self._events.close()


class _Events:
    """TensorBoard's event files in a folder: those of earlier segments, cut to size, and a new one."""

    def __init__(self, folder: Path, position: Mapping[str, int], next_step: int):
        # Imported here, because programs that only read results do not need it.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._earlier = _cut_to_size(folder, position)
        # Readers take files in the order of their names. Whatever this machine's clock says, this one comes last.
        began = [int(found[1]) for name in self._earlier if (found := re.match(rf"{re.escape(EVENTS)}(\d+)", name))]
        second = max([int(time.time()), *(second + 1 for second in began)])
        self._name = f"{EVENTS}{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / self._name, "xb")  # noqa: SIM115 - stays open until close()
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=next_step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        items = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=items))

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        height, width = image.shape[:2]
        picture = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=tag, image=picture)]))

    def position(self) -> dict[str, int]:
        os.fsync(self._file.fileno())
        return {**self._earlier, self._name: self._file.tell()}

    def close(self) -> None:
        self._file.close()

    def _write(self, **content) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


def _cut_to_size(folder: Path, position: Mapping[str, int]) -> dict[str, int]:
    """Cut event files to their sizes of then, and remove those begun since: {name: bytes} of what is left."""
    left = {}
    for path in sorted(folder.glob(f"{EVENTS}*")):
        if path.name not in position:
            path.unlink()
            continue
        left[path.name] = min(path.stat().st_size, position[path.name])
        os.truncate(path, left[path.name])
    return left
