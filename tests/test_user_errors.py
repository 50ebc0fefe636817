"""As a new user would: whatever is wrong ends in one line that names it and the remedy, and harms no finished run."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run
import train
from dataLoader.demo_write import write_demo_as
from tests.helpers import ROOT

SCENES = {"syn": "nerf_synthetic/tiny", "nsvf": "Synthetic_NSVF/Tiny", "llff": "nerf_llff_data/tiny"}
TINY = (
    *("--device", "cpu", "--seed", "1", "--n_iters", "4", "--batch_size", "64", "--featureC", "8"),
    *("--N_voxel_init", "512", "--N_voxel_final", "512", "--upsamp_list", "[]", "--update_AlphaMask_list", "[]"),
    *("--n_lamb_sigma", "[2,2,2]", "--n_lamb_sh", "[2,2,2]", "--N_vis", "0", "--render_test", "0"),
)
CP = ("--model_name", "TensorCP", "--n_lamb_sigma", "[3]", "--n_lamb_sh", "[3]")
RENDER = ("--render_only", "1", "--render_test", "1")
# Out of reach of every camera, and behind those that reach it.
FAR_BOX, HIDDEN_BOX = "[100,100,100,101,101,101]", "[-0.1,-0.1,7,0.1,0.1,7.2]"
PROGRESS = re.compile(r"\d+%\||\d+/\d+ \[|^(\x1b\[A|\s)*$")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of three formats, and a finished VM run and CP run over it; copied, never changed."""
    folder = tmp_path_factory.mktemp("made")
    for dataset, name in SCENES.items():
        write_demo_as(dataset, folder / "data" / name, 16, 3, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for options in ((), CP):
            patch.setattr(sys, "argv", ["run.py", *arguments("syn", *options)])
            assert run.exit_code(run.main) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def desk(made, tmp_path, monkeypatch):
    """A working folder with its own copies: data/, and log/ with the finished runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(dataset: str, *options: str) -> list[str]:
    scene = Path(SCENES[dataset]).name
    named = [] if "--nerf_scene" in options else ["--nerf_scene", scene]
    return ["--nerf_dataset", dataset, *named, *TINY, "--data_folder", "data", "--save_dir", "log", *options]


def finished_run(tag: str = "full") -> Path:
    return Path("log/runs/syn/tiny") / tag / "seed1"


@pytest.fixture
def start(desk, monkeypatch, capsys):
    """start(dataset, *options) runs run.py's main in the working folder: (exit code, lines of stderr, stdout)."""

    def go(dataset: str, *options: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments(dataset, *options)])
        capsys.readouterr()
        code = run.exit_code(run.main)
        out, err = capsys.readouterr()
        return code, told(err), out

    return go


@pytest.fixture
def refused(start):
    """refused(dataset, *options, says=[...]): the run ends with code 2 and one line that matches all of `says`, and
    every file that lay in log/ before, but tables, is there as it was. Returns the line."""

    def check(dataset: str, *options: str, says: list[str]) -> str:
        before = {path: data for path, data in contents(Path("log")).items() if path.stem != "res_table"}
        code, lines, _ = start(dataset, *options)
        assert code == 2
        return one_line(lines, says, before)

    return check


def told(stderr: str) -> list[str]:
    """Lines of stderr without progress bars."""
    return [line for line in re.split(r"[\r\n]", stderr) if not PROGRESS.search(line)]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(lines: list[str], says: list[str], before: dict[Path, bytes]) -> str:
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert [pattern for pattern in says if not re.search(pattern, lines[0])] == [], lines[0]
    assert len(before) >= 10
    assert {path: path.read_bytes() for path in before if path.is_file()} == before
    return lines[0]


# --- scenes ---
def missing_images(scene: Path) -> None:
    for name in ("r_0.png", "r_2.png"):
        (scene / "train" / name).unlink()


def truncated_image(scene: Path) -> None:
    path = scene / "train/r_1.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def images_of_two_sizes(scene: Path) -> None:
    path = scene / "train/r_1.png"
    Image.open(path).resize((20, 20)).save(path)


def nan_in_a_pose(scene: Path) -> None:
    path = scene / "transforms_train.json"
    content = json.loads(path.read_text())
    content["frames"][1]["transform_matrix"][0][3] = float("nan")
    path.write_text(json.dumps(content))


def box_without_volume(scene: Path) -> None:
    (scene / "bbox.txt").write_text("0 0 0 1 1 0 0.1\n")


def poses_of_another_shape(scene: Path) -> None:
    np.save(scene / "poses_bounds.npy", np.ones((5, 15)))


FAULTY_SCENES = {
    missing_images: ("syn", ["2 missing: .*train/r_0.png, .*train/r_2.png", "add them, or pass --skip_missing_frames"]),
    truncated_image: ("syn", ["train/r_1.png", "cut short", "restore the file"]),
    images_of_two_sizes: ("syn", ["r_1.png: is 20x20 but .*r_0.png is 16x16", "to one size"]),
    nan_in_a_pose: ("syn", ["transforms_train.json: frame './train/r_1'", "NaN", "correct the pose"]),
    box_without_volume: ("nsvf", ["Tiny/bbox.txt: box has no volume", "write min xyz, then max xyz"]),
    poses_of_another_shape: ("llff", [r"poses_bounds.npy: has shape \(5, 15\), expected \(images, 17\)", "restore"]),
}


@pytest.mark.parametrize("damage", FAULTY_SCENES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("how", [("--tag", "new"), ("--overwrite",)], ids=["new", "overwrite"])
def test_a_faulty_scene_is_named_and_leaves_earlier_runs_alone(refused, damage, how):
    dataset, says = FAULTY_SCENES[damage]
    damage(Path("data") / SCENES[dataset])
    refused(dataset, *how, says=says)
    assert not list(Path("log").rglob("new"))


def test_missing_images_may_be_skipped_as_the_message_says(start):
    missing_images(Path("data") / SCENES["syn"])
    assert start("syn", "--tag", "new", "--skip_missing_frames", "1")[:2] == (0, [])


def test_a_wrong_scene_name_lists_the_scenes_there(refused):
    refused("syn", "--nerf_scene", "tinny", says=["nerf_synthetic/tinny", "scenes there: tiny", "data/README.md"])


def test_a_box_that_no_ray_meets_is_said_when_rays_are_filtered(refused):
    options = ("--tag", "new", "--filter_rays", "1", "--scene_bbox", HIDDEN_BOX)
    refused("syn", *options, says=["tiny: no training ray meets the box", "check --scene_bbox", "--filter_rays 0"])


# --- options ---
def test_an_unknown_option_in_a_config_file_is_named_with_its_file(refused):
    Path("mine.txt").write_text("batch_size = 64\nn_iter = 5\n")
    refused("syn", "--config", "mine.txt", says=["mine.txt: n_iter: is no option: did you mean n_iters?"])


@pytest.mark.parametrize("option", ["n_lamb_sigma", "n_lamb_sh"])
def test_two_numbers_for_three_modes_are_refused(refused, option):
    refused("syn", f"--{option}", "[16,16]", says=[rf"{option} = \[16,16\]", "three modes", r"\[\d+,\d+,\d+\]"])


def test_a_device_that_is_not_there_is_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("syn", "--device", "cuda:7", says=["--device cuda:7", "has 1 CUDA device", "auto"])


def test_a_strategy_that_is_not_there_lists_what_is(refused):
    refused("syn", "--strategy", "edges", says=["--strategy edges: no sampler", "available: .*egra.*full"])


def test_changed_settings_of_a_run_are_shown(refused):
    says = ["full/seed1 ", "batch_size: 64 -> 65, lr_init: 0.02 -> 0.01", "--tag", "--overwrite"]
    refused("syn", "--lr_init", "0.01", "--batch_size", "65", says=says)


def test_changed_settings_may_overwrite_the_run_as_the_message_says(start):
    assert start("syn", "--lr_init", "0.01", "--overwrite")[:2] == (0, [])
    assert json.loads((finished_run() / "args.json").read_text())["lr_init"] == 0.01


def test_an_empty_alpha_mask_says_what_to_change(refused):
    options = ("--tag", "new", "--density_shift", "-40", "--update_AlphaMask_list", "[1]")
    refused("syn", *options, says=["alpha mask is empty", "--scene_bbox", "near and far", "raise --density_shift"])


@pytest.mark.parametrize("masks", ["[]", "[2]"])
def test_a_loss_that_becomes_nan_names_the_step_and_the_rates(refused, masks):
    options = ("--tag", "new", "--lr_init", "1e30", "--update_AlphaMask_list", masks)
    what = r"loss became nan at iteration 2 \(nothing was saved before\)"
    refused("syn", *options, says=[what, "lower --lr_init", "--overwrite"])
    assert not list(Path("log").rglob("new/*/ckpt_*"))


def test_after_a_nan_loss_the_remedy_works(start):
    assert start("syn", "--tag", "new", "--lr_init", "1e30")[0] == 2
    assert start("syn", "--tag", "new", "--overwrite")[:2] == (0, [])


# --- checkpoints ---
class Executed:
    """Would make a file if its pickle were obeyed."""

    def __reduce__(self):
        return open, ("executed", "w")


def write_plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"format": 1, "field": Executed()}, protocol=2))


def write_checkpoint_with_code(path: Path) -> None:
    torch.save({"format": 1, "field": Executed()}, path)


def write_truncated(path: Path) -> None:
    good = (finished_run() / "ckpt_4.th").read_bytes()
    path.write_bytes(good[: len(good) // 2])


def write_cp(path: Path) -> None:
    shutil.copyfile(finished_run("full_cp") / "ckpt_4.th", path)


BAD_CHECKPOINTS = {
    write_plain_pickle: ["could run code; refused", "use a checkpoint of tensors"],
    write_checkpoint_with_code: ["could run code; refused", "use a checkpoint of tensors"],
    write_truncated: ["is damaged or no checkpoint", "remove it"],
    write_cp: ["another field", r"give --model_name TensorCP \(not TensorVMSplit\)", "another checkpoint"],
}


@pytest.mark.parametrize("write", BAD_CHECKPOINTS, ids=lambda write: write.__name__.removeprefix("write_"))
@pytest.mark.parametrize("use", [RENDER, ("--tag", "new")], ids=["render_only", "start"])
def test_a_bad_checkpoint_is_refused_and_runs_nothing(refused, write, use):
    write(Path("bad.th"))
    refused("syn", *use, "--ckpt", "bad.th", says=[r"bad\.th ", *BAD_CHECKPOINTS[write]])
    assert not Path("executed").exists()


@pytest.mark.parametrize("write", BAD_CHECKPOINTS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_a_bad_checkpoint_of_a_run_is_refused_until_it_is_removed(start, refused, write):
    write(finished_run() / "ckpt_4.th")
    (finished_run() / "results.json").unlink()
    refused("syn", says=[r"full/seed1/ckpt_4\.th ", *BAD_CHECKPOINTS[write]])
    assert not Path("executed").exists()
    (finished_run() / "ckpt_4.th").unlink()
    assert start("syn")[:2] == (0, [])


@pytest.mark.parametrize("write", BAD_CHECKPOINTS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_overwriting_from_a_bad_checkpoint_keeps_the_run_that_was_there(refused, write):
    write(Path("bad.th"))
    refused("syn", "--overwrite", "--ckpt", "bad.th", says=[r"bad\.th ", *BAD_CHECKPOINTS[write]])
    assert (finished_run() / "results.json").exists()


def test_a_run_may_be_overwritten_starting_from_its_own_checkpoint(start):
    assert start("syn", "--overwrite", "--ckpt", str(finished_run() / "ckpt_4.th"))[:2] == (0, [])


def test_after_a_refused_checkpoint_the_same_folder_takes_another(start):
    write_truncated(Path("bad.th"))
    assert start("syn", "--tag", "new", "--ckpt", "bad.th")[0] == 2
    assert start("syn", "--tag", "new", "--ckpt", str(finished_run() / "ckpt_4.th"))[:2] == (0, [])


def test_a_box_that_no_camera_reaches_is_said_before_the_first_step(start):
    code, lines, _ = start("syn", "--tag", "new", "--scene_bbox", FAR_BOX)
    assert code == 2
    assert len([line for line in lines if "no camera reaches the box" in line and "check --scene_bbox" in line]) == 2


def test_overwriting_with_a_box_that_no_ray_meets_keeps_the_run_that_was_there(refused):
    refused("syn", "--overwrite", "--filter_rays", "1", "--scene_bbox", HIDDEN_BOX, says=["no training ray"])
    assert (finished_run() / "results.json").exists()


def test_a_box_that_no_ray_meets_is_said_without_filtering_too(refused):
    refused(
        "syn", "--tag", "new", "--scene_bbox", HIDDEN_BOX, says=["no ray of the first 4 iterations", "--scene_bbox"]
    )


def test_a_last_step_that_spoils_the_field_is_no_finished_run(refused):
    options = ("--tag", "new", "--n_iters", "1", "--lr_init", "1e38")
    refused("syn", *options, says=["NaN or infinite before iteration 1", "lower --lr_init", "--overwrite"])
    assert not (finished_run("new") / "results.json").exists()


@pytest.mark.parametrize("file", ["nowhere/field.th", "data"])
def test_an_export_that_cannot_be_written_is_refused_before_training(refused, file):
    refused("syn", "--tag", "new", "--export_tensorf", file, says=[f"export_tensorf = {file}", "make the folder"])
    assert not finished_run("new").exists()


def test_the_pickle_of_these_tests_does_run_code_where_it_is_obeyed(desk):
    pickle.loads(pickle.dumps(Executed())).close()
    assert Path("executed").exists()


def test_render_only_without_a_checkpoint_says_where_one_may_come_from(refused):
    refused("syn", *RENDER, "--tag", "new", says=["--render_only", "tiny/new/seed1 holds no checkpoint", "--ckpt"])


def test_a_checkpoint_that_is_not_there_is_named(refused):
    refused("syn", "--ckpt", "nowhere.th", says=["ckpt = nowhere.th: there is no such file", "ckpt_{iteration}.th"])


# --- folders and disks ---
@pytest.mark.parametrize("file", ["args.json", "metrics.jsonl", "ckpt_4.th", "results.json"])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(start, refused, monkeypatch, file):
    replace = os.replace

    def full(source, target):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused("syn", "--tag", "new", says=[f"new/seed1/{file} ", os.strerror(errno.ENOSPC), "space", "--save_dir"])
    assert not list(Path("log").rglob("*.tmp"))
    assert start("syn", "--tag", "new")[:2] == (0, [])


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_named(refused, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if list(Path("log").rglob(".ckpt_4.th.*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused("syn", "--tag", "new", says=["new/seed1/ckpt_4.th ", os.strerror(errno.ENOSPC), "space"])
    assert [path.name for path in Path("log").rglob("new/seed1/*ckpt*")] == []


def test_a_disk_that_is_full_when_pictures_are_written_is_named(refused, monkeypatch):
    def full(self, path, *more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    options = ("--tag", "new", "--render_test", "1")
    refused("syn", *options, says=["imgs_test_all/000.png", os.strerror(errno.ENOSPC), "free some space"])


@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/log"])
def test_a_save_dir_that_is_a_file_is_refused(refused, place):
    Path("notes.txt").write_text("mine")
    refused("syn", "--save_dir", place, says=["cannot write notes.txt", "choose a --save_dir that can be written"])
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_save_dir_without_permission_is_refused(refused):
    Path("locked").mkdir(mode=0o500)
    refused("syn", "--save_dir", "locked", says=["cannot write locked/", os.strerror(errno.EACCES), "--save_dir"])


# --- stopping and starting again ---
def test_a_finished_run_says_so_and_trains_nothing(start, monkeypatch):
    before = contents(Path("log/runs/syn/tiny"))
    monkeypatch.setattr(train.Trainer, "step", lambda self: pytest.fail("a finished run trains"))
    code, lines, out = start("syn")
    assert (code, lines) == (0, [])
    assert re.search(r"full/seed1: this run is finished; --overwrite .*--render_only 1", out)
    assert contents(Path("log/runs/syn/tiny")) == before


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_field(start, monkeypatch):
    step = train.Trainer.step

    def interrupted(self):
        if self.iteration == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        code, lines, _ = start("syn", "--tag", "new", "--save_every", "2")
    assert code == 130
    assert lines == ["interrupted; the same command again goes on from the last checkpoint"]
    code, lines, out = start("syn", "--tag", "new", "--save_every", "2")
    assert (code, lines) == (0, [])
    assert "resuming log/runs/syn/tiny/new/seed1 at iteration 2" in out
    assert_same_field(finished_run("new") / "ckpt_4.th", finished_run() / "ckpt_4.th")


def assert_same_field(path: Path, other: Path) -> None:
    def tensors(path):
        found = {}

        def collect(value, name):
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, dict):
                for key, item in value.items():
                    collect(item, f"{name}.{key}")

        collect(torch.load(path, weights_only=True)["field"], "field")
        return found

    ours, theirs = tensors(path), tensors(other)
    assert len(ours) > 10
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def in_a_shell(*options: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments("syn", *options)]


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_from_its_checkpoint(start):
    options = ("--tag", "new", "--n_iters", "60", "--batch_size", "512", "--save_every", "4")
    folder = finished_run("new")
    with subprocess.Popen(in_a_shell(*options), env=one_thread(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("ckpt_*.th")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    code, lines, out = start("syn", *options)
    assert (code, lines) == (0, [])
    assert re.search(r"resuming .*new/seed1 at iteration [1-9]", out)
    assert (folder / "ckpt_60.th").exists()
    assert (folder / "results.json").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_the_script_itself_ends_with_one_line_and_code_2(desk):
    before = contents(Path("log"))
    write_truncated(Path("bad.th"))
    command = in_a_shell("--tag", "new", "--ckpt", "bad.th")
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    one_line(told(done.stderr), [r"bad\.th is damaged"], before)


def test_the_script_started_again_ends_at_once(desk):
    began = time.monotonic()
    done = subprocess.run(in_a_shell(), env=one_thread(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "this run is finished" in done.stdout
    assert time.monotonic() - began < 30
