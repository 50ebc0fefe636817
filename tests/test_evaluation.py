import dataclasses
import json
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from components.evaluation import Evaluation, evaluate, evenly_spaced, rays_at_once, render_poses, render_view
from components.metrics import psnr, ssim
from components.perceptual import PerceptualMetrics
from components.types import RenderOutput, Scene
from utils.errors import RunFolderError

HEIGHT, WIDTH, VIEWS = 24, 36, 3


class HalfDistance(torch.nn.Module):
    """Stands for an LPIPS network: half the mean absolute difference of its inputs."""

    def forward(self, a, b):
        assert a.shape[:2] == (1, 3)
        return (a - b).abs().mean() / 2


@pytest.fixture
def perceptual():
    return PerceptualMetrics({"alex": HalfDistance()}, [], torch.device("cpu"))


@pytest.fixture
def scene():
    """Cameras on the z axis that look along it; images are noise."""
    generator = torch.Generator().manual_seed(0)
    c2w = torch.eye(3, 4).repeat(VIEWS, 1, 1)
    c2w[:, 2, 3] = torch.arange(VIEWS)
    return Scene(
        name="noise",
        dataset="syn",
        split="test",
        images=torch.randint(0, 256, (VIEWS, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator),
        c2w=c2w,
        intrinsics=torch.tensor([[30.0, 30.0, WIDTH / 2, HEIGHT / 2]]).repeat(VIEWS, 1),
        aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]),
        near=2.0,
        far=6.0,
        white_background=True,
        random_background=False,
        ndc=False,
        image_paths=("a", "b", "c"),
        render_path=c2w,
    )


def paint(rays):
    """A picture that depends on the ray alone; the upper half is empty."""
    rgb = (0.5 + 0.5 * rays.directions + 0.1 * rays.origins[:, 2:]).clamp(0, 1)
    return RenderOutput(rgb, (rays.directions[:, 1] > 0).float(), 3.0 + rays.directions[:, 0])


@pytest.mark.parametrize(
    ("n_views", "n_vis", "expected"),
    [
        (200, 5, [0, 40, 80, 120, 160]),
        (3, 5, [0, 1, 2]),
        (7, 3, [0, 2, 4, 6]),
        (4, -1, [0, 1, 2, 3]),
        (200, 0, []),
        (0, 5, []),
    ],
)
def test_test_views_are_spaced_as_tensorf_spaces_them(n_views, n_vis, expected):
    assert evenly_spaced(n_views, n_vis) == expected


@pytest.mark.parametrize("chunk", [1, 7, 100, HEIGHT * WIDTH, 10**6])
def test_a_view_does_not_depend_on_the_chunk(scene, chunk):
    whole = render_view(scene, paint, scene.c2w[1], scene.intrinsics[1], HEIGHT * WIDTH)
    view = render_view(scene, paint, scene.c2w[1], scene.intrinsics[1], chunk)
    assert torch.equal(view.rgb, whole.rgb)
    assert torch.equal(view.depth, whole.depth)
    assert torch.equal(view.opacity, whole.opacity)
    assert (view.depth.diff(dim=1) > 0).all()
    assert (view.opacity[: HEIGHT // 2] == 0).all()
    assert (view.opacity[HEIGHT // 2 :] == 1).all()


SHORTAGES = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "torch on a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "numpy": MemoryError("Unable to allocate 64.0 GiB for an array"),
}


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("fits", [1, 30, 100])
def test_where_memory_does_not_suffice_a_view_is_rendered_in_smaller_parts(scene, fits, shortage):
    sizes = []

    def render(rays):
        if len(rays) > fits:
            raise SHORTAGES[shortage]
        sizes.append(len(rays))
        return paint(rays)

    view = render_view(scene, render, scene.c2w[1], scene.intrinsics[1], 200)
    assert torch.equal(view.rgb, render_view(scene, paint, scene.c2w[1], scene.intrinsics[1]).rgb)
    assert max(sizes) == {1: 1, 30: 25, 100: 100}[fits]


def test_memory_that_holds_not_even_a_ray_ends_the_rendering(scene):
    def render(rays):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        render_view(scene, render, scene.c2w[1], scene.intrinsics[1])


def test_another_fault_is_no_reason_to_try_smaller_parts(scene):
    tried = []

    def render(rays):
        tried.append(len(rays))
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        render_view(scene, render, scene.c2w[1], scene.intrinsics[1])
    assert len(tried) == 1


@pytest.mark.parametrize(("free_gib", "rays"), [(0, 1024), (1, 4096), (4, 16384), (100, 65536)])
def test_the_rays_at_once_follow_the_memory_that_is_free_on_cuda(monkeypatch, free_gib, rays):
    # A part of what is free is kept by torch, from tensors that are gone.
    kept = free_gib << 28
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free_gib << 30) - kept, 200 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (7 << 30) + kept)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 << 30)
    assert rays_at_once(torch.device("cuda")) == rays
    assert rays_at_once(torch.device("cpu")) == 8192


def test_no_gradient_is_recorded_while_rendering(scene):
    gain = torch.ones((), requires_grad=True)

    def render(rays):
        assert not torch.is_grad_enabled()
        out = paint(rays)
        return dataclasses.replace(out, rgb=out.rgb * gain)

    assert not render_view(scene, render, scene.c2w[0], scene.intrinsics[0], 100).rgb.requires_grad


def test_metrics_are_taken_view_by_view_of_float_colours_and_then_averaged(scene, perceptual):
    scene = dataclasses.replace(scene, images=scene.images.repeat(1, 2, 2, 1))
    result = evaluate(scene, paint, [0, 2], perceptual, progress=False)
    for position, index in enumerate((0, 2)):
        view = render_view(scene, paint, scene.c2w[index], scene.intrinsics[index], 500)
        truth = scene.image_rgb(index)
        assert result.psnr[position] == psnr(view.rgb, truth)
        assert result.ssim[position] == ssim(view.rgb, truth)
        assert result.lpips_alex[position] == pytest.approx((view.rgb - truth).abs().mean().item(), rel=1e-5)
    assert result.means["psnr"] == pytest.approx(sum(result.psnr) / 2)
    assert result.means["lpips_alex"] == pytest.approx(sum(result.lpips_alex) / 2)
    assert result.means["lpips_vgg"] is None
    assert json.loads(json.dumps(result.results()))["per_view"]["indices"] == [0, 2]
    assert result.results()["ssim"] == result.means["ssim"]


def test_a_perfect_rendering_has_infinite_psnr_and_ssim_one(scene, perceptual):
    def cheat(rays):
        truth = scene.image_rgb(int(rays.origins[0, 2])).reshape(-1, 3)
        return RenderOutput(truth, torch.ones(len(truth)), torch.ones(len(truth)))

    result = evaluate(scene, cheat, [0, 1, 2], perceptual, progress=False)
    assert result.psnr == [math.inf] * 3
    assert result.means["ssim"] == pytest.approx(1.0)


def test_rgba_images_are_compared_on_the_scene_background(scene, perceptual):
    images = torch.zeros(VIEWS, HEIGHT, WIDTH, 4, dtype=torch.uint8)
    scene = dataclasses.replace(scene, images=images)

    def white(rays):
        return RenderOutput(torch.ones(len(rays), 3), torch.zeros(len(rays)), torch.full((len(rays),), 6.0))

    assert evaluate(scene, white, [0], perceptual, progress=False).psnr == [math.inf]


def test_pictures_of_eight_pixels_are_evaluated_without_ssim_and_lpips(scene, perceptual):
    scene = dataclasses.replace(scene, images=scene.images[:, :8, :8])
    result = evaluate(scene, paint, [0, 1], perceptual, progress=False)
    assert result.means["psnr"] > 0
    assert result.means["ssim"] is None
    assert result.means["lpips_alex"] is None


def test_pictures_and_videos_are_written_with_rounded_colours(scene, perceptual, tmp_path):
    out = tmp_path / "imgs_test_all"
    result = evaluate(scene, paint, [0, 2], perceptual, out, save_video=True, progress=False)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"000.png", "002.png", "rgbd/000.png", "rgbd/002.png", "video.mp4", "depthvideo.mp4"}
    view = render_view(scene, paint, scene.c2w[0], scene.intrinsics[0], 500)
    expected = (view.rgb.numpy() * 255).round().astype(np.uint8)
    assert np.array_equal(np.array(Image.open(out / "000.png")), expected)
    pair = np.array(Image.open(out / "rgbd" / "000.png"))
    assert pair.shape == (HEIGHT, 2 * WIDTH, 3)
    assert np.array_equal(pair[:, :WIDTH], expected)
    assert (pair[: HEIGHT // 2, WIDTH:] == 255).all()
    assert iio.imread(out / "video.mp4", plugin="FFMPEG").shape == (2, HEIGHT, WIDTH, 3)
    assert np.array_equal(result.rgb, expected)
    assert np.array_equal(result.depth, pair[:, WIDTH:])
    assert np.array_equal(result.ground_truth, scene.images[0].numpy())


def test_without_an_output_folder_nothing_is_written_and_a_prefix_names_the_step(
    scene, perceptual, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    evaluate(scene, paint, [0], perceptual, save_video=True, progress=False)
    assert list(tmp_path.iterdir()) == []
    evaluate(scene, paint, [1], perceptual, tmp_path, progress=False, prefix="005000_")
    assert (tmp_path / "005000_001.png").exists()


def test_no_views_give_no_means_and_no_pictures(scene, perceptual):
    result = evaluate(scene, paint, [], perceptual, progress=False)
    assert result == Evaluation([])
    assert set(result.means.values()) == {None}


def test_an_output_folder_that_cannot_be_written_is_named(scene, perceptual, tmp_path):
    (tmp_path / "file").write_text("")
    for video in (False, True):
        with pytest.raises(RunFolderError, match=r"file.*(000\.png|video\.mp4)"):
            evaluate(scene, paint, [0], perceptual, tmp_path / "file", save_video=video, progress=False)


def test_a_camera_path_becomes_pictures_and_two_videos_of_its_poses(scene, tmp_path):
    render_poses(scene, paint, scene.render_path, scene.intrinsics[0], tmp_path, chunk=300, progress=False)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000.png", "001.png", "002.png"]
    assert len(list((tmp_path / "rgbd").iterdir())) == 3
    for name in ("video.mp4", "depthvideo.mp4"):
        assert len(iio.imread(tmp_path / name, plugin="FFMPEG")) == 3
    brightness = [np.array(Image.open(tmp_path / f"{i:03d}.png")).mean() for i in range(3)]
    assert brightness[0] < brightness[1] < brightness[2]
