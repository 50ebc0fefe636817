"""The plan of a sweep: states of runs, what is started, shards, GPUs and cores."""

import json
import os
import re

import pytest

from opt import OPTIONS, RUN_IDENTITY_EXEMPT, parse_options, resolved_dict
from run import job_of
from utils.errors import OptionError, RunsFailed
from utils.jobs import Job, clear_failure, plan_lines, plan_runs, read_failure, record_failure, shard_of
from utils.launchers import LocalLauncher, local_slots
from utils.sweep import carry_out


def job(tmp_path, tag="full", *more: str, retry=False) -> Job:
    argv = ["--demo", "--tag", tag, "--seed", "1", "--save_dir", str(tmp_path), *more]
    return job_of(parse_options(argv), retry)


def left_behind(one: Job, *names: str, **settings) -> None:
    """Make the folder of a run with its args.json and files of these names."""
    one.folder.mkdir(parents=True)
    (one.folder / "args.json").write_text(json.dumps(one.options | settings))
    for name in names:
        (one.folder / name).write_text("{}")


def planned(*jobs: Job) -> list[tuple[str, bool]]:
    return [(p.state.value, p.starts) for p in plan_runs(jobs, RUN_IDENTITY_EXEMPT)]


@pytest.fixture
def five(tmp_path):
    """A run in every state: new, started, finished, failed, other settings."""
    jobs = [job(tmp_path, tag) for tag in ("new", "started", "finished", "failed", "differs")]
    left_behind(jobs[1], "ckpt_1000.th", "ckpt_2000.th")
    left_behind(jobs[2], "ckpt_1000.th", "results.json")
    record_failure_of(jobs[3])
    left_behind(jobs[4], "ckpt_1000.th", batch_size=77)
    return jobs


def record_failure_of(one: Job) -> None:
    one.folder.mkdir(parents=True)
    record_failure(one.folder, "shapes: no images: add them", "SceneError", 2)


def test_finished_failed_and_foreign_runs_are_not_started(five):
    assert planned(*five) == [
        ("new", True),
        ("started", True),
        ("finished", False),
        ("failed", False),
        ("refused", False),
    ]


def test_the_plan_says_why(five):
    lines = plan_lines(plan_runs(five, RUN_IDENTITY_EXEMPT))
    assert lines[0].split() == ["demo/shapes_160/new/seed1", "new"]
    assert lines[1].endswith("started: goes on from ckpt_2000.th")
    assert lines[2].endswith("/finished/seed1  finished")
    assert lines[3].endswith("failed: shapes: no images: add them; is not started")
    assert "batch_size: 77 -> 512" in lines[4]
    assert lines[5] == "5 runs: 1 new, 1 started, 1 finished, 1 failed, 1 refused; 2 to start"
    assert lines[6:] == ["runs that failed before are left out: --retry_failed starts them again"]


def test_retry_failed_starts_failed_runs_only(five):
    assert planned(*(Job(j.name, j.folder, j.options, retry=True) for j in five)) == [
        ("new", True),
        ("started", True),
        ("finished", False),
        ("failed", True),
        ("refused", False),
    ]


@pytest.mark.parametrize(("kept", "state"), [([], ("failed", True)), (["ckpt_10.th"], ("refused", False))])
def test_a_failed_run_may_be_tried_with_other_settings_if_it_left_nothing(tmp_path, kept, state):
    one = job(tmp_path, retry=True)
    left_behind(one, *kept, batch_size=77)
    record_failure(one.folder, "no ray met the box", "SceneError", 2)
    assert planned(one) == [state]
    clear_failure(one.folder)
    assert (one.folder / "args.json").exists() is bool(kept)
    assert planned(one) == ([("refused", False)] if kept else [("new", True)])


def test_overwrite_starts_all_and_says_so(five):
    afresh = [Job(j.name, j.folder, j.options | {"overwrite": True}) for j in five]
    assert [starts for _, starts in planned(*afresh)] == [True] * 5
    told = plan_lines(plan_runs(afresh, RUN_IDENTITY_EXEMPT))
    assert [("starts afresh" in line) for line in told] == [False, True, True, True, True, False]


def damage_as_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_text('{"psnr": 3'), r"results\.json is damaged \(not JSON\): remove it"),
        (
            lambda path: path.write_text('{"psnr": "x"}'),
            r"results\.json is damaged \(psnr is not a number\): remove it",
        ),
        (damage_as_a_folder, r"cannot read .*results\.json \(not a regular file\)"),
    ],
    ids=["cut short", "other content", "a folder"],
)
def test_a_run_with_a_damaged_result_is_refused_with_the_reason_unless_overwritten(five, damage, says):
    damage(five[2].folder / "results.json")
    (one,) = plan_runs([five[2]], RUN_IDENTITY_EXEMPT)
    assert (one.state.value, one.starts) == ("refused", False)
    assert re.search(says, one.reason)
    assert plan_lines([one])[-1] == "1 runs: 1 refused; 0 to start"
    with pytest.raises(RunsFailed, match=says):
        carry_out([one], LocalLauncher(["none"], [{}]), lambda job: None)
    assert planned(Job(five[2].name, five[2].folder, five[2].options | {"overwrite": True})) == [("refused", True)]


def test_rendering_is_done_whatever_the_state(five):
    rendering = [Job(j.name, j.folder, j.options | {"render_only": 1}) for j in five]
    assert [starts for _, starts in planned(*rendering)] == [True] * 5


def test_a_damaged_failure_is_a_failure(tmp_path):
    (tmp_path / "failed.json").write_text("[1")
    assert "damaged" in read_failure(tmp_path)
    (tmp_path / "failed.json").write_text("[1]")
    assert "damaged" in read_failure(tmp_path)


def test_a_failure_names_error_kind_code_time_and_host(tmp_path):
    record_failure(tmp_path, "no", "SceneError", 2)
    facts = json.loads((tmp_path / "failed.json").read_text())
    assert (facts["error"], facts["kind"], facts["exit_code"]) == ("no", "SceneError", 2)
    assert facts["host"]
    assert facts["time"][:2] == "20"


@pytest.mark.parametrize("n_jobs", [0, 1, 7, 12])
def test_shards_are_disjoint_and_complete(tmp_path, n_jobs):
    jobs = [job(tmp_path, f"t{number}") for number in range(n_jobs)]
    for n in range(1, 10):
        parts = [shard_of(jobs, f"{i}/{n}") for i in range(n)]
        assert sorted(j.name for part in parts for j in part) == sorted(j.name for j in jobs)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_every_shard_gets_all_strategies(tmp_path, n):
    jobs = [job(tmp_path, tag, "--seed", str(seed)) for seed in range(12) for tag in ("full", "egra", "soft", "other")]
    for i in range(n):
        tags = [j.options["tag"] for j in shard_of(jobs, f"{i}/{n}")]
        assert {tags.count(tag) for tag in ("full", "egra", "soft", "other")} <= {12 // n, 12 // n + 1}


def test_a_job_survives_the_way_to_another_process(tmp_path):
    one = job(tmp_path, "full", "--n_lamb_sigma", "[1,2,3]", "--scene_bbox", "[-1,-1,-1,1,1,1.5]", retry=True)
    assert Job.from_json(one.to_json().encode()) == one
    assert "\n" not in one.to_json()


def test_the_job_knows_nothing_of_the_sweeps_options(tmp_path):
    one = job(tmp_path, "full", "--seeds", "3", "--jobs", "2", "--shard", "1/2", "--retry_failed")
    assert one.options == job(tmp_path).options
    assert {option.name for option in OPTIONS["several runs"]} < set(RUN_IDENTITY_EXEMPT)
    assert one.options.keys() == resolved_dict(parse_options(["--demo"])).keys()


# --- GPUs and cores ---
@pytest.fixture
def machine(monkeypatch):
    """machine(cores, visible): this many cores; CUDA_VISIBLE_DEVICES as given."""

    def make(cores: int, visible: str | None = None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def test_every_gpu_gets_runs_of_its_own_and_its_part_of_the_cores(machine):
    machine(cores=16)
    assert local_slots("all", 1, n_devices=2) == [
        {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "8"},
        {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "8"},
    ]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in local_slots("0,3", 1, n_devices=4)] == ["0", "3"]


def test_gpus_are_those_the_scheduler_gave(machine):
    machine(cores=4, visible="GPU-aa, GPU-bb,5")
    assert [s["CUDA_VISIBLE_DEVICES"] for s in local_slots("all", 1, n_devices=3)] == ["GPU-aa", "GPU-bb", "5"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in local_slots("2", 1, n_devices=3)] == ["5"]


@pytest.mark.parametrize(("gpus", "n_devices"), [("all", 0), ("0", 0), ("0,2", 2)])
def test_a_gpu_that_is_not_there_is_refused(machine, gpus, n_devices):
    machine(cores=4)
    with pytest.raises(OptionError, match=f"--gpus {gpus}: this machine has {n_devices} CUDA devices") as refused:
        local_slots(gpus, 1, n_devices)
    assert ("name those there are" in str(refused.value)) == (n_devices > 0)


def test_a_gpu_that_is_named_twice_is_refused(machine):
    machine(cores=4)
    with pytest.raises(OptionError, match="--gpus 0,0: names a device twice"):
        local_slots("0,0", 1, n_devices=2)


def test_cores_are_shared_unless_the_user_has_shared_them(machine, monkeypatch):
    machine(cores=6)
    assert local_slots(None, 4, 0) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert local_slots(None, 2, 0) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert local_slots(None, 1, 0) == [{}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert local_slots(None, 4, 0) == [{}] * 4


# --- the command line ---
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shard", "4/4"], "i from 0 to n - 1"),
        (["--shard", "1"], "for example 0/4"),
        (["--gpus", "0;1"], "write all, or numbers"),
        (["--gpus", "all", "--jobs", "2"], "jobs = 2: with gpus"),
        (["--gpus", "all", "--device", "cpu"], "device = cpu: gpus gives"),
        (["--datasets", "syn,synn"], "did you mean syn"),
        (["--datasets", "syn,syn"], "twice"),
        (["--datasets", "syn", "--nerf_dataset", "llff"], "nerf_dataset = llff: datasets"),
        (["--datasets", "syn", "--demo"], "datasets"),
        (["--datasets", "syn", "--nerf_scene", "lego"], "datasets runs all scenes"),
        (["--datasets", "syn", "--export_tensorf", "x.th"], "datasets makes several runs"),
        (["--jobs", "0"], "1 or more"),
    ],
)
def test_what_several_runs_cannot_share_is_refused(arguments, says):
    scene = [] if "--datasets" in arguments else ["--nerf_scene", "lego"]
    with pytest.raises(OptionError, match=says):
        parse_options([*scene, *arguments])
