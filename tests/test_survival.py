"""A run survives what a week brings: kills at any moment, requests to stop, full disks, damaged files, NaN."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models.outputs
import train
from dataLoader.demo_write import write_demo_as
from opt import parse_options
from tests.helpers import ROOT
from tests.survival_child import train_on_a_small_disk, train_once
from utils.checkpoints import latest_checkpoint, load_checkpoint
from utils.errors import CheckpointError, MemoryShortage, RunFolderError, UserError
from utils.run_folder import read_json
from utils.signals import PREEMPTED_EXIT_CODE, Preempted

# Kills in the first strategy's test; the others get a sixth.
KILLS = int(os.environ.get("SURVIVAL_KILLS", "30"))
STEPS = 48
TINY = f"--n_iters {STEPS} --batch_size 96 --N_voxel_init 1728 --N_voxel_final 4096 --upsamp_list [12,22] --featureC 8 "
TINY += "--update_AlphaMask_list [12,18] --density_shift -4 --lr_init 0.05 --lr_basis 0.005 --L1_weight_rest 1e-5 "
TINY += "--progress_refresh_rate 5 --vis_every 16 --save_every 8 --N_vis 2 --device cpu --filter_rays 1 --seed 3 "
TINY += "--n_lamb_sigma [2,2,2] --n_lamb_sh [3,3,3] --L1_weight_inital 1e-4 --eval_chunk 300"
# What must not depend on interruptions. Times and memory do.
SAME = ("train/mse", "train/PSNR", "train/reg_l1", "test/psnr", "test/ssim", "test/psnr_all")
STRATEGIES = {
    "soft": ("--soft_mining_warmup", "20"),
    "full": (),
    "expansive": ("--es_ratio", "0.8"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_demo_as("syn", root / "nerf_synthetic/tiny", 24, n_train=7, n_test=3)
    return root


def arguments(data, save_dir, strategy="full", *more):
    where = ["--nerf_dataset", "syn", "--nerf_scene", "tiny", "--data_folder", str(data), "--save_dir", str(save_dir)]
    return [*where, "--strategy", strategy, *TINY.split(), *STRATEGIES[strategy], *more]


def folder_of(save_dir, strategy="full"):
    return Path(save_dir) / "runs/syn/tiny" / strategy / "seed3"


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """uninterrupted(strategy): the folder of a run that nothing disturbed."""
    made = {}

    def folder(strategy="full"):
        if strategy not in made:
            save_dir = tmp_path_factory.mktemp(strategy)
            train.run(parse_options(arguments(data, save_dir, strategy)))
            made[strategy] = folder_of(save_dir, strategy)
        return made[strategy]

    return folder


def bits(state, name=""):
    """All of a checkpoint that decides how a run goes on, {name: tensor or value}."""
    if isinstance(state, dict):
        left_out = ("timer", "memory", "seconds", "stages", "log", "unreported") if not name else ()
        found = {}
        for key, value in state.items():
            found |= {} if key in left_out else bits(value, f"{name}/{key}")
        return found
    if isinstance(state, list | tuple):
        return bits(dict(enumerate(state)), name)
    return {name: state}


def assert_same_bits(path, other):
    ours, theirs = bits(load_checkpoint(path)), bits(load_checkpoint(other))
    assert ours.keys() == theirs.keys()
    assert sum(isinstance(value, torch.Tensor) for value in ours.values()) > 40
    same = [torch.equal(v, theirs[k]) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items()]
    assert [name for name, equal in zip(ours, same, strict=True) if not equal] == []


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder):
    """What a fresh TensorBoard shows, {tag: steps}."""
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars | {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def files(folder):
    """What lies in a run folder, but for event files, of which there is one a segment. A start that was killed between
    making the file for its lock and writing it leaves an empty one for some minutes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if "events." not in path.name}
    return {name for name, path in found.items() if not (name.startswith(".run.lock.") and path.stat().st_size == 0)}


def assert_as_if_undisturbed(folder, reference):
    """Same bits, same log, each step once, same files, and figures that went on counting."""
    assert_same_bits(folder / f"ckpt_{STEPS}.th", reference / f"ckpt_{STEPS}.th")
    ours, theirs = logged(folder), logged(reference)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert [{k: p.get(k) for k in ("step", *SAME)} for p in ours] == [
        {k: p.get(k) for k in ("step", *SAME)} for p in theirs
    ]
    assert board(folder) == board(reference)
    assert all(steps == sorted(set(steps)) for steps in board(folder).values())
    assert files(folder) == files(reference)
    seconds = [line["time/train_seconds"] for line in ours if "time/train_seconds" in line]
    assert seconds == sorted(seconds)
    peaks = [line["memory/peak_mb"] for line in ours if "memory/peak_mb" in line]
    assert peaks == sorted(peaks)
    results, expected = read_json(folder / "results.json"), read_json(reference / "results.json")
    for name in ("psnr", "ssim", "psnr_5view", "rays_per_step", "live_samples_per_step", "n_iters", "per_view"):
        assert results[name] == expected[name], name
    assert results["train_seconds"] == pytest.approx(seconds[-1])
    assert {k: v and v["steps"] for k, v in results["stages"].items()} == {
        k: v and v["steps"] for k, v in expected["stages"].items()
    }


# --- SIGKILL ---
@pytest.fixture(scope="module")
def start():
    """start(arguments, output): train in a fresh process, quickly: a fork of one that has loaded everything and done
    nothing, so that no thread can be missing in the copy."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a fork server")
    monkeypatch = pytest.MonkeyPatch()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    context = multiprocessing.get_context("forkserver")
    # What a training imports on its way would take longer than the training.
    on_the_way = ["torch._dynamo", "tensorboard.summary.writer.record_writer", "imageio", "PIL.PngImagePlugin"]
    context.set_forkserver_preload(["tests.survival_child", *on_the_way])

    def go(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        return process

    yield go
    monkeypatch.undo()


def wait_until(process, condition, patience=30.0):
    deadline = time.monotonic() + patience
    while process.is_alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.0002)


def pictures(folder):
    found = 0
    for name in ("imgs_vis", "imgs_test_all"):
        with suppress(FileNotFoundError):
            found += len(os.listdir(folder / name))
    return found


def half_written(folder):
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(folder) if name.startswith(".ckpt_") and name.endswith(".tmp")]
    return []


def kill_at_random(process, folder, chance, typical_seconds):
    """SIGKILL at a moment of a random kind; the kind, and whether it left a half-written checkpoint behind."""
    kind = chance.choice(["any moment", "any moment", "writing", "writing", "evaluation", "set-up"])
    if kind == "any moment":
        wait_until(process, lambda: False, patience=chance.uniform(0, typical_seconds))
    elif kind == "writing":
        for _ in range(chance.randint(1, 3)):
            wait_until(process, lambda: half_written(folder))
            end = time.monotonic() + chance.choice([0.0, 0.0005, 0.002])
            while time.monotonic() < end:
                pass
            if chance.random() < 0.6:
                break
            wait_until(process, lambda: not half_written(folder))
    elif kind == "evaluation":
        before = pictures(folder)
        wait_until(process, lambda: pictures(folder) > before)
        time.sleep(chance.uniform(0, 0.02))
    else:
        wait_until(process, (folder / "run.lock").exists)
        time.sleep(chance.uniform(0, 0.2))
    process.kill()
    process.join()
    return kind, bool(half_written(folder))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_again_and_again_ends_with_the_same_bits_and_one_clean_log(
    data, uninterrupted, start, tmp_path, strategy
):
    reference, chance = uninterrupted(strategy), random.Random(strategy)
    kills, wanted, spoiled, rounds, seconds = {}, KILLS if strategy == "soft" else -(-KILLS // 6), 0, 0, 1.0
    while sum(kills.values()) < wanted or rounds == 0:
        save_dir, output = tmp_path / str(rounds), tmp_path / f"{rounds}.txt"
        folder, rounds = folder_of(save_dir, strategy), rounds + 1
        while True:
            process = start(train_once, arguments(data, save_dir, strategy), str(output))
            if sum(kills.values()) < wanted:
                kind, half = kill_at_random(process, folder, chance, seconds)
                if process.exitcode == -signal.SIGKILL:
                    kills[kind] = kills.get(kind, 0) + 1
                    spoiled += half
            began = time.monotonic()
            process.join(120)
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, output.read_text()
                seconds = max(time.monotonic() - began, seconds)
                break
        assert_as_if_undisturbed(folder, reference)
    print(f"{strategy}: {kills}, {spoiled} half-written checkpoints, {rounds} runs finished")
    assert spoiled > 0 or wanted < 30


def test_a_run_killed_before_it_removed_an_old_checkpoint_removes_it_later(data, uninterrupted, tmp_path, monkeypatch):
    prune = train.prune_checkpoints

    def killed(folder):
        if latest_checkpoint(folder).name == f"ckpt_{STEPS}.th":
            raise KeyboardInterrupt
        prune(folder)

    with monkeypatch.context() as patch:
        patch.setattr(train, "prune_checkpoints", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(parse_options(arguments(data, tmp_path)))
    assert len(list(folder_of(tmp_path).glob("ckpt_*"))) == 3
    train.run(parse_options(arguments(data, tmp_path)))
    assert_as_if_undisturbed(folder_of(tmp_path), uninterrupted())


# --- being asked to stop ---
def ask_to_stop(monkeypatch, owner, name, signum, when=lambda *args: True):
    """The first call of owner.name for which `when` holds sends this process a signal, and then goes on."""
    original = getattr(owner, name)
    sent = []

    def asking(*args, **kwargs):
        if not sent and when(*args):
            sent.append(signum)
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, asking)
    return sent


def stopped(data, save_dir, *more):
    with pytest.raises(Preempted) as caught:
        train.run(parse_options(arguments(data, save_dir, "full", *more)))
    assert not (folder_of(save_dir) / "run.lock").exists()
    return str(caught.value)


def test_a_run_asked_to_stop_anywhere_saves_ends_and_goes_on_as_if_undisturbed(
    data, uninterrupted, tmp_path, monkeypatch, capsys
):
    folder = folder_of(tmp_path)
    # In a step, off every period: the half window of losses goes along.
    with monkeypatch.context() as patch:
        ask_to_stop(patch, train.Trainer, "step", signal.SIGTERM, lambda trainer: trainer.iteration == 12)
        assert "stopped by SIGTERM" in stopped(data, tmp_path)
    assert sorted(p.name for p in folder.glob("ckpt_*")) == ["ckpt_13.th", "ckpt_8.th"]
    assert "checkpoint of iteration 13 saved" in capsys.readouterr().out
    # At once again, before a step is made.
    with monkeypatch.context() as patch:
        ask_to_stop(patch, train.Trainer, "train", signal.SIGUSR1)
        assert "stopped by SIGUSR1" in stopped(data, tmp_path)
    assert latest_checkpoint(folder).name == "ckpt_14.th"
    # In an evaluation between steps, which is then owed.
    with monkeypatch.context() as patch:
        ask_to_stop(patch, train, "evaluate", signal.SIGINT)
        assert "stopped by SIGINT" in stopped(data, tmp_path)
    assert load_checkpoint(folder / "ckpt_16.th")["unreported"]["owes_pictures"]
    assert [line["step"] for line in logged(folder)] == [5, 8, 10, 15, 16]
    # In that evaluation made up for, and in the final one.
    for module, name in ((train, "evaluate"), (models.outputs, "evaluate"), (models.outputs, "evaluate")):
        with monkeypatch.context() as patch:
            ask_to_stop(patch, module, name, signal.SIGTERM)
            stopped(data, tmp_path)
    assert not (folder / "results.json").exists()
    assert train.run(parse_options(arguments(data, tmp_path)))["n_iters"] == STEPS
    assert_as_if_undisturbed(folder, uninterrupted())


def test_a_stop_while_the_scene_loads_leaves_nothing_behind(data, tmp_path, monkeypatch):
    ask_to_stop(monkeypatch, train, "load_split", signal.SIGTERM)
    stopped(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_ends_at_once_and_the_handlers_of_before_are_back(data, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.Trainer, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        train.run(parse_options(arguments(data, tmp_path)))
    assert not list(tmp_path.rglob("*.th"))
    assert not list(tmp_path.rglob("run.lock"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_checkpoint_is_written_whole_before_a_stop_is_obeyed(data, tmp_path, monkeypatch):
    ask_to_stop(monkeypatch, os, "fsync", signal.SIGTERM, lambda _: list(tmp_path.rglob(".ckpt_8.th.*.tmp")))
    stopped(data, tmp_path)
    assert load_checkpoint(folder_of(tmp_path) / "ckpt_8.th")["iteration"] == 8


def test_the_script_asked_to_stop_ends_with_the_code_for_trying_again(data, tmp_path):
    more = ("--n_iters", "100000", "--save_every", "100000", "--vis_every", "100000")
    command = [sys.executable, str(ROOT / "run.py"), *arguments(data, tmp_path, "full", *more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = folder_of(tmp_path) / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED_EXIT_CODE == 75, err
    assert err.splitlines()[-1] == "stopped by SIGTERM; the same command again goes on from what was saved, if anything"
    iteration = load_checkpoint(latest_checkpoint(folder_of(tmp_path)))["iteration"]
    assert f"checkpoint of iteration {iteration} saved" in out


# --- two processes ---
def test_a_second_process_is_refused_and_may_not_overwrite_and_a_finished_run_needs_no_lock(
    data, uninterrupted, tmp_path, monkeypatch
):
    evaluate, folder = train.evaluate, folder_of(tmp_path)

    def meanwhile(*args, **kwargs):
        for more in ((), ("--overwrite",)):
            with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on"):
                train.run(parse_options(arguments(data, tmp_path, "full", *more)))
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", meanwhile)
        train.run(parse_options(arguments(data, tmp_path)))
    assert_as_if_undisturbed(folder, uninterrupted())
    (folder / "run.lock").write_text("")
    assert train.run(parse_options(arguments(data, tmp_path)))["n_iters"] == STEPS


def test_a_run_whose_folder_was_taken_over_saves_nothing_there(data, tmp_path, monkeypatch):
    step, folder = train.Trainer.step, folder_of(tmp_path)

    def suspended(trainer):
        if trainer.iteration == 10:
            (folder / "run.lock").write_text("another process's")
        return step(trainer)

    monkeypatch.setattr(train.Trainer, "step", suspended)
    with pytest.raises(RunFolderError, match="taken over by another process"):
        train.run(parse_options(arguments(data, tmp_path)))
    assert [p.name for p in folder.glob("ckpt_*")] == ["ckpt_8.th"]


# --- damaged checkpoints ---
def interrupted_at(iteration, data, save_dir, monkeypatch):
    step = train.Trainer.step

    def interrupted(trainer):
        if trainer.iteration == iteration:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(parse_options(arguments(data, save_dir)))


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    path.write_bytes(b"")


def with_a_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, emptied, with_a_bit_flipped])
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_the_one_before_it_used(
    data, uninterrupted, tmp_path, monkeypatch, capsys, damage
):
    interrupted_at(30, data, tmp_path, monkeypatch)
    folder = folder_of(tmp_path)
    damage(folder / "ckpt_24.th")
    damaged = (folder / "ckpt_24.th").read_bytes()
    capsys.readouterr()
    train.run(parse_options(arguments(data, tmp_path)))
    out = capsys.readouterr().out
    assert f"{folder}/ckpt_24.th is damaged and now named ckpt_24.th.damaged; ckpt_16.th takes its place\n" in out
    assert f"resuming {folder} at iteration 16\n" in out
    assert (folder / "ckpt_24.th.damaged").read_bytes() == damaged
    (folder / "ckpt_24.th.damaged").unlink()
    assert_as_if_undisturbed(folder, uninterrupted())


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_touches_nothing(data, tmp_path, monkeypatch):
    interrupted_at(30, data, tmp_path, monkeypatch)
    folder = folder_of(tmp_path)
    emptied(folder / "ckpt_24.th")
    with_a_bit_flipped(folder / "ckpt_16.th")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"ckpt_16\.th and ckpt_24\.th is damaged.*remove it to start anew"):
        train.run(parse_options(arguments(data, tmp_path)))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert train.run(parse_options(arguments(data, tmp_path, "full", "--overwrite")))["n_iters"] == STEPS


# --- numbers that are none ---
def poison(monkeypatch, iteration, how):
    step = train.Trainer.step

    def poisoned(trainer):
        if trainer.iteration == iteration:
            how(trainer)
        return step(trainer)

    monkeypatch.setattr(train.Trainer, "step", poisoned)


def a_parameter(trainer):
    with torch.no_grad():
        next(iter(trainer.field.parameters()))[..., 0] = math.nan


def a_regulariser(trainer):
    trainer.set_l1_weight(math.inf)


def a_moment_of_adam(trainer):
    state = next(iter(trainer.optimizer.state.values()))
    next(v for k, v in state.items() if k.startswith("exp_avg"))[..., 0] = math.nan


@pytest.mark.parametrize("how", [a_parameter, a_regulariser])
def test_the_first_step_whose_loss_is_not_finite_is_named_and_the_checkpoints_before_it_stay(
    data, tmp_path, monkeypatch, how
):
    poison(monkeypatch, 12, how)
    with pytest.raises(
        UserError, match=r"loss became (nan|inf) at iteration 13 \(ckpt_8\.th is from before it\)"
    ) as caught:
        train.run(parse_options(arguments(data, tmp_path)))
    assert "lower --lr_init or --lr_basis" in str(caught.value)
    (path,) = folder_of(tmp_path).glob("ckpt_*")
    assert all(torch.isfinite(v).all() for v in bits(load_checkpoint(path)).values() if isinstance(v, torch.Tensor))


def test_a_stop_after_the_loss_became_nan_saves_nothing(data, tmp_path, monkeypatch):
    poison(monkeypatch, 13, a_parameter)
    ask_to_stop(monkeypatch, train.Trainer, "step", signal.SIGTERM, lambda trainer: trainer.iteration == 13)
    with pytest.raises(UserError, match="loss became nan at iteration 14"):
        train.run(parse_options(arguments(data, tmp_path)))
    assert [p.name for p in folder_of(tmp_path).glob("ckpt_*")] == ["ckpt_8.th"]


def test_an_optimiser_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch):
    save = train.Trainer.save

    def poisoned(trainer):
        if trainer.iteration == 16:
            a_moment_of_adam(trainer)
        save(trainer)

    monkeypatch.setattr(train.Trainer, "save", poisoned)
    with pytest.raises(UserError, match=r"NaN or infinite before iteration 16 \(ckpt_8\.th"):
        train.run(parse_options(arguments(data, tmp_path)))
    assert [p.name for p in folder_of(tmp_path).glob("ckpt_*")] == ["ckpt_8.th"]


# --- too little of something ---
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_names_the_peak_and_the_settings_and_the_checkpoint_is_whole(
    data, uninterrupted, tmp_path, monkeypatch, error
):
    def lacking(trainer):
        raise error

    with monkeypatch.context() as patch:
        poison(patch, 12, lacking)
        with pytest.raises(MemoryShortage) as caught:
            train.run(parse_options(arguments(data, tmp_path)))
    message = str(caught.value)
    for part in (
        "out of memory on",
        "MB so far",
        "--batch_size (96)",
        "--N_voxel_final (4096)",
        "--es_ratio",
        "--eval_chunk",
    ):
        assert part in message
    assert "\n" not in message
    train.run(parse_options(arguments(data, tmp_path)))
    assert_as_if_undisturbed(folder_of(tmp_path), uninterrupted())


@pytest.mark.parametrize("rendering", ["0", "1"])
def test_a_lack_of_memory_outside_of_training_is_one_line_too(data, tmp_path, monkeypatch, rendering):
    def lacking(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "load_split" if rendering == "1" else "load_perceptual_metrics", lacking)
    (tmp_path / "any.th").touch()
    more = ["--render_only", "1", "--ckpt", str(tmp_path / "any.th")] if rendering == "1" else []
    with pytest.raises(MemoryShortage, match=r"--eval_chunk"):
        train.run(parse_options([*arguments(data, tmp_path), *more]))


def test_a_disk_that_fills_up_anywhere_ends_in_one_line_and_the_run_goes_on_once_there_is_room(
    data, uninterrupted, start, tmp_path
):
    sizes = [*range(40, 1600, 64), 50_000]
    place, output = tmp_path / "disk", tmp_path / "happened.json"
    place.mkdir()
    process = start(train_on_a_small_disk, arguments(data, place), str(place), sizes, str(output))
    process.join(300)
    happened = json.loads(output.read_text())
    if happened == "not permitted":
        pytest.skip("may not mount a file system of its own")
    *failed, last = happened
    for attempt in failed:
        assert "(No space left on device): free some space or choose a --save_dir" in attempt["message"]
        assert len(attempt["message"].splitlines()) == 1
    print([(attempt["size_kb"], attempt["iteration"], Path(attempt["message"].split()[2]).name) for attempt in failed])
    iterations = [attempt["iteration"] or 0 for attempt in happened]
    assert iterations == sorted(iterations)
    assert last["message"] is None
    named = {Path(attempt["message"].split()[2]).name for attempt in failed}
    assert len(named) >= 3
    assert_as_if_undisturbed(folder_of(f"{place}_afterwards"), uninterrupted())
