"""Damaged checkpoints: of ours and of TensoRF's, read as a field, and to go on with a run."""

import functools
import io
import time
import warnings
from pathlib import Path
from random import Random

import torch

import train
from components.types import Rays
from dataLoader import load_scene
from models.files import load_field
from opt import parse_options
from tests import fuzz_mutators as mutate
from tests.helpers import GOLDEN, golden_config
from utils.checkpoints import load_checkpoint
from utils.memory import MemoryMeter

TENSORF_FILES = ("vm_mlpfea", "cp_mlpfea", "vm_sh", "vm_ndc_relu")
TINY = (
    *("--device", "cpu", "--nerf_dataset", "syn", "--nerf_scene", "tiny", "--data_folder", str(GOLDEN / "scenes")),
    *("--n_iters", "9", "--batch_size", "64", "--featureC", "8", "--N_voxel_init", "343", "--N_voxel_final", "512"),
    *("--n_lamb_sigma", "[2,2,2]", "--n_lamb_sh", "[2,2,2]", "--upsamp_list", "[5]", "--update_AlphaMask_list", "[]"),
)


LOGGED = b'{"step": 1}\n'
STRATEGIES = ("full", "soft", "egra", "expansive")


@functools.cache
def trainer(strategy: str):
    """A training on the golden scene that has taken a step, and its state."""
    options = parse_options([*TINY, "--strategy", strategy])
    scenes = {
        split: load_scene("syn", GOLDEN / "scenes", "tiny", split, 1, progress=False) for split in ("train", "test")
    }
    device = torch.device("cpu")
    made = train.Trainer(options, Path(), device, scenes, None, MemoryMeter(device))
    made.begin()
    made.reported_at = time.perf_counter()
    made.losses.append(made.step())
    made.iteration = 1
    made.log = NoLog()
    return made, made.state_dict()


class NoLog:
    """Stands where a run's log would be."""

    def position(self) -> dict:
        """As a log of one line."""
        return {"metrics.jsonl": len(LOGGED), "events.out.tfevents.1": 0}


def resume(r: Random, place: Path) -> None:
    """A damaged checkpoint of a run, restored; its log, a step and a report must work with what was accepted."""
    made, state = trainer(r.choice(STRATEGIES))
    write_damaged(r, place / "ckpt_1.th", state)
    (place / "metrics.jsonl").write_bytes(LOGGED)
    made.folder = place
    made.restore(place / "ckpt_1.th")
    made.open_log()
    made.log.close()
    made.losses.append(made.step())
    made.read_losses()


def checkpoint(name: str, r: Random, place: Path) -> None:
    """A damaged checkpoint of TensoRF's, read as a field and rendered."""
    state = load_checkpoint(GOLDEN / f"{name}.th")
    path = place / "ckpt_4.th"
    write_damaged(r, path, state)
    field, _ = load_field(path, "cpu", golden_config(name))
    rays = Rays(torch.tensor([[0.0, 0.1, -3.0], [0.2, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]))
    with torch.no_grad():
        out = field.render(rays, 1.0)
    assert all(parameter.isfinite().all() for parameter in field.parameters())
    assert out.rgb.shape == (2, 3)


def write_damaged(r: Random, path: Path, state: dict) -> None:
    """A checkpoint of the state, damaged in its values, its pickle, its archive, its bytes or its place."""
    kind = r.random()
    if kind < 0.5:
        with warnings.catch_warnings():  # of the odd tensors that are made here
            warnings.simplefilter("ignore")
            path.write_bytes(mutate.torch_file(r, state))
    else:
        out = io.BytesIO()
        torch.save(state, out, _use_new_zipfile_serialization=r.random() < 0.8)
        data = out.getvalue()
        if kind < 0.8 and data[:2] == b"PK":
            data = mutate.torch_zip(r, data)
        elif kind < 0.97:
            data = mutate.bytes_blindly(r, data)
        path.write_bytes(data)
        if kind >= 0.97:
            mutate.file_system(r, path)
