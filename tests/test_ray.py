"""--launcher ray: what it asks of Ray, what a lost task means, and a real cluster of which a node is killed.

The comparison of 2 scenes x 4 strategies x 2 seeds takes minutes: `make test-ray`.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataLoader import scene_folder
from dataLoader.demo_write import write_demo_as
from opt import REPOSITORY, parse_options
from run import job_of
from tests.ray_cluster import ENVIRONMENT, finishes, outward_connections, ray_cluster, wait_until
from utils.errors import OptionError
from utils.jobs import Outcome, State
from utils.ray_launcher import MOST_LOSSES, RayLauncher, _import_ray, _stamp, carry_out_job
from utils.tables import write_tables

pytest.importorskip("ray")

SETTINGS = """--nerf_dataset syn --multi_data --device cpu --batch_size 64 --N_voxel_init 1000 --N_voxel_final 1728
--upsamp_list [30] --update_AlphaMask_list [20] --featureC 8 --density_shift -4 --vis_every 100 --N_vis 2
--n_lamb_sigma [2,2,2] --n_lamb_sh [2,2,2] --save_every 20 --data_folder data"""
QUALITY = ("psnr", "ssim", "lpips_alex", "lpips_vgg")
ONE_PROCESS = """import run, sys
for options in run.planned_runs(sys.argv[1:], 0):
    run.run_one(options)"""


# --- a sweep on a cluster that loses a node, and the same sweep without it ---
def sweep_losing_a_node(root: Path, n_nodes: int, *arguments: str) -> str:
    """Carry out a sweep on a head and n_nodes nodes, kill one in the middle of a run; returns the name of that run."""
    command = [sys.executable, str(REPOSITORY / "run.py"), *arguments, "--save_dir", "ray", "--launcher", "ray"]
    with ray_cluster(n_nodes) as cluster:
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": cluster.address}
        with open(root / "out.txt", "w") as out:
            sweep = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            node = cluster.nodes[-1]

            def in_the_middle() -> bool:
                return any(list((root / "ray/runs" / name).glob("ckpt_*.th")) for name in cluster.runs_of(node))

            wait_until(in_the_middle, 120)
            (lost,) = cluster.runs_of(node)
            assert outward_connections() == []
            cluster.kill(node)
            assert sweep.wait(500) == 0, (root / "out.txt").read_text()
        finally:
            if sweep.poll() is None:
                sweep.kill()
    return lost


def sweep_in_one_process(root: Path, *arguments: str) -> None:
    command = [sys.executable, "-c", ONE_PROCESS, *arguments, "--save_dir", "one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)


def assert_each_run_finished_once(root: Path, lost: str, n_runs: int) -> None:
    logs = sorted((root / "ray/runs").glob("syn/*/*/seed*/run.log"))
    assert [finishes(log) for log in logs] == [1] * n_runs
    assert f"{lost} lost its machine or worker" in (root / "out.txt").read_text()
    for log in logs:
        lines = map(json.loads, (log.parent / "metrics.jsonl").read_text().splitlines())
        steps = [line["step"] for line in lines if "train/PSNR" in line]
        assert steps == sorted(set(steps)), log


def assert_same_figures(root: Path) -> None:
    ours = sorted((root / "ray").rglob("results.json"))
    for path in ours:
        here, there = (json.loads(p.read_text()) for p in (path, root / "one" / path.relative_to(root / "ray")))
        assert [here[k] for k in (*QUALITY, "per_view")] == [there[k] for k in (*QUALITY, "per_view")], path
    assert len(ours) == len(list((root / "one").rglob("results.json")))
    first, second = (quality_columns(root / name / "runs/syn/res_table.csv") for name in ("ray", "one"))
    assert first == second
    assert len(first) > len(ours) / 2
    for blanked, ending in ((markdown_blanked, "md"), (tex_blanked, "tex")):
        first, second = (blanked((root / name / f"runs/syn/res_table.{ending}").read_text()) for name in ("ray", "one"))
        assert first == second
        assert len(first) > len(ours) / 2


def quality_columns(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    leave = ("train_seconds", "peak_memory_mb", "commit")
    return [{k: v for k, v in row.items() if not k.startswith(leave)} for row in rows]


def markdown_blanked(text: str) -> list:
    """Cells and lines of a res_table.md, without times, memory, device and commit."""
    return blanked(text.splitlines(), "|", ("train s", "peak MB", "device", "commit"))


def tex_blanked(text: str) -> list:
    """The same of a res_table.tex, where the facts of a row stand in a comment behind it, and some in the caption."""
    text = re.sub(r"; device .*|(?<=\\caption\{)Data set .*?: (?=mean|one seed)", "", text)
    rows = [re.sub(r" \\\\( |$)", " & ", line) for line in text.splitlines()]
    return blanked(rows, "&", ("time (s)", "memory (MB)"))


def blanked(lines: list[str], separator: str, columns: tuple[str, ...]) -> list:
    """Lines, those of a table as cells; without the columns of these headings, and notes on devices and commits."""
    cells = [[cell.strip() for cell in line.split(separator)] for line in lines]
    head = next(row for row in cells if set(columns) <= set(row))
    left_out = [head.index(column) for column in columns]
    kept = [[cell for i, cell in enumerate(row) if len(row) < len(head) or i not in left_out] for row in cells]
    return [row for row in kept if not re.search("not all runs have the same (device|commit)", row[0])]


def test_tables_without_times_memory_device_and_commit_differ_only_in_figures(tmp_path):
    def tables(name, **figures):
        result = {"psnr": 30.0, "n_iters": 9, "train_seconds": 1.0, "peak_memory_mb": 5.0, "device": "a", "commit": "b"}
        for tag in ("full", "egra"):
            folder = tmp_path / name / "syn/one" / tag / "seed0"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(result | figures))
        write_tables(tmp_path / name)
        texts = [(tmp_path / name / f"res_table.{ending}").read_text() for ending in ("md", "tex")]
        return [markdown_blanked(texts[0]), tex_blanked(texts[1])]

    first = tables("first")
    assert tables("second", train_seconds=2.0, peak_memory_mb=6.0, device="x (CPU, 1 threads)", commit="y") == first
    for number, figure in enumerate(({"psnr": 31.0}, {"n_iters": 8})):
        changed = tables(f"changed{number}", **figure)
        assert changed[0] != first[0]
        assert changed[1] != first[1]


def make_scenes(root: Path, *names: str) -> None:
    for number, name in enumerate(names):  # of different sizes: equal scenes could be mixed up unseen
        write_demo_as("syn", scene_folder("syn", root / "data", name), 20 + 4 * number, n_train=5 + number, n_test=2)


def test_a_sweep_that_loses_a_node_finishes_every_run_once_with_the_figures_of_one_process(tmp_path):
    make_scenes(tmp_path, "one", "two")
    arguments = [*SETTINGS.split(), "--strategies", "full", "--n_iters", "150"]
    lost = sweep_losing_a_node(tmp_path, 1, *arguments)
    sweep_in_one_process(tmp_path, *arguments)
    assert_each_run_finished_once(tmp_path, lost, 2)
    assert_same_figures(tmp_path)


@pytest.mark.skipif("RAY_SWEEP" not in os.environ, reason="takes minutes: make test-ray")
def test_two_scenes_four_strategies_two_seeds_losing_a_node_give_the_tables_of_one_process(tmp_path):
    make_scenes(tmp_path, "one", "two")
    arguments = [*SETTINGS.split(), "--strategies", "full,egra,soft,expansive", "--seeds", "2", "--n_iters", "200"]
    lost = sweep_losing_a_node(tmp_path, 2, *arguments)
    sweep_in_one_process(tmp_path, *arguments)
    assert_each_run_finished_once(tmp_path, lost, 16)
    assert_same_figures(tmp_path)


# --- what becomes of a task, without a cluster ---
class FakeRay:
    """As much of Ray as the launcher uses; each task ends with the next of `results`, an exception or a value."""

    def __init__(self, results, resources=None):
        import ray.exceptions

        self.exceptions, self.results, self.requests, self.again = ray.exceptions, list(results), [], []
        self._resources = resources or {"CPU": 4}

    def init(self, **settings):
        self.settings = settings

    def shutdown(self):
        self.results = []

    def cluster_resources(self):
        return self._resources

    def nodes(self):
        return [{"Alive": True, "Resources": self._resources}]

    def remote(self, function):
        return self

    def options(self, **request):
        self.requests.append(request)
        call = type("Call", (), {})()
        call.remote = lambda *arguments, again, args_before: self.again.append(again) or object()
        return call

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self, reference, force):
        assert not force


def job(tmp_path, *more):
    argv = ["--demo", "--save_dir", str(tmp_path), "--device", "cpu", *more]
    return job_of(parse_options(argv))


def outcomes(monkeypatch, tmp_path, results, *more, resources=None):
    """(outcomes of one job's tasks that end so, the fake)."""
    fake = FakeRay(results, resources)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("utils.ray_launcher._import_ray", lambda: fake)
    events = list(RayLauncher(["program"]).run([job(tmp_path, *more)]))
    return [event.outcome for event in events if event.outcome], fake


def lost():
    from ray.exceptions import WorkerCrashedError

    return WorkerCrashedError()


def test_a_lost_run_is_handed_in_again_and_a_failed_one_is_not(monkeypatch, tmp_path):
    ended, fake = outcomes(monkeypatch, tmp_path, [lost(), lost(), ("finished", "")])
    assert ended == [Outcome(State.FINISHED)]
    assert fake.again == [False, True, True]
    ended, fake = outcomes(monkeypatch, tmp_path, [("started", "goes on from ckpt_3.th"), ("finished", "")])
    assert ended == [Outcome(State.FINISHED)]
    ended, fake = outcomes(monkeypatch, tmp_path, [("failed", "no images")])
    assert ended == [Outcome(State.FAILED, "no images")]
    assert fake.again == [False]


def test_a_run_that_is_lost_too_often_fails_and_leaves_its_failure_where_it_began(monkeypatch, tmp_path):
    for began in (False, True):
        if began:
            job(tmp_path).folder.mkdir(parents=True)
        (ended,), fake = outcomes(monkeypatch, tmp_path, [lost() for _ in range(MOST_LOSSES + 1)])
        assert ended.state is State.FAILED
        assert len(fake.again) == MOST_LOSSES + 1
    assert "WorkerCrashedError" in json.loads((job(tmp_path).folder / "failed.json").read_text())["error"]


@pytest.mark.parametrize(
    ("device", "resources", "gpus"),
    [
        ("cpu", {"CPU": 4, "GPU": 1}, 0),
        ("auto", {"CPU": 4}, 0),
        ("auto", {"CPU": 4, "GPU": 1}, 1),
        ("cuda:3", {"CPU": 4, "GPU": 1}, 1),
    ],
)
def test_a_run_asks_for_its_gpu_and_as_many_cpus_as_it_has_threads(monkeypatch, tmp_path, device, resources, gpus):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    _, fake = outcomes(monkeypatch, tmp_path, [("finished", "")], "--device", device, resources=resources)
    assert fake.requests == [{"max_retries": 0, "num_cpus": 3, "num_gpus": gpus}]


def test_a_request_that_no_machine_can_meet_is_said(monkeypatch, tmp_path, capsys):
    outcomes(monkeypatch, tmp_path, [("finished", "")], "--device", "cuda")
    assert "no machine of the Ray cluster has 1 CPUs and 1 GPUs" in capsys.readouterr().out


def test_without_a_cluster_ray_stays_on_this_machine_and_has_no_dashboard(monkeypatch, tmp_path):
    _, fake = outcomes(monkeypatch, tmp_path, [("finished", "")])
    assert (fake.settings["address"], fake.settings["include_dashboard"]) == ("local", False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    _import_ray()
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_cluster_that_does_not_answer_is_an_error_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.ray_launcher._import_ray", lambda: FakeRay([]))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(OptionError, match=r"RAY_ADDRESS=127\.0\.0\.1:9.*the same token"):
        next(RayLauncher(["program"]).run([job(tmp_path)]))


@pytest.mark.parametrize(
    ("address", "token", "mode", "wanted"),
    [
        ("h:1", "file", None, "token"),
        ("h:1", "elsewhere", None, "token"),
        ("h:1", "variable", None, "token"),
        ("h:1", "empty", None, None),
        ("h:1", "none", None, None),
        ("h:1", "file", "disabled", "disabled"),
        ("", "file", None, None),
    ],
)
def test_a_token_is_sent_to_the_cluster_that_is_named(monkeypatch, tmp_path, address, token, mode, wanted):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    elif token == "elsewhere":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
        (tmp_path / "other").write_text("secret")
    elif token != "none":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("secret" if token == "file" else "")
    _import_ray()
    assert os.environ.get("RAY_AUTH_MODE") == wanted
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # set by the program, it would stay


def test_ray_is_not_started_for_nothing(monkeypatch):
    monkeypatch.setattr("utils.ray_launcher._import_ray", lambda: None)
    assert list(RayLauncher(["program"]).run([])) == []


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match="pip install ray=="):
        RayLauncher(["program"])


def test_the_signal_handler_of_who_started_the_sweep_stays(monkeypatch, tmp_path):
    fake = FakeRay([("finished", "")])
    fake.init = lambda **settings: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("utils.ray_launcher._import_ray", lambda: fake)
    before = signal.getsignal(signal.SIGTERM)
    list(RayLauncher(["program"]).run([job(tmp_path)]))
    assert signal.getsignal(signal.SIGTERM) is before


# --- the task itself ---
def test_a_machine_without_the_shared_folders_refuses_the_run(tmp_path):
    for folder, mark in ((tmp_path / "absent", "mark"), (tmp_path, "no-mark")):
        state, reason = carry_out_job(["x"], job(tmp_path).to_json(), {}, str(folder), str(tmp_path / mark), False)
        assert state == State.FAILED
        assert "share" in reason
    assert not job(tmp_path).folder.exists()


@pytest.mark.parametrize(("again", "begun", "overwrites"), [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, False)])
def test_a_lost_run_is_overwritten_again_only_if_it_had_not_begun(tmp_path, monkeypatch, again, begun, overwrites):
    (tmp_path / "mark").touch()
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("utils.ray_launcher.start_run", lambda c, job, e: seen.append(job) or Outcome(State.FINISHED))
    one = job(tmp_path, "--overwrite")
    one.folder.mkdir(parents=True)
    (one.folder / "args.json").write_text("{}")
    before = _stamp(one.folder / "args.json")
    if begun:
        (one.folder / "args.json").write_text('{"new": 1}')
    carry_out_job(["x"], one.to_json(), {}, str(tmp_path), str(tmp_path / "mark"), bool(again), before)
    assert seen[0].options["overwrite"] is overwrites


def test_a_lost_run_waits_for_its_first_process_to_let_go(tmp_path, monkeypatch):
    (tmp_path / "mark").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.ray_launcher.PAUSE_SECONDS", 0.01)
    answers = [Outcome(State.RUNNING), Outcome(State.RUNNING), Outcome(State.FINISHED)]
    monkeypatch.setattr("utils.ray_launcher.start_run", lambda c, job, e: answers.pop(0))
    task = (["x"], job(tmp_path).to_json(), {}, str(tmp_path), str(tmp_path / "mark"))
    assert carry_out_job(*task, again=True)[0] == State.FINISHED
    answers[:] = [Outcome(State.RUNNING, "there")]
    assert carry_out_job(*task, again=False) == (State.RUNNING, "there")
