import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoints import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from utils.errors import CheckpointError, RunFolderError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"


class RunsCode:
    """Unpickling this creates a folder."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def refusal_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    state = {"step": 7, "grid": torch.arange(6.0).reshape(2, 3), "nested": {"list": [1, "a", None, True]}}
    save_checkpoint(state, tmp_path / "ckpt_7.th")
    loaded = load_checkpoint(tmp_path / "ckpt_7.th")
    assert torch.equal(loaded.pop("grid"), state.pop("grid"))
    assert loaded == state
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_7.th"]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.th")), ids=lambda path: path.stem)
def test_tensorf_checkpoints_load_with_their_numpy_mask(path):
    state = load_checkpoint(path)
    shape = state["alphaMask.shape"]
    mask = state["alphaMask.mask"]
    assert isinstance(mask, np.ndarray)
    assert mask.dtype == np.uint8
    assert len(mask) == -(-np.prod(shape) // 8)
    assert state["kwargs"]["aabb"].shape == (2, 3)


def test_the_list_of_safe_objects_does_not_outlive_the_call():
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(GOLDEN / "vm_rgb.th")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path, save):
    save({"a": RunsCode(tmp_path / "trace")}, tmp_path / "evil.th")
    assert "could run code; refused" in refusal_of(tmp_path / "evil.th")
    assert not (tmp_path / "trace").exists()


def test_a_numpy_array_of_objects_is_refused(tmp_path):
    torch.save({"a": np.array([RunsCode(tmp_path / "trace")], dtype=object)}, tmp_path / "evil.th")
    assert "refused" in refusal_of(tmp_path / "evil.th")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_called_damaged(tmp_path, keep):
    whole = (GOLDEN / "vm_rgb.th").read_bytes()
    path = tmp_path / "ckpt_5.th"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert "damaged" in refusal_of(path)


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_a_checkpoint_error(tmp_path, seed):
    path = tmp_path / "ckpt_5.th"
    path.write_bytes(np.random.default_rng(seed).bytes(300))
    refusal_of(path)


def test_a_missing_checkpoint_and_one_without_a_dictionary_are_named(tmp_path):
    assert "no such checkpoint" in refusal_of(tmp_path / "none.th")
    torch.save([1, 2], tmp_path / "list.th")
    assert "no dictionary" in refusal_of(tmp_path / "list.th")


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary_file(tmp_path):
    path = tmp_path / "ckpt_1.th"
    save_checkpoint({"a": 1}, path)
    program = (
        "import resource, torch\n"
        "from utils.checkpoints import save_checkpoint\n"
        "from utils.errors import RunFolderError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    save_checkpoint({{'a': torch.zeros(100_000)}}, {str(path)!r})\n"
        "except RunFolderError as error:\n"
        "    print(error)\n"
    )
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    assert "free some space" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_1.th"]
    assert load_checkpoint(path) == {"a": 1}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"ckpt_1\.th"):
        save_checkpoint({}, tmp_path / "file" / "ckpt_1.th")


def test_the_latest_checkpoint_is_that_of_the_highest_iteration_not_of_the_last_name(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("ckpt_999.th", "ckpt_10000.th", "ckpt_x.th", "other_99999.th", "ckpt_20000.th.bak"):
        (tmp_path / name).write_text("")
    assert latest_checkpoint(tmp_path) == tmp_path / "ckpt_10000.th"


def test_pruning_keeps_the_latest_and_touches_nothing_else(tmp_path):
    names = ["ckpt_5.th", "ckpt_900.th", "ckpt_1000.th", "ckpt_best.th", "notes.txt", ".ckpt_8.th.12.tmp"]
    for name in names:
        (tmp_path / name).write_text("")
    prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt_900.th", "ckpt_1000.th", "ckpt_best.th", "notes.txt"}
