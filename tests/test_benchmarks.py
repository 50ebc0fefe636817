"""The benchmarks' fields do the work they claim, and the README's tables are those of the committed JSON."""

import json
import runpy
import sys
from argparse import Namespace

import cv2
import pytest
import torch

from benchmarks import (
    gpu_check,
    gpu_comparison,
    kernels,
    lego200,
    readme_tables,
    scaling,
    script,
    step,
    training,
    twin,
)
from benchmarks.fields import after_mask, before_mask, camera_rays
from benchmarks.readme_tables import RESULTS, ROOT, with_tables
from benchmarks.scaling_figure import figure
from benchmarks.step import FIELDS, VARIANTS, measure
from opt import parse_options
from tests.helpers import GOLDEN
from utils.errors import RunsFailed
from utils.memory import MemoryMeter


def test_the_readme_shows_the_tables_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert with_tables(text) == text


def test_the_field_after_the_mask_works_as_hard_a_ray_as_a_trained_lego():
    field = after_mask()
    with torch.no_grad():
        out = field.render(camera_rays(4096, 0), 1.0)
    assert 45 <= out.n_live / 4096 <= 50
    assert 11 <= out.n_colour / 4096 <= 13
    assert field.grid_size == (128, 128, 128) == before_mask().grid_size


@pytest.mark.parametrize("variant", ["packed", "bf16", "twin"])
def test_a_step_is_measured_in_all_its_phases(variant):
    result = measure(variant, "after", 256, 1, "cpu")
    assert min(result["ms"].values()) > 0
    assert result["ms"]["step"] >= result["ms"]["backward"]
    assert result["live_per_ray"] > result["colour_per_ray"] > 0


@pytest.mark.parametrize("variant", ["torch", "definition"])
def test_a_step_is_measured_as_without_a_compiler(variant):
    result = step.measure_in_fresh_process(variant, "before", Namespace(rays=64, repeats=1, device="cpu"))
    assert result["kernels"] == {"torch": "torch-gather", "definition": "torch-definition"}[variant]
    assert min(result["ms"].values()) > 0


def test_the_step_report_its_last_line_and_its_table_hold_all_variants_and_samplers(tmp_path, monkeypatch, capsys):
    def invented_step(variant, field, options):
        ms = dict.fromkeys(step.PHASES, (10.0 if field == "before" else 20.0) * (1 + VARIANTS.index(variant)))
        memory = {"step_memory_mb": 50.0 * (1 + VARIANTS.index(variant)), "live_per_ray": 40.0, "colour_per_ray": 9.0}
        return {"variant": variant, "field": field, "ms": ms, "step_ms_all": [1.0], **memory}

    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(step, "ROOT", tmp_path)
    monkeypatch.setattr(step, "measure_in_fresh_process", invented_step)
    monkeypatch.setattr(scaling, "measure_in_fresh_process", lambda p, *_: {**invented(p), "rays_per_step": p["rays"]})
    for part in (["--quick"], ["--only", "packed,twin"], ["--rays", "64"]):  # none of them is what the README shows
        monkeypatch.setattr("sys.argv", ["step", *part])
        step.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "twin/fast before-mask 5.00 after-mask 5.00"
        assert "no JSON was written: this is not the whole measurement" in lines
        assert not list((tmp_path / "benchmarks").iterdir())
    monkeypatch.setattr("sys.argv", ["step", "--rounds", "2"])
    step.main()
    report = json.loads((tmp_path / "benchmarks" / "results" / "step_cpu.json").read_text())
    assert [(r["field"], r["variant"]) for r in report["results"]] == [(f, v) for f in FIELDS for v in VARIANTS]
    assert report["time_over_packed"]["after"] == {v: 1.0 + i for i, v in enumerate(VARIANTS)}
    assert report["memory_ratio_twin_over_packed"] == {"before": 5.0, "after": 5.0}
    assert [row["strategy"] for row in report["samplers"]] == list(scaling.STRATEGIES)
    assert capsys.readouterr().out.splitlines()[-1] == "twin/fast before-mask 5.00 after-mask 5.00"
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path / "benchmarks" / "results")
    text = readme_tables.step()
    assert "| after the mask | dense twin | 100 | 100 | 100 | 100 | 5.00 | 250 | 5.00 | 40.0, 9.0 |" in text
    assert "| soft | 4224.0 | 4224.0 |" in text
    monkeypatch.setattr("sys.argv", ["step", "--only", "packed,torch"])
    with pytest.raises(SystemExit):
        step.main()


@pytest.mark.parametrize("field", ["before", "after"])
def test_every_kernel_is_timed_forward_and_where_it_has_one_backward(field):
    report = kernels.measure(field, torch.device("cpu"), 16, 1)
    assert set(report) == {"march", "density", "weights", "appearance", "network", "composite", "until_opaque"}
    for name, backends in report.items():
        assert "torch-gather" in backends
        for times in backends.values():
            assert min(times.values()) > 0
            assert ("backward_ms" in times) == (name not in ("march", "until_opaque"))


# --- what a user can mend ---
@pytest.mark.parametrize(
    ("name", "argv", "line"),
    [
        ("kernels", [], "--device cuda: this machine has 0 CUDA devices; try --device auto"),
        ("kernels", ["--device", "gpu"], "--device gpu: write auto, cpu, cuda or cuda:N"),
        ("step", ["--device", "cuda", "--quick"], "--device cuda: this machine has 0 CUDA devices; try --device auto"),
        ("training", ["--device", "cuda:1"], "--device cuda:1: this machine has 0 CUDA devices; try --device auto"),
        ("step_memory", ["nope"], "cannot read nope/args.json (No such file or directory): check the folder and its"),
        ("samplers", ["--data_folder", "nope"], "nope/nerf_synthetic/lego: scene folder is missing"),
        ("lego200", ["--n_iter", "5"], "command line: n_iter: is no option: did you mean n_iters?"),
        ("twin", ["--n_iter", "5"], "command line: n_iter: is no option: did you mean n_iters?"),
    ],
)
def test_a_benchmark_answers_a_users_mistake_with_one_line(name, argv, line, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", [name, *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err


@pytest.mark.parametrize("name", ["twin", "readme_tables"])
def test_a_benchmarks_help_is_its_own_and_all_it_does(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    before = (ROOT / "README.md").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out
    assert (ROOT / "README.md").stat().st_mtime_ns == before


@pytest.mark.parametrize(("argv", "seeds"), [([], [0]), (["--seed", "3"], [3]), (["--seeds", "2"], [0, 1])])
def test_the_twin_trains_seed_0_and_so_on_unless_told_otherwise(argv, seeds, monkeypatch):
    asked, reported = [], []
    monkeypatch.setattr(twin, "write_report", lambda tag, runs, prefix: reported.extend(runs))
    monkeypatch.setattr(twin.subprocess, "run", lambda command, **_: asked.append(command) or Namespace(returncode=0))
    monkeypatch.setattr(twin, "read_json", lambda path: {"folder": path.parent.name})
    monkeypatch.setattr("sys.argv", ["twin", *argv])
    twin.main()
    assert len(reported) == len(asked) == len(seeds)
    assert {run["kernels"] for run in reported} == {"dense twin"}
    for command, seed in zip(asked, seeds, strict=True):
        assert command[1:4] == ["-m", "benchmarks.twin", "--one"]
        o = parse_options(command[4:])
        assert (o.seed, o.strategy, o.n_iters, o.tag) == (seed, "full", 1500, twin.TAG)


@pytest.mark.parametrize("seed", [["--seed", "3"], ["--seed=3"]])
@pytest.mark.parametrize("module", [twin, lego200])
def test_runs_of_several_seeds_have_no_seed_of_their_own(module, seed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "--seeds", "2", *seed])
    with pytest.raises(SystemExit):
        module.main()
    assert "with --seeds 1 it is the run's" in capsys.readouterr().err


def test_a_run_of_the_twin_that_fails_ends_with_its_exit_code(monkeypatch):
    monkeypatch.setattr(twin.subprocess, "run", lambda *_, **__: Namespace(returncode=75))
    monkeypatch.setattr("sys.argv", ["twin"])
    with pytest.raises(SystemExit, match="75"):
        twin.main()


def test_a_run_of_the_twin_has_the_twin_in_place(monkeypatch):
    ran = []
    monkeypatch.setattr(twin, "put_twin_in_place", lambda: ran.append("twin"))
    monkeypatch.setattr(twin.train, "run", lambda options: ran.append(options.n_iters))
    monkeypatch.setattr("sys.argv", ["twin", "--one", "--config", "configs/lego200.txt", "--n_iters", "7"])
    twin.main()
    assert ran == ["twin", 7]


@pytest.mark.parametrize("number", ["0", "-3", "1.5", "many"])
def test_a_number_of_rays_is_a_whole_number_from_1_on(number, monkeypatch, capsys):
    for main in (step.main, kernels.main):
        monkeypatch.setattr("sys.argv", ["benchmark", f"--rays={number}", "--device", "cpu"])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert f"argument --rays: {number} is no whole number from 1 on" in capsys.readouterr().err


def test_runs_that_failed_and_a_process_that_broke_say_why(capsys):
    def fail():
        raise RunsFailed("1 of 3 runs failed:\nlego: no space")

    assert script.exit_code(fail) == 1
    assert capsys.readouterr().err == "1 of 3 runs failed:\nlego: no space\n"
    with pytest.raises(SystemExit, match=r"(?s)packed failed:\n.*ZeroDivisionError"):
        script.result_of(["-c", "1 / 0"], "packed")


def test_the_twin_is_compared_with_replayed_steps_where_there_are_any():
    milliseconds = {"packed": 4.0, "replayed": 2.0, "twin": 8.0}
    results = [
        {"variant": variant, "field": field, "ms": {"step": ms * (1 + (field == "after"))}, "step_memory_mb": 1.0}
        for field in FIELDS
        for variant, ms in milliseconds.items()
    ]
    ratios = step.compare(results)
    assert ratios["time_ratio_twin_over_packed"] == {"before": 2.0, "after": 2.0}
    assert ratios["time_ratio_twin_over_replayed"] == {"before": 4.0, "after": 4.0}
    assert "time_ratio_twin_over_replayed" not in step.compare([r for r in results if r["variant"] != "replayed"])


def test_replayed_steps_are_measured_on_cuda_alone(monkeypatch, tmp_path, capsys):
    asked = []

    def invented(variant, field, options):
        asked.append((variant, field))
        counts = {"live_per_ray": 1.0, "colour_per_ray": 1.0}
        return {
            **{"variant": variant, "field": field, "ms": dict.fromkeys(step.PHASES, 1.0 + len(variant))},
            **{"step_ms_all": [], "step_memory_mb": 1.0, **counts},
        }

    monkeypatch.setattr(step, "ROOT", tmp_path)
    monkeypatch.setattr(step, "measure_in_fresh_process", invented)
    monkeypatch.setattr("utils.device.device_name", lambda device: "a GPU")
    argv = ["step", "--device", "cuda", "--rounds", "1", "--only", "packed,replayed,twin"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("utils.device.choose_device", lambda name: torch.device("cuda"))
    step.main()
    assert set(asked) == {(variant, field) for variant in ("packed", "replayed", "twin") for field in FIELDS}
    report = json.loads((tmp_path / "benchmarks" / "results" / "step_cuda.json").read_text())
    assert report["time_ratio_twin_over_replayed"]["before"] == 5 / 9
    assert "twin/replayed before-mask 0.56" in capsys.readouterr().out
    monkeypatch.setattr("utils.device.choose_device", lambda name: torch.device("cpu"))
    with pytest.raises(SystemExit):
        step.main()


# --- gpu-check, as far as it goes without a GPU ---
def fake_parts(scene="lego", complete=True, seconds=100.0):
    trained = {"scene": scene, "complete": complete, "train_seconds": seconds, "psnr": 36.5, "peak_memory_mb": 1600.0}
    trained |= {"test_views": 200, "n_iters": 30_000, "scoring_seconds": 0.0}
    ratios = {"time_ratio_twin_over_replayed": {"before": 9.0, "after": 7.9}}
    waits = {"full": {"waits_per_step": 2.0}, "full, CUDA graphs": {"waits_per_step": 0.07}}
    results = {"step": ratios, "launches": waits, "training": trained}
    return {name: {"holds": True, "output": [], "seconds": seconds + 20, "result": r} for name, r in results.items()}


def verdicts(parts):
    return [row["verdict"] for row in gpu_check.targets(parts)]


def test_targets_are_met_or_missed_or_not_measured():
    missing, not_yet = "not measured (data missing)", "not measured"
    assert verdicts(fake_parts()) == ["met", "missed", "met", "met", "met", "met", "missed", not_yet]
    assert "(200 test views)" in gpu_check.targets(fake_parts())[4]["target"]
    assert verdicts(fake_parts("shapes_400")) == ["met", "missed", "met", "met", *[missing] * 3, not_yet]
    stopped = [not_yet, "missed", not_yet]
    assert verdicts(fake_parts(complete=False, seconds=240.0)) == ["met", "missed", "met", "met", *stopped, not_yet]
    assert verdicts(fake_parts(complete=False)) == ["met", "missed", "met", "met", *[not_yet] * 4]
    assert verdicts({}) == [not_yet] * 8
    few = fake_parts()
    few["training"]["result"]["test_views"] = 25
    assert verdicts(few)[4] == "not measured (200 test views are wanted)"
    for report, verdict in ((gpu_check.skipped("not installed"), not_yet), ({"holds": True}, "met")):
        assert verdicts({"compute-sanitizer": report})[-1] == verdict
    assert verdicts({"compute-sanitizer": {"holds": False, "error": "exit code 1"}})[-1] == "missed"


def test_shortened_trainings_fill_the_time_that_is_left_by_a_schedule_of_their_own():
    # 20 s beside 100 s for 30000 steps: of 40 s each, 20 are for training, of which a part is planned.
    assert gpu_comparison.short_steps(fake_parts()["training"], 200.0) == (3000, 20.0)
    assert gpu_comparison.short_steps(fake_parts()["training"], 80.0)[0] == 0
    assert gpu_comparison.short_steps(fake_parts()["training"], -5.0)[0] == 0
    assert gpu_comparison.short_steps(fake_parts(seconds=10.0)["training"], 1e4)[0] == 30_000
    # 90 s beside 100 s, 80 of them for 200 views, of which 25 are enough.
    many = fake_parts()["training"] | {"seconds": 190.0}
    many["result"] |= {"test_views": 200, "scoring_seconds": 80.0}
    assert gpu_comparison.short_steps(many, 200.0) == (3000, 20.0)
    assert gpu_comparison.short_steps({"holds": False, "error": "exit code 1"}, 1e4)[0] == 0
    argv = gpu_comparison.schedule(3000)
    assert argv == [
        "--n_iters",
        "3000",
        "--upsamp_list",
        "[200,300,400,550,700]",
        "--update_AlphaMask_list",
        "[200,400]",
    ]


def test_compared_trainings_stand_side_by_side_by_schedule():
    parts = fake_parts() | {f"short: {name}": gpu_check.skipped("no time left") for name in gpu_comparison.COMPARED}
    parts["full, 4096 rays"] = parts["training"]
    parts["short: full, 2048 rays"] = {"holds": True, "result": {"n_iters": 3000, "psnr": 30.0}}
    parts["expansive, es_ratio 0.5"] = {"holds": True, "result": {"n_iters": 30_000, "psnr": 36.0}}
    rows = [(r["schedule"], r["training"], r["n_iters"], r["psnr"]) for r in gpu_comparison.comparison(parts)]
    assert rows == [
        ("whole", "full, 4096 rays", 30_000, 36.5),
        ("whole", "expansive, es_ratio 0.5", 30_000, 36.0),
        ("short", "full, 2048 rays", 3000, 30.0),
    ]


def test_a_training_of_the_check_is_scored_on_all_views_that_are_there_and_ends_when_its_time_is_up(tmp_path):
    (tmp_path / "nerf_synthetic").mkdir()
    (tmp_path / "nerf_synthetic" / "lego").symlink_to(GOLDEN / "scenes" / "nerf_synthetic" / "tiny")
    n_test = len(list((GOLDEN / "scenes" / "nerf_synthetic" / "tiny" / "test").glob("r_*.png")))
    more = ["--N_voxel_init", "1000", "--N_voxel_final", "1000", "--batch_size", "64", "--progress_refresh_rate", "3"]
    more += [*gpu_comparison.schedule(1000), "--n_lamb_sigma", "[2,2,2]", "--n_lamb_sh", "[2,2,2]", "--featureC", "8"]
    result = training.training(str(tmp_path), "cpu", 0.0, more)
    assert (result["scene"], result["complete"], result["n_iters"]) == ("lego", False, 3)
    assert result["test_views"] == n_test > 1
    assert json.loads(json.dumps(result))["live_samples_per_step"] > 0


def run_check(monkeypatch, tmp_path, *argv):
    """(exit code, report) of gpu-check on a machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    code = gpu_check.main(["--out", str(tmp_path / "out" / "check.json"), *argv])
    return code, json.loads((tmp_path / "out" / "check.json").read_text())


def test_a_part_that_fails_is_recorded_and_the_others_run(monkeypatch, tmp_path, capsys):
    def call(command, seconds):
        if "benchmarks.kernels" in command:
            raise OSError("no such thing")
        if "benchmarks.launches" in command:
            return {"holds": False, "error": "exit code 1", "output": ["Traceback"]}
        return {
            "holds": True,
            "output": [],
            "result": {"scene": "shapes_400"} if "benchmarks.training" in command else {},
        }

    monkeypatch.setattr(gpu_check, "call", call)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    (tmp_path / "step_cuda.json").write_text(
        json.dumps({"time_ratio_twin_over_replayed": {"before": 8.5, "after": 8.0}})
    )
    code, report = run_check(monkeypatch, tmp_path)
    assert code == 1
    short = [f"short: {name}" for name in gpu_comparison.COMPARED]
    assert list(report["parts"]) == [
        *("training", "kernels", "step", "launches", "tests"),
        *(*short, "compute-sanitizer"),
    ]
    assert all("no time left" in report["parts"][name]["skipped"] for name in short)
    assert not report["holds"]
    assert report["parts"]["kernels"]["error"] == "OSError: no such thing"
    assert [row["verdict"] for row in report["targets"]][:2] == ["met", "met"]
    assert "gpu-check FAILED: kernels, launches" in capsys.readouterr().out


def answered(monkeypatch, tmp_path):
    """The commands that gpu-check gives; each succeeds, trainings as fast as no GPU."""
    commands = []

    def call(command, seconds):
        commands.append(command)
        result = {"result": {"n_iters": 30_000, "train_seconds": 60.0}} if "benchmarks.training" in command else {}
        return {"holds": True, "output": [], "seconds": 70.0, **result}

    monkeypatch.setattr(gpu_check, "call", call)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    (tmp_path / "step_cuda.json").write_text("{}")
    return commands


@pytest.mark.parametrize("tool", [None, "/usr/bin/compute-sanitizer"])
def test_all_parts_of_a_full_check_end_in_one_report(tool, monkeypatch, tmp_path):
    commands = answered(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: tool)
    code, report = run_check(monkeypatch, tmp_path, "--full")
    assert code == 0
    assert len(report["parts"]) == 11
    assert len(commands) == (11 if tool else 10)
    assert (report["parts"]["compute-sanitizer"].get("skipped") == "not installed") == (tool is None)
    assert [row["schedule"] for row in report["comparison"]] == ["whole"] * 5
    assert not any("--n_iters" in command or "--test_every" in command for command in commands)


def test_the_default_check_compares_trainings_of_the_same_steps_and_sanitizes_a_part_in_the_time_left(
    monkeypatch, tmp_path
):
    commands = answered(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    code, report = run_check(monkeypatch, tmp_path)
    assert code == 0
    (steps,) = (command for command in commands if "benchmarks.step" in command)
    assert steps[steps.index("--only") + 1] == "packed,replayed,twin"
    trainings = [command for command in commands if "benchmarks.training" in command]
    assert len(trainings) == 6
    assert "--test_every" not in trainings[0]  # all views
    shared = [command[: command.index("--test_every") + 2] for command in trainings[1:]]
    assert shared == [shared[0]] * 5
    assert int(shared[0][shared[0].index("--n_iters") + 1]) >= 1000
    assert [row["schedule"] for row in report["comparison"]] == ["short"] * 5
    assert commands[-1][2] == "/usr/bin/compute-sanitizer"
    assert report["targets"][-1]["verdict"] == "met"
    late = {"holds": False, "error": "took longer than 90 s", "output": []}
    monkeypatch.setattr(gpu_check, "call", lambda command, seconds: late)
    assert gpu_check.sanitize(False, 90.0)["skipped"] == "took longer than 90 s"
    assert not gpu_check.sanitize(True, 90.0)["holds"]
    assert gpu_check.sanitize(False, 20.0)["skipped"] == "no time left"
    unseen = {"holds": False, "error": "exit code 1", "output": ["========= Error: Device not supported"]}
    monkeypatch.setattr(gpu_check, "call", lambda command, seconds: unseen)
    assert gpu_check.sanitize(True, 90.0)["holds"]


def test_a_part_is_called_in_a_process_of_its_own_and_killed_when_its_time_is_up():
    python = [sys.executable, "-c"]
    done = gpu_check.call([*python, "print('a'); print('{\"b\": 1}')"], 60.0)
    assert (done["holds"], done["output"], done["result"]) == (True, ["a"], {"b": 1})
    failed = gpu_check.call([*python, "raise SystemExit('why')"], 60.0)
    assert (failed["holds"], failed["error"], failed["output"]) == (False, "exit code 1", ["why"])
    late = gpu_check.call([*python, "import time; print('a', flush=True); time.sleep(60)"], 1.0)
    assert (late["holds"], late["error"], late["output"]) == (False, "took longer than 1 s", ["a"])
    assert late["seconds"] < 30


def test_parts_for_which_no_time_is_left_are_said_and_are_no_failure(monkeypatch, tmp_path):
    commands = answered(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_check, "DEADLINE", 10.0)
    code, report = run_check(monkeypatch, tmp_path)
    assert code == 0
    assert len(commands) == 1  # full lego, which comes first
    assert all("no time left" in part["skipped"] for name, part in report["parts"].items() if name in ("tests", "step"))


def test_a_part_that_the_time_left_cuts_short_is_no_failure_one_that_takes_all_of_its_own_is(monkeypatch, tmp_path):
    answered(monkeypatch, tmp_path)
    answer = gpu_check.call

    def slow_tests(command, seconds):
        report = answer(command, seconds)
        late = {"holds": False, "error": f"took longer than {seconds:.0f} s", "output": ["F."]}
        return {**report, **late} if "pytest" in command else report

    monkeypatch.setattr(gpu_check, "call", slow_tests)
    for deadline, code in ((200.0, 0), (1000.0, 1)):
        monkeypatch.setattr(gpu_check, "DEADLINE", deadline)
        got, report = run_check(monkeypatch, tmp_path)
        assert got == code
        tests = report["parts"]["tests"]
        assert tests["output"] == ["F."]  # what failed before then is seen
        assert ("took longer" in tests.get("skipped", "")) == (code == 0)


def test_missing_packages_are_named_before_anything_is_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "PACKAGES", ("torch", "no_such_package"))
    assert gpu_check.main(["--out", str(tmp_path / "check.json")]) == 2
    assert "lacks no_such_package: pip install -r requirements.txt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "check.json")]) == 2
    assert not list(tmp_path.iterdir())


def test_committed_results_name_device_and_commit():
    files = list(RESULTS.glob("*.json"))
    assert files
    for path in files:
        report = json.loads(path.read_text())
        assert report["device"]
        assert report["commit"]


# --- benchmarks/scaling.py ---
TINY = {**scaling.BASE, "rays": 128, "images": 3, "size": 32, "grid": 32}


def test_one_thing_varies_at_a_time_and_the_twin_stops_at_its_limit():
    chosen = scaling.points(scaling.VALUES, 2048)
    for point in chosen:
        own = {scaling.VARIES[point["axis"]], "images" if point["axis"] == "resolution" else "strategy"}
        assert all(point[key] == value for key, value in scaling.BASE.items() if key not in {*own, "path", "field"})
    twins = {(p["rays"], p["field"]) for p in chosen if p["path"] == "twin"}
    assert twins == {(rays, field) for rays in (512, 1024, 2048) for field in ("before", "after")}
    for axis, numbers in scaling.VALUES.items():
        assert {p[scaling.VARIES[axis]] for p in chosen if p["axis"] == axis} == set(numbers)


def test_measured_steps_leave_the_field_as_it_was():
    trainer = scaling.make_trainer({**TINY, "axis": "batch"}, torch.device("cpu"), MemoryMeter("cpu"))
    before = [p.detach().clone() for p in trainer.field.parameters()]
    trainer.step()
    trainer.step()
    for was, now in zip(before, trainer.field.parameters(), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=2e-38)  # numbers below 1.2e-38 count as zero
    assert trainer.field.grid_size == (32, 32, 32)


def test_packed_and_twin_are_measured_at_the_same_work():
    packed, twin = ({**TINY, "axis": "batch", "path": path} for path in ("packed", "twin"))
    packed, twin = scaling.measure(packed, "cpu", 0.0), scaling.measure(twin, "cpu", 0.0)
    assert packed["rays_per_step"] == twin["rays_per_step"] == 128
    assert packed["live_per_ray"] == pytest.approx(twin["live_per_ray"], rel=0.01)
    assert packed["colour_per_ray"] == pytest.approx(twin["colour_per_ray"], rel=0.05)
    assert packed["live_per_ray"] > packed["colour_per_ray"] > 0
    assert 0 < packed["step_tensors_mb"] < twin["step_tensors_mb"]
    for result in (packed, twin):
        ms = result["ms"]
        assert set(ms) == {"step", "sampler", "forward", "backward", "optimizer"}
        assert min(ms.values()) > 0
        assert result["ms_range"][0] <= ms["step"] <= result["ms_range"][1]
        assert result["timed"] == 5


def test_more_images_keep_their_pixels_and_nothing_else():
    few, many = (scaling.measure({**TINY, "axis": "images", "images": n}, "cpu", 0.0) for n in (3, 20))
    assert many["static_mb"] - few["static_mb"] == pytest.approx(17 * 32 * 32 * 4 / 2**20)


def test_a_fresh_process_gives_the_scaling_of_a_view():
    point = {**TINY, "axis": "resolution", "images": 1}
    result = scaling.measure_in_fresh_process(point, "cpu", 0.0)
    assert point.items() <= result.items()
    assert result["ms"]["step"] >= result["ms"]["forward"] > 0
    assert result["step_memory_mb"] > 0
    assert "live_per_ray" not in result


def invented(point: dict, *_) -> dict:
    """A measurement of a point that took no time."""
    ms = dict.fromkeys(("step", "sampler", "forward", "backward", "optimizer"), float(point["rays"] + point["grid"]))
    memory = {"step_memory_mb": point["size"] / 10, "static_mb": point["images"] * 1.5, "step_tensors_mb": 7.0}
    return {**point, "ms": ms, **memory, "live_per_ray": 40.0, "colour_per_ray": 9.0}


def test_the_scaling_report_its_figure_and_its_table_hold_the_points(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "measure_in_fresh_process", invented)
    monkeypatch.setattr("sys.argv", ["scaling", "--only", "grid"])
    scaling.main()
    assert not list(tmp_path.iterdir())  # a part of the points is no report
    monkeypatch.setattr("sys.argv", ["scaling"])
    scaling.main()
    report = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert report["points"] == [invented(p) for p in scaling.points(scaling.VALUES, scaling.TWIN_MOST["cpu"])]
    assert report["base"] == scaling.BASE
    assert cv2.imread(str(tmp_path / "scaling_cpu.png")).shape == (700, 1500, 3)

    panels = figure(report).axes
    lines = {line.get_label(): line for line in panels[0].lines}
    assert set(lines) == {f"{path}, {field} the mask" for path in ("packed", "dense twin") for field in FIELDS}
    assert lines["dense twin, after the mask"].get_xdata().tolist() == [512, 1024, 2048, 4096]
    assert lines["packed, before the mask"].get_ydata().tolist() == [rays + 128 for rays in scaling.VALUES["batch"]]
    assert panels[5].lines[3].get_ydata().tolist() == [1.5 * n for n in scaling.VALUES["images"]]

    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    text = readme_tables.scaling()
    assert "| 8192 rays | 8320 | 8320 |  |  | 7 | 7 |  |  | 150 | 40, 9 | 40, 9 |" in text
    assert "| 400 | 4224 (4224.0) |" in text
    assert "| 1200 x 1200 | 4224 | 120 |" in text


def test_the_committed_scaling_is_of_points_that_the_benchmark_measures():
    report = json.loads((RESULTS / "scaling_cpu.json").read_text())
    chosen = scaling.points(scaling.VALUES, scaling.TWIN_MOST["cpu"])
    assert report["base"] == scaling.BASE
    assert {p["axis"] for p in report["points"]} == set(scaling.VARIES)
    assert all({key: p[key] for key in chosen[0]} in chosen for p in report["points"])
