import contextlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import utils.run_folder as module
from utils.errors import RunFolderError
from utils.run_folder import git_commit, json_value, prepare_run_folder, read_json, run_folder, write_json_atomic

OPTIONS = {"n_iters": 100, "upsamp_list": (10, 20), "lr_init": 0.02, "lpips_weights": None, "refresh": 10}


def prepare(folder, overwrite=False, **changes):
    return prepare_run_folder(folder, {**OPTIONS, **changes}, exempt={"refresh", "overwrite"}, overwrite=overwrite)


def test_the_folder_of_a_run_is_named_by_its_parts():
    path = run_folder("log", "paper", "syn", "lego", "full_cp", 3)
    assert path == Path("log/paper/syn/lego/full_cp/seed3")


@pytest.mark.parametrize("tag", ["", " ", "..", ".", "a/b", "a\\b", "/etc"])
def test_a_tag_that_would_leave_its_place_is_refused(tag):
    with pytest.raises(RunFolderError, match="--tag"):
        run_folder("log", "paper", "syn", "lego", tag, 0)


def test_a_folder_goes_from_new_to_resume_to_finished(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare(folder) == "new"
    assert read_json(folder / "args.json") == {**OPTIONS, "upsamp_list": [10, 20]}
    assert prepare(folder) == "resume"
    (folder / "ckpt_5.th").write_text("")
    assert prepare(folder, refresh=20) == "resume"
    (folder / "results.json").write_text("{}")
    assert prepare(folder) == "finished"


@pytest.mark.parametrize(
    ("finished", "before", "after", "refused"),
    [(True, False, True, False), (True, True, False, True), (False, False, True, True)],
)
def test_only_a_run_that_finished_with_all_frames_may_be_asked_to_skip_missing_ones(
    tmp_path, finished, before, after, refused
):
    prepare(tmp_path, skip_missing_frames=before)
    if finished:
        (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunFolderError, match="skip_missing_frames") if refused else contextlib.nullcontext():
        assert prepare(tmp_path, skip_missing_frames=after) == "finished"


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_the_difference_and_the_remedy(tmp_path, finished):
    prepare(tmp_path)
    if finished:
        (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunFolderError) as caught:
        prepare(tmp_path, n_iters=200, fresh=True)
    message = str(caught.value)
    for part in (str(tmp_path), "n_iters: 100 -> 200", "fresh: (absent) -> True", "--overwrite", "--tag"):
        assert part in message
    assert "\n" not in message
    assert "lr_init" not in message
    assert read_json(tmp_path / "args.json")["n_iters"] == 100


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    prepare(tmp_path)
    for name in ("metrics.jsonl", "results.json", "ckpt_12.th", "mesh.ply", "events.out.tfevents.1.host"):
        (tmp_path / name).write_text("")
    for name in ("imgs_vis", "imgs_test_all", "imgs_train_all", "imgs_path_all", "my_pictures"):
        (tmp_path / name / "rgbd").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare(tmp_path, overwrite=True, n_iters=200) == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"args.json", "my_pictures", "notes.txt"}
    assert read_json(tmp_path / "args.json")["n_iters"] == 200


@pytest.mark.parametrize("name", ["results.json", "args.json", "ckpt_5.th"])
def test_a_folder_where_a_file_of_the_run_should_be_is_named_with_its_own_remedy(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(RunFolderError) as caught:
        prepare(tmp_path, overwrite=True)
    assert str(caught.value) == f"{tmp_path / name} is in the way (Is a directory): move or remove it"
    if name == "args.json":
        with pytest.raises(RunFolderError, match=r"args\.json is in the way"):
            write_json_atomic(tmp_path / name, {})


def test_an_interrupted_overwrite_never_leaves_what_looks_finished(tmp_path, monkeypatch):
    names = ("metrics.jsonl", "results.json", "ckpt_12.th", "ckpt_9.th.damaged", "views.npz", "overview.png")
    unlink, rmtree = Path.unlink, shutil.rmtree
    for survive in range(9):
        prepare(tmp_path, overwrite=True)
        for name in names:
            (tmp_path / name).write_text("")
        (tmp_path / "imgs_vis").mkdir()
        removed = []

        def remove(original, path, *args, removed=removed, survive=survive, **kwargs):
            if len(removed) == survive:
                raise KeyboardInterrupt
            removed.append(path)
            original(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda path, *a, **k: remove(unlink, path, *a, **k))
            patch.setattr(shutil, "rmtree", lambda path: remove(rmtree, path))
            with contextlib.suppress(KeyboardInterrupt):
                prepare(tmp_path, overwrite=True, n_iters=200)
        left = {path.name for path in tmp_path.iterdir()}
        assert ("results.json" in left) == (survive == 0)
        assert "args.json" in left or left <= {"args.json"}
        assert prepare(tmp_path, overwrite=True, n_iters=200) == "new"


def test_what_a_killed_run_was_writing_goes_when_it_is_started_again(tmp_path):
    prepare(tmp_path)
    (tmp_path / ".ckpt_12.th.0123abcd.tmp").write_text("")
    assert prepare(tmp_path) == "resume"
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


def test_overwrite_does_not_follow_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep.png").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "imgs_vis").symlink_to(tmp_path / "elsewhere")
    prepare(tmp_path / "run", overwrite=True)
    assert (tmp_path / "elsewhere" / "keep.png").exists()
    assert not (tmp_path / "run" / "imgs_vis").exists()


@pytest.mark.parametrize("content", ["", '{"n_iters": 1', "[1]", "\x00\x01"])
def test_a_damaged_args_json_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"args\.json is damaged.*--overwrite"):
        prepare(tmp_path)


def test_checkpoints_without_args_json_are_not_resumed(tmp_path):
    (tmp_path / "ckpt_5.th").write_text("")
    with pytest.raises(RunFolderError, match=r"without its args\.json"):
        prepare(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=f"cannot write {re.escape(str(tmp_path / 'file' / 'run'))}.*--save_dir"):
        prepare(tmp_path / "file" / "run")


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"psnr": 1})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        write_json_atomic(path, {"psnr": 2})
    assert read_json(path) == {"psnr": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_json_holds_plain_values_and_null_for_what_json_cannot_say():
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "tuple": (1, 2.5, True, None),
        "path": Path("a/b"),
        "numpy": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.tensor([1.0, math.nan]),
        3: {"b", "a"},
    }
    expected = {
        "nan": None,
        "inf": [None, None],
        "tuple": [1, 2.5, True, None],
        "path": str(Path("a/b")),
        "numpy": 0.5,
        "array": [0, 1, 2],
        "tensor": [1.0, None],
        "3": ["a", "b"],
    }
    assert json_value(value) == expected
    assert json.loads(json.dumps(json_value(value), allow_nan=False)) == expected
    with pytest.raises(TypeError):
        json_value(object())


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_repository_of_the_code_and_tells_modified_files(tmp_path, monkeypatch):
    code = tmp_path / "repo" / "utils" / "run_folder.py"
    code.parent.mkdir(parents=True)
    code.write_text("a = 1\n")
    figures = tmp_path / "repo" / "benchmarks" / "results" / "step.json"
    figures.parent.mkdir(parents=True)
    figures.write_text("{}\n")
    monkeypatch.setattr(module, "__file__", str(code))
    assert git_commit() == "unknown"
    git(tmp_path / "repo", "init", "-q")
    assert git_commit() == "unknown"
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-q", "-m", "first")
    commit = git(tmp_path / "repo", "rev-parse", "HEAD").strip()
    (tmp_path / "repo" / "untracked").write_text("")
    figures.write_text('{"ms": 1}\n')  # a measurement's result, which changes no other
    assert git_commit() == commit[:12]
    code.write_text("a = 2\n")
    assert git_commit() == commit[:12] + "-dirty"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_copy_of_the_code_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    code = tmp_path / "copy" / "utils" / "run_folder.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(module, "__file__", str(code))
    assert git_commit() == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"
