"""run.py: what each experiment runs, what it passes on, and how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

import run
import utils.reports
from opt import REPOSITORY, resolved_dict
from utils.errors import OptionError, RunFolderError, RunLockedError, SceneError
from utils.jobs import Outcome, State, record_failure
from utils.launchers import Event
from utils.signals import Preempted

EXPERIMENTS = {
    "full": run.run_standard_nerf,
    "egra": run.run_egra_nerf,
    "soft": run.run_soft_nerf,
    "expansive": run.run_expansive_nerf,
}


class InThisProcess:
    """A launcher that needs no processes; training must not tell the difference."""

    def __init__(self, train):
        self.train = train

    def run(self, jobs):
        for job in jobs:
            yield Event(job)
            try:
                self.train(Namespace(**job.options))
                yield Event(job, Outcome(State.FINISHED))
            except Exception as error:
                yield Event(job, Outcome(State.FAILED, str(error)))


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Replaces training, of several runs too: collects the options of every run; `fail[scene]` is raised instead.

    Data folders exist.
    """
    import samplers
    from dataLoader import FORMATS

    for known in FORMATS.values():
        (tmp_path / "data" / known.folder).mkdir(parents=True)
    fake = ModuleType("train")
    fake.runs, fake.fail, fake.tables = [], {}, []

    def run_training(options):
        fake.runs.append(options)
        run.run_folder_of(options).mkdir(parents=True, exist_ok=True)
        if options.nerf_scene in fake.fail:
            raise fake.fail[options.nerf_scene]
        return {"psnr": 30.0}

    fake.run = run_training
    monkeypatch.setitem(sys.modules, "train", fake)
    monkeypatch.setattr(samplers, "check_strategy", lambda name: None)
    monkeypatch.setattr(run, "make_launcher", lambda chosen: InThisProcess(run_training))
    monkeypatch.setattr(utils.reports, "write_tables", lambda folder: fake.tables.append(folder.as_posix()))
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def scenes(monkeypatch):
    """Makes three scenes of every data set."""
    import dataLoader

    monkeypatch.setattr(dataLoader, "scene_names", lambda dataset, folder: ["chair", "drums", "lego"])


def start(monkeypatch, *arguments: str, experiment=run.main) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return run.exit_code(experiment)


@pytest.mark.parametrize("strategy", EXPERIMENTS)
def test_each_experiment_trains_lego_with_its_strategy(monkeypatch, trained, strategy):
    assert start(monkeypatch, experiment=EXPERIMENTS[strategy]) == 0
    (options,) = trained.runs
    assert (options.nerf_dataset, options.nerf_scene, options.strategy, options.tag) == (
        "syn",
        "lego",
        strategy,
        strategy,
    )


def test_the_standard_experiment_is_the_active_one(monkeypatch, trained):
    assert start(monkeypatch) == 0
    assert [options.strategy for options in trained.runs] == ["full"]


@pytest.mark.parametrize(
    ("arguments", "dataset", "scene", "n_iters"),
    [
        (["--nerf_scene", "chair", "--n_iters", "5000"], "syn", "chair", 5000),
        (["--nerf_dataset", "llff", "--nerf_scene", "fern"], "llff", "fern", 30000),
        (["--nerf_dataset=nsvf", "--nerf_scene=Bike"], "nsvf", "Bike", 30000),
        (["--config", "configs/flower.txt"], "llff", "flower", 30000),
        (["--config=configs/tensorf/llff.txt", "--nerf_scene", "room"], "llff", "room", 25000),
        (["--demo", "--n_iters", "3"], "demo", "shapes_160", 3),
    ],
)
def test_arguments_are_passed_on_and_win(monkeypatch, trained, arguments, dataset, scene, n_iters):
    assert start(monkeypatch, *arguments) == 0
    (options,) = trained.runs
    assert (options.nerf_dataset, options.nerf_scene, options.n_iters) == (dataset, scene, n_iters)
    assert options.fea2denseAct == ("relu" if dataset == "llff" else "softplus")


def test_the_users_strategy_beats_the_experiments(monkeypatch, trained):
    assert start(monkeypatch, "--strategy", "soft", experiment=run.run_egra_nerf) == 0
    assert trained.runs[0].strategy == "soft"


def test_auto_means_the_experiments_cuda_device_where_there_is_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.choose_device("auto", 1) == "cuda:1"
    assert run.choose_device("cpu", 1) == "cpu"
    with pytest.raises(OptionError, match="use_cuda=2"):
        run.choose_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_device("auto", 1) == "auto"


def test_seeds_are_consecutive_and_each_run_updates_the_table(monkeypatch, trained):
    assert start(monkeypatch, "--seed", "7", "--seeds", "3", "--save_dir", "out", "--up_folder_name", "mine") == 0
    assert [options.seed for options in trained.runs] == [7, 8, 9]
    assert trained.tables == ["out/mine/syn"] * 3


def test_multi_data_runs_every_scene_with_every_seed(monkeypatch, trained, scenes):
    assert start(monkeypatch, "--multi_data", "--seeds", "2", "--seed", "1") == 0
    assert [(o.nerf_scene, o.seed) for o in trained.runs] == [
        ("chair", 1),
        ("chair", 2),
        ("drums", 1),
        ("drums", 2),
        ("lego", 1),
        ("lego", 2),
    ]


def test_several_data_sets_bring_their_own_settings(monkeypatch, trained, scenes):
    assert start(monkeypatch, "--datasets", "syn,llff", "--n_iters", "9") == 0
    assert [(o.nerf_dataset, o.nerf_scene) for o in trained.runs] == [
        *(("syn", name) for name in ("chair", "drums", "lego")),
        *(("llff", name) for name in ("chair", "drums", "lego")),
    ]
    assert {(o.nerf_dataset, o.fea2denseAct, o.n_iters) for o in trained.runs} == {
        ("syn", "softplus", 9),
        ("llff", "relu", 9),
    }
    assert {*trained.tables} == {"log/runs/syn", "log/runs/llff"}


def test_an_absent_data_set_is_told_with_those_that_are_there(monkeypatch, trained, scenes, tmp_path, capsys):
    (tmp_path / "data/nerf_llff_data").rmdir()
    assert start(monkeypatch, "--datasets", "syn,llff,nsvf") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: data/nerf_llff_data is not there")
    assert lines[1:] == ["or name those you have: --datasets syn,nsvf"]


def test_a_runs_options_say_nothing_about_the_sweep_it_belongs_to(monkeypatch, trained, scenes):
    assert start(monkeypatch, "--multi_data", "--strategies", "egra,full", "--jobs", "2") == 0
    alone = run.planned_runs(["--config", "configs/lego.txt", "--strategy", "egra"], 0)[0]
    (lego,) = [o for o in trained.runs if (o.nerf_scene, o.strategy) == ("lego", "egra")]
    assert vars(lego) | {"config": None} == vars(alone) | {"config": None}


def test_a_failing_scene_does_not_stop_the_others_and_is_listed_at_the_end(monkeypatch, trained, scenes, capsys):
    trained.fail["drums"] = SceneError("drums has no images: add them")
    assert start(monkeypatch, "--multi_data", "--seed", "5") == 1
    assert [options.nerf_scene for options in trained.runs] == ["chair", "drums", "lego"]
    assert trained.tables == ["log/runs/syn"] * 3
    out, err = capsys.readouterr()
    assert err.endswith("1 of 3 runs failed:\nsyn/drums/full/seed5: drums has no images: add them\n")
    assert "2 of 3: syn/drums/full/seed5 failed: drums has no images" in out


@pytest.mark.parametrize("fails", [True, False])
def test_tables_that_cannot_be_written_hide_no_failed_run_and_are_tried_again(
    monkeypatch, trained, scenes, capsys, fails
):
    tried = []

    def full(folder):
        tried.append(folder)
        raise RunFolderError("cannot write res_table.md")

    monkeypatch.setattr(utils.reports, "write_tables", full)
    if fails:
        trained.fail["drums"] = SceneError("drums has no images: add them")
    assert start(monkeypatch, "--multi_data", "--seed", "5") == (1 if fails else 2)
    assert len(tried) == 6
    err = capsys.readouterr().err
    assert "error: cannot write res_table.md" in err
    assert ("drums/full/seed5: drums has no images" in err) is fails


def test_a_sweep_into_a_file_is_refused_before_any_run(monkeypatch, trained, scenes, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert start(monkeypatch, "--multi_data", "--save_dir", "notes.txt/log") == 2
    assert trained.runs == []
    told = f"error: --save_dir notes.txt/log: {tmp_path / 'notes.txt'} is a file; choose a folder that can be written\n"
    assert capsys.readouterr().err == told


def test_the_demo_has_one_scene_even_with_multi_data(monkeypatch, trained, scenes):
    assert start(monkeypatch, "--demo", "--multi_data") == 0
    assert [options.nerf_scene for options in trained.runs] == ["shapes_160"]


def test_a_user_error_ends_in_one_line_and_code_2(monkeypatch, trained, capsys):
    trained.fail["lego"] = SceneError("lego: transforms_train.json is missing")
    assert start(monkeypatch) == 2
    assert capsys.readouterr().err == "error: lego: transforms_train.json is missing\n"


def lego_run() -> Path:
    return run.run_folder_of(run.planned_runs(["--nerf_scene", "lego"], 0)[0])


def failed_in_a_sweep(*names: str, **settings) -> Path:
    """The folder of lego's run as a sweep left it, with its args.json and files of these names."""
    (options,) = run.planned_runs(["--config", run.CONFIG, "--nerf_scene", "lego"], 0)
    folder = run.run_folder_of(options)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(resolved_dict(options) | settings))
    for name in names:
        (folder / name).write_text("{}")
    record_failure(folder, "what it failed of first", "SceneError", 2)
    return folder


@pytest.mark.parametrize(
    ("error", "code"), [(SceneError("lego: no images"), 2), (ZeroDivisionError("no images"), 1)], ids=["user", "bug"]
)
def test_a_failed_run_that_fails_again_alone_stays_failed_and_tables_say_so(monkeypatch, trained, capsys, error, code):
    folder = failed_in_a_sweep("ckpt_5.th")
    trained.fail["lego"] = error
    if code == 2:
        assert start(monkeypatch) == 2
        assert capsys.readouterr().err == "error: lego: no images\n"
    else:
        with pytest.raises(ZeroDivisionError):
            start(monkeypatch)
    facts = json.loads((folder / "failed.json").read_text())
    assert (facts["error"], facts["kind"], facts["exit_code"]) == (str(error), type(error).__name__, code)
    assert trained.tables == ["log/runs/syn"]
    assert start(monkeypatch, "--dry_run") == 0
    assert "failed: " in (told := capsys.readouterr().out)
    assert "no images; is not started" in told
    assert start(monkeypatch, "--dry_run", "--retry_failed") == 0
    assert capsys.readouterr().out.endswith("1 runs: 1 failed; 1 to start\n")
    del trained.fail["lego"]
    assert start(monkeypatch) == 0
    assert not (folder / "failed.json").exists()


def test_a_single_run_with_other_settings_is_refused_and_what_is_there_stays(monkeypatch, trained, capsys):
    folder = failed_in_a_sweep("ckpt_5.th", batch_size=77)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert start(monkeypatch) == 2
    assert "batch_size: 77 -> " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert trained.runs == []


@pytest.mark.parametrize(
    ("error", "finished"),
    [(Preempted("stopped"), False), (RunLockedError("in use"), False), (SceneError("no export"), True)],
    ids=["stopped", "locked", "finished"],
)
def test_what_is_no_failure_of_the_run_leaves_none(monkeypatch, trained, error, finished):
    if finished:
        lego_run().mkdir(parents=True)
        (lego_run() / "results.json").write_text("{}")
        monkeypatch.setattr("utils.jobs.check_run_folder", lambda *arguments: "finished")
    trained.fail["lego"] = error
    assert start(monkeypatch) == (75 if isinstance(error, Preempted) else 2)
    assert not list(lego_run().glob("failed.json"))


def test_rendering_alone_says_nothing_about_its_run(monkeypatch, trained):
    folder = failed_in_a_sweep()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    trained.fail["lego"] = SceneError("no checkpoint")
    assert start(monkeypatch, "--render_only", "1") == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tables_that_cannot_be_written_do_not_hide_why_a_single_run_failed(monkeypatch, trained, capsys):
    def full(folder):
        raise RunFolderError("cannot write res_table.md")

    monkeypatch.setattr(utils.reports, "write_tables", full)
    trained.fail["lego"] = SceneError("lego: no images")
    assert start(monkeypatch) == 2
    assert capsys.readouterr().err.splitlines() == ["error: cannot write res_table.md", "error: lego: no images"]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EFBIG"])
@pytest.mark.parametrize("file", [None, "cache/kernel.so"])
def test_a_disk_that_takes_no_more_ends_in_one_line_and_code_2(monkeypatch, trained, capsys, name, file):
    code = getattr(errno, name)
    trained.fail["lego"] = OSError(code, os.strerror(code), file)
    assert start(monkeypatch) == 2
    place = file or f"{lego_run()} or the output of this run"
    remedy = "free some space or choose a --save_dir that can be written"
    assert capsys.readouterr().err == f"error: cannot write {place} ({os.strerror(code)}): {remedy}\n"


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch, trained):
    trained.fail["lego"] = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        start(monkeypatch)


def test_an_option_error_ends_in_one_line_and_code_2(monkeypatch, trained, capsys):
    assert start(monkeypatch, "--n_iter", "5") == 2
    assert capsys.readouterr().err == "error: command line: n_iter: is no option: did you mean n_iters?\n"
    assert trained.runs == []


def test_debug_shows_the_traceback_of_a_user_error(monkeypatch, trained, capsys):
    trained.fail["lego"] = SceneError("lego: broken")
    assert start(monkeypatch, "--debug") == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert stderr.endswith("error: lego: broken\n")


def test_a_bug_keeps_its_traceback(monkeypatch, trained):
    trained.fail["lego"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        start(monkeypatch)


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(monkeypatch, trained, capsys):
    trained.fail["lego"] = KeyboardInterrupt()
    assert start(monkeypatch) == 130
    assert len(trained.runs) == 1
    assert "same command" in capsys.readouterr().err


def test_without_data_two_lines_say_where_to_get_it_and_how_to_run_the_demo(monkeypatch, trained, capsys):
    assert start(monkeypatch, "--data_folder", "empty") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "data/README.md" in lines[0]
    assert "lego" in lines[0]
    assert "python run.py --demo" in lines[1]
    assert trained.runs == []
    assert start(monkeypatch, "--data_folder", "empty", "--demo") == 0


def test_a_strategy_that_is_not_there_is_refused_before_anything_else(monkeypatch, trained, capsys):
    import samplers

    def refuse(name):
        raise OptionError(f"--strategy {name} is not implemented in this version; available: full")

    monkeypatch.setattr(samplers, "check_strategy", refuse)
    assert start(monkeypatch, "--multi_data", "--data_folder", "empty", experiment=run.run_soft_nerf) == 2
    assert "soft is not implemented" in capsys.readouterr().err
    assert trained.runs == []


def test_a_run_on_a_full_disk_still_tells_its_own_error(monkeypatch, trained, tmp_path, capsys):
    def full(*arguments):
        raise RunFolderError("cannot write failed.json")

    one = run.job_of(run.planned_runs(["--nerf_scene", "lego"], 0)[0])
    monkeypatch.setattr("utils.processes.receive_job", lambda: one)
    monkeypatch.setattr("utils.jobs.record_failure", full)
    trained.fail["lego"] = SceneError("lego: no images")
    assert run.run_job() == 2
    assert capsys.readouterr().err == "error: lego: no images\n"


@pytest.mark.parametrize("arguments", [["--nerf_scene", "lego"], ["--seeds", "2"]])
def test_a_signal_before_training_ends_with_75(monkeypatch, trained, capsys, arguments):
    def while_planning(*more):
        signal.raise_signal(signal.SIGTERM)
        return planned(*more)

    planned = run.planned_runs
    monkeypatch.setattr(run, "planned_runs", while_planning)
    assert start(monkeypatch, *arguments) == 75
    assert trained.runs == []
    told = "stopped by SIGTERM; the same command again goes on from what was saved, if anything\n"
    assert capsys.readouterr().err == told


def test_help_works_from_another_folder_without_loading_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['run.py', '--help']\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"try: runpy.run_path({str(REPOSITORY / 'run.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--nerf_scene" in done.stdout


def test_a_warning_is_one_line_without_the_place_in_the_code(tmp_path):
    code = (
        "import runpy, sys, warnings; sys.argv = ['run.py', '--help']\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"try: runpy.run_path({str(REPOSITORY / 'run.py')!r}, run_name='__main__')\n"
        "except SystemExit: warnings.warn('a view\\n is \\x1b[1m missing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == "warning: a view is \\x1b[1m missing\n"


def test_the_script_ends_with_code_2_from_another_folder(tmp_path):
    command = [sys.executable, str(REPOSITORY / "run.py"), "--config", "configs/flower.txt", "--lr_init", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: lr_init: 0 is out of range; give a finite number above 0\n"
