import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoints import latest_checkpoint, load_checkpoint, load_latest, prune_checkpoints, save_checkpoint
from utils.errors import CheckpointError, DamagedCheckpointError, RunFolderError

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


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(40, generator=generator), "b": {"c": torch.arange(9), "d": [1, 2.5, "x"]}}
    path = tmp_path / "ckpt_5.th"
    save_checkpoint(state, path)
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 7):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except DamagedCheckpointError as error:
            assert "is damaged" in str(error)  # noqa: PT017 - it may as well not be raised
            refused += 1
            continue
        assert loaded.keys() == state.keys()
        assert torch.equal(loaded["a"], state["a"])
        assert torch.equal(loaded["b"].pop("c"), state["b"]["c"])
        assert loaded["b"] == {"d": [1, 2.5, "x"]}
    assert refused > 100


def test_a_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    save_checkpoint({"a": 1}, tmp_path / "ckpt_5.th")

    def load(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 100 bytes.")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate"):
        load_checkpoint(tmp_path / "ckpt_5.th")


def test_a_file_that_unpacks_to_more_than_it_holds_is_not_unpacked(tmp_path):
    path = tmp_path / "ckpt_5.th"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt_5/data.pkl", bytes(10**8))
    assert "damaged" in refusal_of(path)


def latest(folder):
    return load_latest(folder, lambda path: load_checkpoint(path)["step"])


def test_the_latest_whole_checkpoint_is_loaded_and_damaged_ones_after_it_are_set_aside(tmp_path, capsys):
    for step in (5, 10, 15, 20):
        save_checkpoint({"step": step}, tmp_path / f"ckpt_{step}.th")
    assert latest(tmp_path) == 20
    for step in (5, 15, 20):  # the first is not looked at
        (tmp_path / f"ckpt_{step}.th").write_bytes(b"")
    assert latest(tmp_path) == 10
    assert {p.name for p in tmp_path.iterdir()} == {
        *("ckpt_5.th", "ckpt_10.th", "ckpt_15.th.damaged", "ckpt_20.th.damaged")
    }
    assert [line.split(" is damaged")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "ckpt_20.th"),
        str(tmp_path / "ckpt_15.th"),
    ]
    assert latest_checkpoint(tmp_path).name == "ckpt_10.th"


def test_a_folder_named_like_a_checkpoint_is_set_aside_like_a_damaged_one(tmp_path, capsys):
    save_checkpoint({"n": 1}, tmp_path / "ckpt_1.th")
    (tmp_path / "ckpt_2.th").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"ckpt_2\.th is no file, so no checkpoint"):
        load_checkpoint(tmp_path / "ckpt_2.th")
    assert load_latest(tmp_path, load_checkpoint) == {"n": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1.th", "ckpt_2.th.damaged"]
    assert "ckpt_1.th takes its place" in capsys.readouterr().out


def test_another_fault_of_the_latest_checkpoint_is_not_passed_over(tmp_path):
    for step in (5, 10):
        save_checkpoint({"step": step}, tmp_path / f"ckpt_{step}.th")
    torch.save([1], tmp_path / "ckpt_10.th")
    with pytest.raises(CheckpointError, match="no dictionary"):
        latest(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt_5.th", "ckpt_10.th"}


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
