"""What damaged files are given to, by kind: each prepares a place, damages a file of it, reads it, and checks what it
was given if it was accepted."""

import functools
import json
import math
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from random import Random

import torch

from components.cameras import cast_rays
from components.pixel_sets import pixel_batch
from dataLoader import load_scene
from opt import parse_options, resolved_dict
from tests import fuzz_mutators as mutate
from tests.fuzz_checkpoints import STRATEGIES, TENSORF_FILES, checkpoint, resume, trainer
from tests.fuzz_results import SYN, arguments, metrics, results, write_results
from tests.helpers import GOLDEN
from utils.comparison import write_comparison
from utils.errors import UserError

SCENES = {
    "syn": ("nerf_synthetic", "tiny", 1),
    "nsvf": ("Synthetic_NSVF", "Tiny", 1),
    "tt": ("TanksAndTemple", "Tiny", 1),
    "llff": ("nerf_llff_data", "tiny", 4),
    "own_data": ("own_data", "tiny", 1),
}


def scene(dataset: str, r: Random, place: Path) -> None:
    """A golden scene with one to three damaged files, both splits loaded."""
    folder, name, factor = SCENES[dataset]
    target = place / folder / name
    shutil.copytree(GOLDEN / "scenes" / folder / name, target)
    if dataset == "own_data" and r.random() < 0.3:  # one file for both splits
        (target / "transforms_test.json").unlink()
        (target / "transforms_train.json").rename(target / "transforms.json")
    files = sorted(path for path in target.rglob("*") if path.is_file())
    tables = [path for path in files if path.suffix != ".png"]
    for path in {r.choice(tables if r.random() < 0.6 else files) for _ in range(r.choice((1, 1, 3)))}:
        damage_scene_file(r, path)
    more = {"skip_missing_frames": r.random() < 0.3}
    if r.random() < 0.1:
        more["scene_bbox"] = [-1, -1, -1, 1, 1, float(r.choice((1, 1e8, -2, math.nan)))]
    for split in ("train", "test"):
        check_scene(load_scene(dataset, place, name, split, factor, progress=False, **more))


def damage_scene_file(r: Random, path: Path) -> None:
    """Damage that suits the kind of file, or any."""
    kind, data = r.random(), path.read_bytes()
    if kind < 0.12:
        return mutate.file_system(r, path)
    if kind < 0.4:
        data = mutate.bytes_blindly(r, data)
    elif path.suffix == ".json":
        data = mutate.json_text(r, data.decode()).encode("utf-8", "surrogatepass")
    elif path.suffix == ".txt":
        data = mutate.lines_text(r, data.decode()).encode()
    elif path.suffix == ".npy":
        data = mutate.npy(r, data)
    else:
        data = r.choice((mutate.png, mutate.other_image))(r, data)
    path.write_bytes(data)
    return None


def check_scene(found) -> None:
    """What was accepted can be trained on."""
    m, h, w, channels = found.images.shape
    assert m > 0
    assert channels in (3, 4)
    assert found.images.dtype == torch.uint8
    assert found.c2w.shape == (m, 3, 4)
    assert found.intrinsics.shape == (m, 4)
    assert (found.intrinsics[:, :2] > 0).all()
    assert found.near < found.far
    assert (found.aabb[1] > found.aabb[0]).all()
    assert found.render_path[..., 0, 0].isfinite().all()
    rays = cast_rays(found, pixel_batch(torch.arange(0, m * h * w, max(m * h * w // 500, 1)), h, w))
    assert rays.origins.isfinite().all()
    assert rays.directions.isfinite().all()
    if not found.ndc:
        torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(len(rays)), atol=0.06, rtol=0)


def config_file(r: Random, place: Path) -> None:
    """One of the repository's config files, damaged."""
    root = GOLDEN.parent.parent / "configs"
    text = r.choice(sorted(root.rglob("*.txt"))).read_text()
    path, kind = place / "mine.txt", r.random()
    if kind < 0.6:
        path.write_bytes(mutate.lines_text(r, text).encode("utf-8", "surrogatepass"))
    elif kind < 0.7:
        size = r.choice((1000, 60_000, 1_000_000))
        odd = (
            "batch_size = " + "9" * size,
            "a = " * size,
            "upsamp_list = [" + "1," * size + "1]",
            "x=[" * size,
            "=" * size,
        )
        path.write_text(text + "\n" + r.choice((*odd, "\n".join(f"x{i} = 1" for i in range(size // 50)))))
    elif kind < 0.75:
        path.write_text(text)
        mutate.file_system(r, path)
    else:
        path.write_bytes(mutate.bytes_blindly(r, text.encode()))
    check_options(parse_options([*SYN, "--config", str(path)]))


def command_line(r: Random, place: Path) -> None:
    """Words of a command line replaced, dropped, doubled."""
    words = [
        *SYN,
        "--n_iters",
        "100",
        "--n_lamb_sigma",
        "[16,16,16]",
        "--seeds",
        "2",
        "--strategies",
        "full,soft:seed=1",
    ]
    words += ["--scene_bbox", "[-1,-1,-1,1,1,1]", "--tag", "mine", "--lr_init", "0.1", "--data_folder", str(place)]
    for _ in range(r.choice((1, 2, 4))):
        at, kind = r.randrange(len(words)), r.randrange(4)
        if kind == 0:
            del words[at]
        elif kind == 1:
            words.insert(at, r.choice(words))
        elif kind == 2:
            words[at] = (
                mutate.bytes_blindly(r, words[at].encode("utf-8", "surrogateescape"))
                .decode("utf-8", "surrogateescape")
                .replace("\0", "")
            )
        else:
            words[at] = r.choice((*mutate.WORDS, "=[" * 30_000, "--" + "x" * 1000, *map(str, mutate.NUMBERS)))
    if not {"-h", "--help"}.intersection(words):
        check_options(parse_options(words))


def check_options(options: Namespace) -> None:
    """What was accepted can be kept, and holds no number that nothing can be done with."""
    values = resolved_dict(options)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert len(json.dumps(values)) < 100_000


# By kind: (what reads it, how many of a hundred inputs are of this kind).
TARGETS = {
    **{f"scene {name}": (functools.partial(scene, name), 11) for name in SCENES},
    **{"config file": (config_file, 8), "command line": (command_line, 5)},
    "checkpoint of ours": (resume, 9),
    **{f"checkpoint {name}": (functools.partial(checkpoint, name), 2) for name in TENSORF_FILES},
    **{"results.json": (results, 6), "args.json": (arguments, 4), "metrics.jsonl": (metrics, 5)},
}


def prepare() -> None:
    """Load what is loaded on first use, so that no input pays for it."""
    for strategy in STRATEGIES:
        trainer(strategy)
    with tempfile.TemporaryDirectory() as place:
        write_results(Path(place))
        write_comparison(Path(place) / "syn" / "lego")


def run_one(kind: str, seed: int) -> str:
    """'accepted' or 'refused'; raises whatever else an input of this kind and seed brings about."""
    r = Random(f"{kind}/{seed}")
    # The sources of randomness of the code that is tried are its own.
    with tempfile.TemporaryDirectory() as place:
        try:
            TARGETS[kind][0](r, Path(place))
        except UserError as error:
            check_message(str(error))
            return "refused"
    return "accepted"


def check_message(text: str) -> None:
    """A message can be printed, and read."""
    assert len(text) < 50_000
    assert all(c.isprintable() or c == "\n" for c in text)
