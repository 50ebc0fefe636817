"""The curves of a run, thinned out from its metrics.jsonl for results.json."""

import json
from pathlib import Path

MOST_POINTS = 200
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
    in between. Lines that are no table, or torn, are left out.
    """
    training: list[dict] = []
    seconds: dict[int, float] = {}
    test: dict[str, list] = {"iteration": [], "train_seconds": [], "psnr": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if TRAINING["train_seconds"] in record:
            seconds[step] = record[TRAINING["train_seconds"]]
            training.append({"iteration": step, **{name: record.get(tag) for name, tag in TRAINING.items()}})
        if "test/psnr" in record and step in seconds:
            for name, value in (("iteration", step), ("train_seconds", seconds[step]), ("psnr", record["test/psnr"])):
                test[name].append(value)
    stride = -(-len(training) // MOST_POINTS) or 1
    thinned = training[::-1][::stride][::-1]
    return {name: [point[name] for point in thinned] for name in ("iteration", *TRAINING)}, test
