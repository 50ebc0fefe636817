"""Before step 0 all that is wrong with scene, options and machine is told at once; --check_only stops there."""

import json
import re
import shutil
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataLoader.assemble
import run
import train
import utils.device
import utils.resources
from dataLoader import inspect_scene, load_scene
from models import build_field
from models.config import FieldConfig
from models.sizes import n_parameters
from tests.helpers import GOLDEN
from utils.errors import SceneError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = (
    *("--device", "cpu", "--n_iters", "2", "--batch_size", "32", "--N_voxel_init", "64"),
    *("--N_voxel_final", "64", "--upsamp_list", "[]", "--update_AlphaMask_list", "[]", "--N_vis", "0"),
    *("--render_test", "0", "--data_folder", "data", "--save_dir", "log"),
)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with two copies of the golden synthetic scene, good and bad."""
    for name in ("bad", "good"):
        shutil.copytree(GOLDEN / "scenes/nerf_synthetic/tiny", tmp_path / "data/nerf_synthetic" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data/nerf_synthetic"


@pytest.fixture
def start(desk, monkeypatch, capsys):
    """start(*options) runs run.py's main: (exit code, stdout, stderr)."""

    def go(*options: str) -> tuple[int, str, str]:
        dataset = () if "--datasets" in options else ("--nerf_dataset", "syn")
        monkeypatch.setattr(sys, "argv", ["run.py", *TINY, *dataset, *options])
        capsys.readouterr()
        code = run.exit_code(run.main)
        out, err = capsys.readouterr()
        return code, out, err

    return go


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def spoil(folder: Path) -> list[str]:
    """Damage of every kind in both splits; what the report must say, one pattern a fault."""

    def change(content):
        content["camera_angle_x"] = 9
        content["frames"][1]["transform_matrix"][0][0] = float("nan")
        content["frames"].append({"file_path": "./train/r_9", "transform_matrix": np.eye(4).tolist()})
        content["frames"].append(7)

    edit(folder / "transforms_train.json", change)
    (folder / "train/r_2.png").write_bytes(b"<html>")
    Image.new("RGB", (7, 5)).save(folder / "train/r_0.png")
    whole = (folder / "test/r_4.png").read_bytes()
    (folder / "test/r_4.png").write_bytes(whole[:-30])
    return [
        "below pi",
        "holds NaN or inf",
        "1 missing: .*r_9",
        "frame 5 is no object",
        "no image that can",
        "7x5",
        "cut short",
    ]


# --- all at once ---
def test_all_faults_of_both_splits_are_told_at_once_and_no_image_is_decoded(start, desk, monkeypatch):
    expected = spoil(desk / "bad")
    monkeypatch.setattr(dataLoader.assemble, "decode_images", lambda *_: pytest.fail("decoded an image"))
    for options in ((), ("--check_only",)):
        code, out, err = start("--nerf_scene", "bad", *options)
        assert code == 2
        told = out + err
        assert [pattern for pattern in expected if not re.search(pattern, told)] == []
        assert "Traceback" not in told
    assert not Path("log").exists()


def test_a_thousand_faults_of_a_kind_are_counted_not_listed(desk):
    def change(content):
        for number in range(1000):
            content["frames"].append({"file_path": f"x{number}", "transform_matrix": [[number]]})

    edit(desk / "bad/transforms_train.json", change)
    with pytest.raises(SceneError) as caught:
        load_scene("syn", "data", "bad", "train", 1, progress=False)
    text = str(caught.value)
    assert "1000 problems" in text
    assert "poses (1000):" in text
    assert "992 more of this kind" in text
    assert len(text.splitlines()) < 15


# --- check_only ---
def test_check_only_says_what_there_is_and_leaves_no_trace(start):
    code, out, err = start("--nerf_scene", "good", "--check_only")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "syn/good: good"
    assert "train: 4 images, " in out
    assert "test: 2 images" in out
    assert not Path("log").exists()


def test_check_only_goes_on_past_a_bad_scene(start, desk):
    spoil(desk / "bad")
    (desk / "worse").mkdir()
    (desk / "worse/transforms_train.json").write_text("[")
    code, out, err = start("--multi_data", "--check_only", "--strategies", "full,soft", "--seeds", "2")
    assert code == 2
    heads = [line for line in out.splitlines() if line.startswith("syn/")]
    assert heads == ["syn/bad: problems", "syn/good: good", "syn/worse: problems"]
    assert "2 of 3 scenes have problems" in err


def test_check_only_looks_at_the_data_sets_that_are_there_and_names_all_that_are_not(start, desk):
    (desk / "halfdone").mkdir()
    code, out, err = start("--datasets", "nsvf,syn,llff", "--check_only")
    assert code == 2
    assert "left out: nerf_synthetic/halfdone (no transforms_train.json)" in out
    assert "syn/bad: good" in out
    assert len(re.findall(r"^(error: )?data/(Synthetic_NSVF|nerf_llff_data) is not there", err, re.M)) == 2
    code, _, sweep = start("--datasets", "nsvf,syn,llff", "--dry_run")
    assert (code, sweep) == (2, err + "or name those you have: --datasets syn\n")
    assert "--demo" not in err


def test_check_only_says_once_what_holds_for_all_runs(start, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    utils.device._tell_cpu.cache_clear()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/alexnet-0.pth").touch()
    code, out, _ = start("--multi_data", "--check_only", "--strategies", "full,soft", "--device", "auto")
    assert code == 0
    assert out.count("using the CPU") == 1
    assert re.findall("LPIPS.*", out) == [
        f"LPIPS weights: alex there, vgg missing (n/a in tables); they are looked for in {tmp_path / 'hub/checkpoints'}"
    ]


def test_check_only_of_a_scene_that_is_not_there_is_an_error(start):
    code, out, err = start("--nerf_scene", "none", "--check_only")
    assert code == 2
    assert "scenes there: bad, good" in out + err


def test_check_only_does_not_draw_the_demo_scene(start):
    code, out, _ = start("--nerf_dataset", "demo", "--check_only")
    assert code == 0
    assert "drawn when it is first used" in out
    assert not Path("data/demo").exists()


# --- what is checked ---
def notes_and_problems(**options):
    found = inspect_scene("syn", "data", "bad", {"train": 1.0, "test": 1.0}, **options)
    return list(found.problems.notes), found.problems.lines()


def test_a_frame_twice_is_a_note_with_two_poses_a_problem(desk):
    path = desk / "bad/transforms_train.json"
    edit(path, lambda content: content["frames"].append(content["frames"][0]))
    notes, problems = notes_and_problems()
    assert "is there twice; one is used" in notes[0]
    assert problems == []
    edit(path, lambda content: content["frames"][-1]["transform_matrix"][0].__setitem__(3, 9.0))
    assert "is there twice with different poses" in notes_and_problems()[1][1]


def test_images_in_both_splits_are_noted(desk):
    shutil.copy(desk / "bad/transforms_train.json", desk / "bad/transforms_test.json")
    assert any("4 images are in both splits" in note for note in notes_and_problems()[0])


def test_two_images_with_one_pose_are_noted(desk):
    def change(content):
        content["frames"][1]["transform_matrix"] = content["frames"][0]["transform_matrix"]

    edit(desk / "bad/transforms_train.json", change)
    assert any("1 images have the pose of another one" in note for note in notes_and_problems()[0])


def test_one_mirrored_pose_among_others_is_a_problem_all_mirrored_are_not(desk):
    def mirror(frame):
        for row in frame["transform_matrix"][:3]:
            row[0] = -row[0]

    path = desk / "bad/transforms_train.json"
    edit(path, lambda content: mirror(content["frames"][2]))
    assert "mirror images of the others (r_2.png)" in notes_and_problems()[1][1]
    edit(path, lambda content: [mirror(content["frames"][i]) for i in (0, 1, 3)])
    assert notes_and_problems()[1] == []


def test_a_box_out_of_every_cameras_reach_is_a_problem(desk):
    assert "no camera reaches the box" in notes_and_problems(scene_bbox=[100, 100, 100, 101, 101, 101])[1][1]
    assert notes_and_problems(scene_bbox=[-0.1, -0.1, -0.1, 0.1, 0.1, 0.1])[1] == []


def test_a_focal_length_that_no_camera_has_is_a_problem(desk):
    edit(desk / "bad/transforms_train.json", lambda content: content.update(camera_angle_x=3.141))
    assert "are impossible for images" in notes_and_problems()[1][1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--batch_size", "1000000000"), ("--N_voxel_init", "1000000000000"), ("--lpips_weights", "data")],
)
def test_what_the_machine_lacks_is_told_before_the_first_step(start, option, value):
    code, _, err = start("--nerf_scene", "good", "--N_voxel_final", "1000000000000", option, value)
    assert code == 2
    assert option in err or "--N_voxel_final" in err
    assert not list(Path().glob("log/**/ckpt*"))


def test_a_disk_without_room_for_a_checkpoint_is_refused_little_room_is_noted(start, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(utils.resources.shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    code, out, _ = start("--nerf_scene", "good", "--check_only")
    assert code == 2
    assert "less than one checkpoint: free some space" in out
    monkeypatch.setattr(utils.resources.shutil, "disk_usage", lambda _: usage(10, 10, 900_000))
    code, out, _ = start("--nerf_scene", "good", "--check_only")
    assert code == 0
    assert "it may not suffice" in out


def test_a_save_dir_that_cannot_be_written_is_told(start):
    Path("notes.txt").write_text("mine")
    code, out, _ = start("--nerf_scene", "good", "--check_only", "--save_dir", "notes.txt/log")
    assert code == 2
    assert "notes.txt is a file" in out


def test_steps_of_a_schedule_that_the_run_never_reaches_are_told(start):
    code, out, err = start("--nerf_scene", "good", "--upsamp_list", "[1,2,3]", "--check_only")
    assert code == 0
    assert "note: n_iters = 2 never reaches upsamp_list's 2, 3: the grid does not grow there" in out + err
    assert "update_AlphaMask_list" not in out + err
    code, out, err = start("--nerf_scene", "good", "--update_AlphaMask_list", "[1,9]", "--n_iters", "9", "--check_only")
    assert "n_iters = 9 never reaches update_AlphaMask_list's 9: no alpha mask is made there" in out + err
    assert "upsamp_list" not in out + err


# --- how large a field is ---
@pytest.mark.parametrize("shading", ["MLP_Fea", "MLP", "MLP_PE", "SH", "RGB"])
@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_the_size_of_a_field_is_known_without_building_it(model, shading):
    vm = model == "TensorVMSplit"
    config = FieldConfig(model, (2, 3, 4) if vm else (5,), (3, 1, 2) if vm else (6,), shading=shading, hidden=11)
    config = replace(config, n_features=3 if shading == "RGB" else 27, pos_pe=3)
    field = build_field(config, torch.tensor([[-1.0] * 3, [1.0] * 3]), (4, 5, 7))
    assert n_parameters(config, (4, 5, 7)) == sum(p.numel() for p in field.parameters())


@pytest.mark.skipif(not (SHARED / "nerf_synthetic/lego").is_dir(), reason="needs the lego scene in ../shared")
def test_lego_is_looked_at_in_less_than_two_seconds():
    began = time.process_time()
    found = inspect_scene("syn", SHARED, "lego", {"train": 1.0, "test": 1.0})
    assert time.process_time() - began < 2.0
    assert {split: str(plan) for split, plan in found.plans.items()} == {
        "train": "train: 100 images, 800x800 RGBA",
        "test": "test: 200 images, 800x800 RGBA",
    }
    assert len(found.problems) == len(found.problems.notes) == 0


def test_training_looks_at_the_scene_once(start, monkeypatch):
    looked = []
    monkeypatch.setattr(train, "inspect_scene", lambda *a, **k: looked.append(a) or inspect_scene(*a, **k))
    assert start("--nerf_scene", "good")[0] == 0
    assert len(looked) == 1
