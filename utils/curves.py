"""The curves of a run, thinned out from its metrics.jsonl for results.json."""

from collections.abc import Iterator
from pathlib import Path

from utils.errors import RunFolderError
from utils.files import open_regular, parse_json, reason

MOST_POINTS = 200
# Ours have some hundred bytes.
MAX_LINE_BYTES = 2**16
# A machine that dies tears a line; a file of nothing else is not worth reading to its end.
MOST_BAD_LINES = 1000
TRAINING = {
    "train_seconds": "time/train_seconds",
    "train_psnr": "train/PSNR",
    "step_ms": "time/step_ms",
    "allocated_mb": "memory/allocated_mb",
    "peak_mb": "memory/peak_mb",
}


def read_curves(path: Path) -> tuple[dict[str, list], dict[str, list]]:
    """(training, test): lists of one length each by name, `iteration` and `train_seconds` among them.

    training: what every logged step has, at most 200 points, the last one included. test: `psnr` of the evaluations
    in between. Lines that are no table of numbers, or torn, are left out. RunFolderError if the file cannot be read.
    """
    training: list[dict] = []
    seconds: dict[int, float] = {}
    test: dict[str, list] = {"iteration": [], "train_seconds": [], "psnr": []}
    for step, record in _records(path):
        if TRAINING["train_seconds"] in record:
            seconds[step] = record[TRAINING["train_seconds"]]
            training.append({"iteration": step, **{name: record.get(tag) for name, tag in TRAINING.items()}})
        if "test/psnr" in record and step in seconds:
            for name, value in (("iteration", step), ("train_seconds", seconds[step]), ("psnr", record["test/psnr"])):
                test[name].append(value)
    stride = -(-len(training) // MOST_POINTS) or 1
    thinned = training[::-1][::stride][::-1]
    return {name: [point[name] for point in thinned] for name in ("iteration", *TRAINING)}, test


def _records(path: Path) -> Iterator[tuple[int, dict]]:
    """(step, numbers by tag) of each good line."""
    bad = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                try:
                    record = parse_json(line.decode("utf-8", errors="replace"), finite=True)
                    yield int(record["step"]), {k: v for k, v in record.items() if _is_number(v)}
                except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                    bad += 1
                    if bad > MOST_BAD_LINES:
                        raise RunFolderError(f"{path} is damaged: start the run with --overwrite") from None
    except OSError as error:
        raise RunFolderError(f"cannot read {path} ({reason(error)}): start the run with --overwrite") from error


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
