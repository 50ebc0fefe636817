"""Sweeps as a user starts them, with real (tiny) runs in processes of their own."""

import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import pytest

import run
from dataLoader.demo_write import write_demo_as
from opt import REPOSITORY
from utils.jobs import State, folder_state
from utils.launchers import Event, LocalLauncher

TINY = "--device cpu --batch_size 64 --featureC 8 --N_voxel_init 512 --N_voxel_final 512 --upsamp_list [] "
TINY += "--update_AlphaMask_list [] --n_lamb_sigma [2,2,2] --n_lamb_sh [2,2,2] --N_vis 0 --render_test 0 --seed 1 "
TINY += "--data_folder data --nerf_dataset syn --save_every 20"
PATIENCE_SECONDS = 120


def sweep(*more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a sweep that this process starts."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["run.py", *TINY.split(), *more])
        return run.exit_code(run.main), out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working folder with two scenes, of which one lacks an image."""
    folder = tmp_path_factory.mktemp("desk")
    for scene in ("good", "poor"):
        write_demo_as("syn", folder / "data/nerf_synthetic" / scene, 16, 3, 2)
    (folder / "data/nerf_synthetic/poor/train/r_1.png").rename(folder / "r_1.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def swept(desk):
    """The sweep over both scenes, once: (exit code, stdout, stderr)."""
    return sweep("--multi_data", "--n_iters", "5", "--jobs", "2")


def test_a_bad_scene_is_listed_and_the_others_finish(swept):
    code, out, err = swept
    assert code == 1
    assert re.search(r"\d of 2: syn/good/full/seed1 finished: PSNR \d+\.\d\d dB, \d s of training\n", out)
    assert out.endswith("2 runs: 1 finished, 1 failed\n")
    assert err.splitlines()[-2] == "1 of 2 runs failed:"
    assert err.splitlines()[-1].startswith("syn/poor/full/seed1: ")
    assert "r_1.png" in err.splitlines()[-1]
    good, poor = (Path("log/runs/syn") / scene / "full/seed1" for scene in ("good", "poor"))
    assert json.loads((good / "results.json").read_text())["n_iters"] == 5
    failure = json.loads((poor / "failed.json").read_text())
    assert (failure["kind"], failure["exit_code"]) == ("SceneError", 2)
    assert failure["error"] in (poor / "run.log").read_text()
    assert {path.name for path in poor.iterdir()} == {"failed.json", "run.log"}
    assert "| good |" in (Path("log/runs/syn/res_table.md")).read_text()


def test_a_dry_run_says_all_and_changes_nothing(swept):
    before = contents(Path())
    code, out, err = sweep("--multi_data", "--n_iters", "6", "--strategies", "full,egra", "--dry_run")
    assert (code, err) == (0, "")
    assert contents(Path()) == before
    lines = out.splitlines()
    assert re.match(r"syn/good/full/seed1 +refused: .*n_iters: 5 -> 6", lines[0])
    assert re.match(r"syn/good/egra/seed1 +new$", lines[1])
    assert re.match(r"syn/poor/full/seed1 +failed: .*r_1.png.*; is not started$", lines[2])
    assert lines[4] == "4 runs: 2 new, 1 failed, 1 refused; 2 to start"


def test_nothing_is_trained_again_until_it_is_asked_for(swept):
    before = contents(Path("log/runs/syn/good"))
    code, out, err = sweep("--multi_data", "--n_iters", "5")
    assert code == 1
    assert err.splitlines() == swept[2].splitlines()[-2:]
    assert "syn/poor/full/seed1 not started: failed: " in out
    assert out.count("--retry_failed starts them again") == 1
    assert contents(Path("log/runs/syn/good")) == before


def test_changed_settings_are_refused_and_listed_and_harm_nobody(swept):
    before = contents(Path("log/runs/syn/good"))
    code, _, err = sweep("--nerf_scene", "good", "--n_iters", "5", "--batch_size", "65", "--shard", "0/1")
    assert code == 1
    assert err.splitlines()[0] == "1 of 1 runs failed:"
    assert "batch_size: 64 -> 65" in err
    assert "--overwrite starts every run of its command afresh, finished ones too" in err.splitlines()[-1]
    assert contents(Path("log/runs/syn/good")) == before


def test_a_mended_scene_is_trained_with_retry_failed(desk, swept):
    (desk / "r_1.png").rename(desk / "data/nerf_synthetic/poor/train/r_1.png")
    code, out, err = sweep("--multi_data", "--n_iters", "5", "--retry_failed")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "2 runs: 2 finished"
    assert not list(Path("log").rglob("failed.json"))
    assert "| poor |" in (Path("log/runs/syn/res_table.md")).read_text()


# --- signals ---
TWO = "--nerf_scene good --strategies full,egra"
LONG = f"{TWO} --n_iters 1000000 --jobs 2 --up_folder_name long"


def start_long_sweep() -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A sweep in a process of its own, and those of its two runs, as soon as both have written a new checkpoint."""
    before = checkpoints()
    command = [sys.executable, str(REPOSITORY / "run.py"), *TINY.split(), *LONG.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len({path.parent for path in checkpoints() - before}) == 2, process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    return process, children


def checkpoints() -> set[Path]:
    return set(Path("log").glob("long/syn/good/*/seed1/ckpt_*.th"))


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def assert_both_can_go_on() -> None:
    code, out, _ = sweep(*LONG.split(), "--dry_run")
    assert code == 0
    assert out.splitlines()[-1] == "2 runs: 2 started; 2 to start"
    assert out.count("goes on from ckpt_") == 2


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of POSIX")
def test_a_signal_ends_a_sweep_with_75_and_a_kill_takes_its_runs_along(desk):
    process, children = start_long_sweep()
    code, out, _ = sweep(*LONG.split(), "--dry_run")
    assert (code, out.splitlines()[-1]) == (0, "2 runs: 2 running elsewhere; 0 to start")
    assert f"process {children[0].pid} on " in out
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, err
    assert "stopped by SIGUSR1: the runs save a checkpoint and end" in out
    assert err.endswith("stopped with 2 of 2 runs to go; the same command again goes on\n")
    assert not any(child.is_running() for child in children)
    assert_both_can_go_on()

    # The same command again goes on, until somebody kills it in a way that it cannot pass on.
    process, children = start_long_sweep()
    process.kill()
    process.communicate()
    wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))
    assert_both_can_go_on()


def test_two_sweeps_at_once_train_every_run_once(desk):
    arguments = [*TINY.split(), *TWO.split(), "--n_iters", "200", "--up_folder_name", "raced"]
    jobs = [run.job_of(options) for options in run.planned_runs(arguments, 0)]
    sweeps = [LocalLauncher(run.JOB_COMMAND, [{}]).run(jobs) for _ in range(2)]
    # Both start the first run before either can have seen the other's.
    events = [event for pair in itertools.zip_longest(*sweeps, fillvalue=Event()) for event in pair if event.job]
    assert [event.job for event in events[:2]] == [jobs[0], jobs[0]]
    states = [event.outcome.state for event in events if event.outcome]
    assert len(states) == 4
    assert {*states} <= {State.FINISHED, State.RUNNING}
    for job in jobs:
        assert folder_state(job.folder) == (State.FINISHED, "")
        assert len(list(job.folder.glob("events.out.*"))) == 1
        steps = [json.loads(line)["step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted({*steps})
    assert "is in use by process" in (jobs[0].folder / "run.log").read_text()
    assert not list(Path("log/raced").rglob("failed.json"))
