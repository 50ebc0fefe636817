import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT
from utils.errors import RunFolderError
from utils.images import (
    CAPTION,
    captioned,
    depth_range,
    depth_to_color,
    heat_map,
    save_png,
    save_video,
    side_by_side,
    to_uint8,
)


def test_colours_are_rounded_and_clipped_not_truncated():
    values = np.array([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 1.7, np.nan, np.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255, 0, 255]
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(every.astype(np.float32) / 255), every)
    assert to_uint8(every) is every


def test_a_png_holds_the_rounded_colours_and_its_folder_is_made(tmp_path):
    image = np.random.default_rng(0).random((5, 7, 3)).astype(np.float32)
    save_png(tmp_path / "a" / "b" / "000.png", image)
    assert np.array_equal(np.array(Image.open(tmp_path / "a" / "b" / "000.png")), to_uint8(image))


def test_pictures_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    frame = np.zeros((4, 4, 3))
    with pytest.raises(RunFolderError, match=r"000\.png"):
        save_png(tmp_path / "file" / "000.png", frame)
    with pytest.raises(RunFolderError, match=r"video\.mp4"):
        save_video(tmp_path / "file" / "video.mp4", [frame])


@pytest.mark.parametrize("size", [(48, 64), (31, 45)])
def test_a_video_holds_every_frame_at_an_even_size(tmp_path, size):
    frames = [np.full((*size, 3), level, np.uint8) for level in (20, 120, 220)]
    save_video(tmp_path / "video.mp4", iter(frames), fps=10)
    video = iio.imread(tmp_path / "video.mp4", plugin="FFMPEG")
    assert video.shape == (3, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(video.mean((1, 2, 3)) - [20, 120, 220]).max() < 6


@pytest.mark.parametrize("frames", [4, 400])
def test_a_video_for_which_there_is_no_room_is_named(tmp_path, frames):
    # Few frames fit into ffmpeg's buffers: only at its end it finds the disk full.
    pytest.importorskip("resource")
    program = (
        "import resource, sys, numpy\n"
        "from utils.errors import RunFolderError\n"
        "from utils.images import save_video\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "noise = numpy.random.default_rng(0).random((64, 64, 3))\n"
        "try:\n"
        f"    save_video({str(tmp_path / 'video.mp4')!r}, [noise] * {frames})\n"
        "except RunFolderError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"cannot write {tmp_path / 'video.mp4'} (")


def test_a_video_without_frames_leaves_no_file(tmp_path):
    save_video(tmp_path / "video.mp4", [])
    assert not (tmp_path / "video.mp4").exists()


def test_the_depth_range_is_that_of_opaque_pixels():
    depth = np.full((10, 10), 6.0)
    depth[:5] = np.linspace(3.0, 4.0, 50).reshape(5, 10)
    opacity = (depth < 5.0).astype(np.float32)
    low, high = depth_range(depth, opacity, 2.0, 6.0)
    assert 2.8 < low < 3.1
    assert 3.9 < high < 4.2


@pytest.mark.parametrize(("depth", "opacity"), [(3.0, 0.0), (3.0, 1.0), (np.nan, 1.0)])
def test_a_depth_without_extent_takes_the_whole_range(depth, opacity):
    assert depth_range(np.full((4, 4), depth), np.full((4, 4), opacity), 2.0, 6.0) == (2.0, 6.0)


def test_near_is_red_far_is_blue_and_transparent_is_white():
    depth = np.array([[2.0, 2.3, 5.7, 6.0, 99.0, np.nan]])
    color = depth_to_color(depth, 2.0, 6.0).astype(int)
    assert (color[0, :2, 0] > color[0, :2, 2]).all()
    assert (color[0, 2:, 2] > color[0, 2:, 0]).all()
    assert (depth_to_color(depth, 2.0, 6.0, np.zeros((1, 6))) == 255).all()
    assert np.array_equal(depth_to_color(depth, 2.0, 6.0, np.ones((1, 6))), color)


def test_more_visits_are_brighter_and_none_is_dark():
    counts = np.array([[0, 1, 2, 4, 8]])
    brightness = heat_map(counts).astype(int).sum(-1)[0]
    assert (np.diff(brightness) > 0).all()
    assert brightness[0] < 10
    assert (heat_map(np.zeros((3, 4))).astype(int).sum(-1) < 10).all()


@pytest.mark.parametrize("width", [3, 300])
def test_a_caption_stands_over_the_picture(width):
    image = np.zeros((4, width, 3))
    picture = captioned(image, "ground truth")
    assert picture.shape == (4 + CAPTION, width, 3)
    assert picture[CAPTION:].max() == 0
    assert picture[0].min() == picture[CAPTION - 1, :4].min() == 255
    assert width == 3 or picture[:CAPTION].min() < 128


def test_pictures_stand_side_by_side():
    left, right = np.zeros((4, 3, 3)), np.full((4, 5, 3), 255, np.uint8)
    both = side_by_side([left, right])
    assert both.shape == (4, 8, 3)
    assert both[:, :3].max() == 0
    assert both[:, 3:].min() == 255
