"""Files made to run code, hang a program or fill its memory are refused in words, and soon."""

import copy
import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataLoader import load_scene
from dataLoader.images import decode_images, read_header
from models.files import load_field
from models.optimizers import load_adam, make_adam
from opt import parse_options
from tests import fuzz_inputs
from tests.fuzz_mutators import png_chunk
from tests.helpers import GOLDEN, golden_config
from utils.checkpoints import load_checkpoint
from utils.curves import read_curves
from utils.errors import CheckpointError, OptionError, RunFolderError, SceneError, UserError, printable
from utils.files import parse_json
from utils.pickle_depth import tuple_depth
from utils.run_folder import read_json

SECONDS = 5.0


@pytest.fixture(autouse=True)
def soon_and_small():
    """Each test ends soon, and its memory grows by less than a forged size would need."""
    before, began = fuzz_inputs.peak_megabytes(reset=True), time.process_time()
    yield
    assert time.process_time() - began < SECONDS
    assert fuzz_inputs.peak_megabytes() - before < fuzz_inputs.MEGABYTES


@pytest.fixture
def syn(tmp_path):
    """A copy of the golden synthetic scene: its folder."""
    folder = tmp_path / "nerf_synthetic" / "tiny"
    shutil.copytree(GOLDEN / "scenes/nerf_synthetic/tiny", folder)
    return folder


def load(folder: Path, dataset: str = "syn", factor: float = 1):
    return load_scene(dataset, folder.parent.parent, folder.name, "train", factor, progress=False)


# --- scenes ---
def forged_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("size", [(60000, 60000), (13000, 13000), (2**31 - 1, 2**31 - 1), (9000, 9000)])
def test_a_png_that_claims_more_than_it_holds_is_refused_without_a_warning(syn, size, recwarn):
    (syn / "train/r_1.png").write_bytes(forged_png(*size))
    with pytest.raises(SceneError, match=r"r_1\.png"):
        load(syn)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("(10000000000, 17)", "<f8"),
        ("(99999, 17)", "<f8"),
        ("(10, 17)", "|O"),
        ("(10, 17)", "|V1000000000"),
        ("((" * 50, "x"),
    ],
)
def test_a_forged_npy_header_reserves_nothing(tmp_path, shape, kind):
    folder = tmp_path / "nerf_llff_data" / "tiny"
    shutil.copytree(GOLDEN / "scenes/nerf_llff_data/tiny", folder)
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (folder / "poses_bounds.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\0" * 999)
    with pytest.raises(SceneError, match=r"poses_bounds\.npy"):
        load(folder, "llff", 4)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"frames":' * 100_000, '{"frames": ' + "[" * 900 + "]" * 900 + "}"])
def test_json_that_is_nested_too_deeply_is_refused(syn, text):
    (syn / "transforms_train.json").write_text(text)
    with pytest.raises(SceneError, match=r"transforms_train\.json"):
        load(syn)


def test_ten_million_frames_are_refused_before_they_are_parsed(syn):
    (syn / "transforms_train.json").write_text('{"frames": [' + "{}," * 12_000_000 + "{}]}")
    with pytest.raises(SceneError, match="larger than 16 MiB"):
        load(syn)


@pytest.mark.parametrize("name", ["transforms_train.json", "train/r_1.png"])
@pytest.mark.parametrize("what", ["pipe", "folder", "loop", "device"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(syn, name, what):
    path = syn / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if what == "loop" else "/dev/zero")
    with pytest.raises(SceneError, match=path.name):
        load(syn)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "."])
def test_a_frame_that_names_no_image_is_refused(syn, name):
    path = syn / "transforms_train.json"
    content = json.loads(path.read_text())
    content["frames"][1]["file_path"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(SceneError) as caught:
        load(syn)
    assert "root:" not in str(caught.value)


def test_an_image_outside_the_scenes_folder_may_be_used(syn, tmp_path):
    (syn / "train/r_1.png").rename(tmp_path / "elsewhere.png")
    path = syn / "transforms_train.json"
    content = json.loads(path.read_text())
    content["frames"][1]["file_path"] = "../../elsewhere.png"
    path.write_text(json.dumps(content))
    assert load(syn).n_images == 4


def test_names_of_files_cannot_steer_a_terminal(syn):
    (syn / "train/r_1.png").unlink()
    path = syn / "transforms_train.json"
    content = json.loads(path.read_text())
    content["frames"][1]["file_path"] = "a\x1b[2J\nerror: all is well\udc80"
    path.write_text(json.dumps(content))
    with pytest.raises(SceneError) as caught:
        load(syn)
    assert all(c.isprintable() for c in str(caught.value))


def test_long_messages_are_cut_and_odd_characters_escaped():
    assert printable("a\x1b\udc80\nb") == "a\\x1b\\udc80\nb"
    assert len(str(UserError("x" * 10**6))) < 1000


# --- kinds of images ---
def saved(path: Path, image: Image.Image, kind: str = "PNG", **more) -> Path:
    image.save(path, kind, **more)
    return path


def test_16_bit_grey_palette_and_grey_alpha_give_the_right_pixels(tmp_path):
    grey = np.array([[0, 32768], [65535, 257]], np.uint16)
    shown = decode_images([saved(tmp_path / "16.png", Image.fromarray(grey))], (2, 2), 3)[0, :, :, 0]
    assert shown.tolist() == [[0, 128], [255, 1]]
    palette = Image.new("RGB", (2, 1), (200, 10, 20)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_images([saved(tmp_path / "p.png", palette)], (2, 1), 3)[0, 0, 0].tolist() == [200, 10, 20]
    both = saved(tmp_path / "la.png", Image.new("LA", (2, 1), (90, 40)))
    assert decode_images([both], (2, 1), 4)[0, 0, 0].tolist() == [90, 90, 90, 40]


def test_orientation_tags_are_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "turned.jpg", Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert read_header(path)[0] == (6, 4)


@pytest.mark.parametrize(
    ("mode", "kind", "says"), [("CMYK", "JPEG", "CMYK pixels"), ("F", "TIFF", "F pixels"), ("I", "TIFF", "I pixels")]
)
def test_colours_that_need_more_than_a_conversion_are_refused(tmp_path, mode, kind, says):
    with pytest.raises(SceneError, match=f"{says}, which are not supported; convert"):
        read_header(saved(tmp_path / "odd.png", Image.new(mode, (4, 4)), kind))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_several_pictures_in_one_file_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(3)]
    path = saved(tmp_path / "film.png", frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(SceneError, match="several pictures"):
        read_header(path)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "EPS", "PDF", "ICO"])
def test_formats_that_are_none_of_ours_are_not_even_tried(tmp_path, kind):
    with pytest.raises(SceneError, match="no image that can be read"):
        read_header(saved(tmp_path / "r.png", Image.new("RGB", (16, 16)), kind))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_shows_in_the_header_and_what_follows_a_picture_does_no_harm(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(noise), kind)
    whole = path.read_bytes()
    path.write_bytes(whole + b"a film follows" * 100)
    assert read_header(path)[0] == (40, 40)
    for part in (0.99, 0.7, 0.5):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(SceneError, match="perhaps cut short"):
            read_header(path)


# --- options ---
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_iters", "1" + "0" * 30),
        ("n_iters", "9" * 5000),
        ("batch_size", "1000000000000"),
        ("N_voxel_final", "1000000000000000"),
        ("lr_init", "1e999"),
        ("step_ratio", "1e-300"),
        ("upsamp_list", "[" + "1," * 100_000 + "1]"),
        ("n_lamb_sigma", "[1000000000,1,1]"),
        ("tag", "a\nb"),
        ("tag", "x" * 300),
        ("save_dir", "x" * 5000),
        ("seeds", "1000000"),
    ],
)
def test_what_no_machine_can_do_is_refused_in_a_short_line(option, value):
    with pytest.raises(OptionError) as caught:
        parse_options(["--nerf_dataset", "syn", "--nerf_scene", "lego", f"--{option}", value])
    assert option in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content", [b"\0\xff\xfe" * 100, b"x" * 10**6, b"a = [" * 20_000, b"=[" * 30_000, b"help = 1", b"batch_size = \0"]
)
def test_a_config_file_of_junk_is_refused_by_name(tmp_path, content):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(OptionError, match=r"mine\.txt"):
        parse_options(["--nerf_dataset", "syn", "--nerf_scene", "lego", "--config", str(tmp_path / "mine.txt")])


def test_half_open_lists_on_the_command_line_take_no_time():
    with pytest.raises(OptionError):
        parse_options(["=[" * 60_000, "x", "--nerf_scene"])


# --- checkpoints ---
def refused(path: Path, says: str = ".") -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        load_field(path, "cpu", golden_config("vm_mlpfea"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def rewritten(path: Path, change) -> None:
    """The golden checkpoint with the parts of its archive as change(name, content) -> (content, packing) gives them."""
    with zipfile.ZipFile(GOLDEN / "vm_mlpfea.th") as source, zipfile.ZipFile(path, "w") as target:
        for part in source.infolist():
            target.writestr(part.filename, *change(part.filename, source.read(part)))


class RunsCode:
    """Would make a file if its pickle were obeyed."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["value", "key", "kwargs", "array"])
def test_no_code_of_a_checkpoint_is_run_wherever_it_hides(tmp_path, monkeypatch, new_format, place):
    monkeypatch.chdir(tmp_path)
    state, evil = load_checkpoint(GOLDEN / "vm_mlpfea.th"), RunsCode()
    if place == "array":
        state["alphaMask.mask"] = np.array([evil], dtype=object)
    elif place == "kwargs":
        state["kwargs"]["aabb"] = evil
    else:
        state[evil if place == "key" else "kwargs"] = evil
    torch.save(state, "evil.th", _use_new_zipfile_serialization=new_format)
    refused(Path("evil.th"), "could run code; refused")
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(evil))
    assert Path("executed").exists()


def test_a_checkpoint_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path):
    bomb = b"\0" * 50_000_000
    rewritten(
        tmp_path / "bomb.th",
        lambda name, content: (
            (bomb, zipfile.ZIP_DEFLATED) if name.endswith("data/0") else (content, zipfile.ZIP_STORED)
        ),
    )
    refused(tmp_path / "bomb.th", "damaged")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("count", [10**8, 2**31 - 1])
def test_a_tensor_that_claims_more_elements_than_the_file_has_reserves_nothing(tmp_path, new_format, count):
    out = io.BytesIO()
    torch.save({"format": 1, "field": torch.zeros(100)}, out, _use_new_zipfile_serialization=new_format)
    forge = lambda data: data.replace(b"Kd", b"J" + struct.pack("<i", count))  # noqa: E731 - 100, as pickled
    path = tmp_path / "forged.th"
    if new_format:
        with zipfile.ZipFile(out) as source, zipfile.ZipFile(path, "w") as target:
            for part in source.infolist():
                content = source.read(part)
                target.writestr(part.filename, forge(content) if part.filename.endswith("data.pkl") else content)
    else:
        path.write_bytes(forge(out.getvalue()))
    refused(path, "damaged")


def doubled_tuples(levels: int) -> bytes:
    """A pickle of a dictionary with a key whose hash takes 2^levels operations."""
    pickle_ = b"\x80\x02}K\x00K\x01\x85q\x00s"
    for level in range(levels):
        here, next_ = bytes([level]), bytes([level + 1])
        pickle_ += b"K" + next_ + b"h" + here + b"h" + here + b"\x86q" + next_ + b"s"
    return pickle_ + b"h" + bytes([levels]) + b"K\x05s."


@pytest.mark.parametrize("new_format", [True, False])
def test_a_key_that_takes_forever_to_hash_is_refused(tmp_path, new_format):
    path, evil = tmp_path / "slow.th", doubled_tuples(100)
    if new_format:
        rewritten(path, lambda name, content: (evil if name.endswith("data.pkl") else content, zipfile.ZIP_STORED))
    else:
        path.write_bytes(evil)
    refused(path, "damaged")
    assert pickle.loads(doubled_tuples(10))[10][0] == pickle.loads(doubled_tuples(10))[9]


@pytest.mark.parametrize("new_format", [True, False])
def test_the_depth_of_tuples_is_seen_without_unpickling(new_format):
    deep = ((1, (2, (3,))), [(), {"a": (4,)}])
    for protocol in range(2, 5):
        assert tuple_depth(pickle.dumps(deep, protocol), 12) == 4
    out = io.BytesIO()
    torch.save(load_checkpoint(GOLDEN / "vm_mlpfea.th"), out, _use_new_zipfile_serialization=new_format)
    if new_format:
        with zipfile.ZipFile(out) as archive:
            out = io.BytesIO(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    out.seek(0)
    depths = [tuple_depth(out, 12) for _ in range(1 if new_format else 5)]
    assert 1 < max(depths) <= 4


HOSTILE_STATES = {
    "expanded": lambda s: s["kwargs"].update(aabb=torch.zeros(1).expand(10**6, 10**6)),
    "huge grid": lambda s: s["kwargs"].update(gridSize=[100_000, 100_000, 100_000]),
    "huge network": lambda s: s["kwargs"].update(featureC=10**9),
    "many components": lambda s: s["kwargs"].update(density_n_comp=[10**9] * 3),
    "huge mask": lambda s: s.update({"alphaMask.shape": (1, 1, 10**4, 10**4, 10**4)}),
    "tiny steps": lambda s: s["kwargs"].update(step_ratio=1e-12),
    "nan box": lambda s: s["kwargs"].update(aabb=torch.full((2, 3), torch.nan)),
    "nan parameters": lambda s: s["state_dict"].update({"basis_mat.weight": torch.full((27, 21), torch.nan)}),
    "complex": lambda s: s["state_dict"].update({"basis_mat.weight": torch.zeros(27, 21, dtype=torch.complex64)}),
    "sparse": lambda s: s["state_dict"].update({"basis_mat.weight": torch.zeros(27, 21).to_sparse()}),
    "meta": lambda s: s["state_dict"].update({"basis_mat.weight": torch.zeros(27, 21, device="meta")}),
    "floats as mask": lambda s: s.update({"alphaMask.mask": np.zeros(1116, np.float64)}),
    "large number": lambda s: s.update(iteration=10**400),
}


@pytest.mark.parametrize("name", HOSTILE_STATES)
def test_a_checkpoint_with_forged_contents_is_refused_before_anything_is_built(tmp_path, name, recwarn):
    state = load_checkpoint(GOLDEN / "vm_mlpfea.th")
    HOSTILE_STATES[name](state)
    torch.save(state, tmp_path / "forged.th")
    recwarn.clear()
    refused(tmp_path / "forged.th")
    assert not recwarn.list


def test_a_checkpoint_that_holds_itself_or_is_nested_without_end_is_refused(tmp_path):
    loop, deep = [], []
    loop.append(loop)
    for _ in range(200):
        deep = [deep]
    for number, value in enumerate((loop, deep)):
        torch.save({"format": 1, "field": value}, tmp_path / f"{number}.th")
        refused(tmp_path / f"{number}.th")


@pytest.mark.parametrize("what", ["pipe", "folder", "loop", "device"])
def test_a_checkpoint_that_is_no_regular_file_is_not_waited_for(tmp_path, what):
    path = tmp_path / "ckpt_1.th"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if what == "loop" else "/dev/zero")
    refused(path, "is no file, so no checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state"][0].update(exp_avg=torch.zeros(1)),
        lambda s: s["state"][0].update(exp_avg_sq=s["state"][0]["exp_avg_sq"] - 1.0),
        lambda s: s["state"][0].update(step=torch.tensor(-5.0)),
        lambda s: s["param_groups"][0].update(betas=(2.0, 3.0)),
        lambda s: s["param_groups"][0].update(lr=float("nan")),
        lambda s: s["state"].update({0: torch.zeros(3)}),
    ],
)
def test_moments_that_do_not_fit_are_refused_before_a_kernel_writes_to_them(change):
    parameter = torch.nn.Parameter(torch.ones(1, 4, 8, 8).contiguous(memory_format=torch.channels_last))
    old, new = (make_adam([{"params": [parameter], "lr": 0.1}]) for _ in range(2))
    parameter.grad = torch.ones_like(parameter)
    old.step()
    load_adam(new, copy.deepcopy(old.state_dict()))
    state = copy.deepcopy(old.state_dict())
    change(state)
    with pytest.raises((ValueError, KeyError, TypeError)):
        load_adam(new, state)


# --- what runs leave ---
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "NaN", "1e999", '{"a": ' + "9" * 5000 + "}", "\0", '{"psnr": Infinity}']
)
def test_hostile_results_are_called_damaged(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"results\.json is damaged"):
        read_json(tmp_path / "results.json")


def test_json_of_the_largest_depth_and_numbers_is_read():
    assert parse_json('{"a": [1, 2.5, null, "x"], "b": 123456789012345678}')["b"] == 123456789012345678
    assert isinstance(parse_json("1" + "0" * 18), float)


def test_a_line_of_a_log_without_end_costs_nothing(tmp_path):
    good = '{"step": 10, "time/train_seconds": 1.5, "train/PSNR": 20.0}\n'
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write(good + "[" * 5_000_000 + "\n" + good.replace("10", "20"))
    assert read_curves(tmp_path / "metrics.jsonl")[0]["iteration"] == [10, 20]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n" * 16_000_000)
    with pytest.raises(RunFolderError, match="is damaged"):
        read_curves(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(RunFolderError, match="not a regular file"):
        read_curves(tmp_path / "pipe.jsonl")
