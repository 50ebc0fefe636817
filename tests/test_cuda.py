"""CUDA equals the CPU: renderings, gradients, trainings, resumed runs, and how often a step waits. The kernels one by
one are in tests/test_triton.py. `make gpu-check` runs what is marked cuda."""

import warnings

import pytest
import torch

import train
from components.cameras import cast_rays
from components.pixel_sets import PixelSet, pixel_batch
from components.regularisers import build_regularisers
from components.types import Rays
from models import fixed_steps
from models.optimizers import make_adam
from opt import parse_options
from samplers import SAMPLERS, build_sampler
from tests.helpers import exact_products, random_field, random_rays
from tests.reference import dense_render
from tests.test_cameras import small_scene
from tests.test_training import data_folder, options, run_folder  # noqa: F401 - data_folder is a fixture
from utils.checkpoints import latest_checkpoint, load_checkpoint
from utils.errors import CheckpointError
from utils.seeds import make_generator

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _without_tf32():
    with exact_products():  # and back to it after a training, which chooses TF32
        yield


def on(device, model, ndc, masked=True, seed=0, n=500):
    field = random_field(seed, model, ndc, masked).to(device)
    field.select_kernels()
    rays = random_rays(seed, n, ndc)
    return field, Rays(rays.origins.to(device), rays.directions.to(device))


def rendering_and_gradients(render, field, rays):
    field.zero_grad()
    out = render(rays, 1.0, None, 61)
    out.rgb.square().sum().backward()
    return [out.rgb.detach().cpu(), out.depth.cpu(), *(p.grad.cpu() for p in field.parameters())]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ndc", [False, True])
@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_cuda_equals_the_cpu_and_the_dense_twin_on_cuda(model, ndc, masked):
    for seed in range(3):
        results = []
        for device in ("cpu", "cuda"):
            field, rays = on(device, model, ndc, masked, seed)
            results.append(rendering_and_gradients(field.render, field, rays))
        results.append(rendering_and_gradients(lambda *a, f=field: dense_render(f, *a), field, rays))
        for cpu, cuda, twin in zip(*results, strict=True):
            for other in (cpu, twin):
                # A sample on the edge of the box, the mask or the weight threshold may fall either way.
                close = torch.isclose(cuda, other, rtol=1e-3, atol=1e-4 * max(other.abs().max().item(), 1e-6))
                assert close.float().mean() > 0.99


@pytest.mark.parametrize("ndc", [False, True])
@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_evaluations_that_stop_behind_opaque_samples_show_the_same_picture(model, ndc):
    field, rays = on("cuda", model, ndc, seed=4)
    assert field.kernels.weights_until_opaque is not None
    with torch.no_grad():
        for line in field.density_line:
            line.mul_(30.0)  # many rays become opaque
        fast = field.render(rays, 1.0)
    whole = field.render(rays, 1.0)
    assert (whole.opacity > 0.999).any()
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(getattr(fast, name), getattr(whole, name).detach(), rtol=1e-4, atol=1e-5)


def test_rays_are_those_of_the_cpu_where_matrix_products_are_in_tf32():
    scene = small_scene(n_images=5, height=150, width=170)
    index = torch.arange(0, scene.n_pixels, 7)
    torch.set_float32_matmul_precision("high")
    cpu = cast_rays(scene, pixel_batch(index, scene.height, scene.width))
    cuda = cast_rays(scene.to("cuda"), pixel_batch(index.to("cuda"), scene.height, scene.width))
    torch.testing.assert_close(cuda.directions.cpu(), cpu.directions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["TensorVMSplit", "TensorCP"])
def test_a_step_waits_for_its_numbers_of_live_and_of_coloured_samples_alone(model):
    field, rays = on("cuda", model, False)
    optimizer = make_adam(field.param_groups(0.02, 1e-3))
    assert optimizer.defaults["fused"]
    for _ in range(2):  # kernels are compiled in the first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = field.render(rays, 1.0, torch.rand(len(rays), 1, device="cuda"), 61)
                loss = out.rgb.square().mean() + sum(r(field, 1.0) for r in build_regularisers(1e-4, 1e-4, 1e-4, 1e-4))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 2, waits


def test_a_cuda_training_learns_as_the_cpu_does(data_folder, tmp_path):  # noqa: F811
    psnr = {
        device: train.run(options(data_folder, tmp_path / device, "syn", "TensorVMSplit", "--device", device))["psnr"]
        for device in ("cpu", "cuda")
    }
    assert psnr["cuda"] == pytest.approx(psnr["cpu"], abs=1.5)


@pytest.mark.parametrize("name", ["syn", "llff"])
def test_a_cuda_run_resumes_and_is_refused_on_the_cpu(data_folder, tmp_path, name, monkeypatch):  # noqa: F811
    more = ["--filter_rays", "1", "--cuda_graphs", "0"]
    o = options(data_folder, tmp_path, name, "TensorVMSplit", "--device", "cuda", *more)
    step = train.Trainer.step

    def interrupted(self):
        if self.iteration == 23:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(o)
    monkeypatch.setattr(train.Trainer, "step", step)
    on_cpu = options(data_folder, tmp_path, name, "TensorVMSplit", "--device", "cpu", *more)
    with pytest.raises(CheckpointError, match="--device cuda"):
        train.run(on_cpu)
    results = train.run(o)
    assert results["psnr"] > 10
    assert results["peak_memory_mb"] > results["static_memory_mb"] > 0
    assert load_checkpoint(latest_checkpoint(run_folder(o)))["iteration"] == 30


def test_a_run_replayed_as_graphs_resumes_and_tells_its_memory(data_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fixed_steps, "SEEN", 2)
    monkeypatch.setattr(fixed_steps, "LEAST", 64)
    more = ["--device", "cuda", "--cuda_graphs", "1", "--TV_weight_density", "0.1"]
    o = options(data_folder, tmp_path, "syn", "TensorVMSplit", *more)
    advance, replayed = train.Trainer.advance, []

    def interrupted(self, most):
        if self.iteration >= 23:
            raise KeyboardInterrupt
        n_steps = advance(self, min(most, 3))
        replayed.append(self.fixed.step is not None)
        return n_steps

    monkeypatch.setattr(train.Trainer, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(o)
    assert any(replayed)
    monkeypatch.setattr(train.Trainer, "advance", advance)
    results = train.run(o)
    assert results["psnr"] > 10
    assert results["peak_memory_mb"] > results["static_memory_mb"] > 0
    assert results["step_memory_mb"] > 0
    assert load_checkpoint(latest_checkpoint(run_folder(o)))["iteration"] == 30


@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
def test_every_sampler_trains_on_cuda(data_folder, tmp_path, strategy):  # noqa: F811
    for name, filter_rays in (("syn", "1"), ("llff", "0")):
        more = ["--device", "cuda", "--strategy", strategy, "--filter_rays", filter_rays]
        results = train.run(options(data_folder, tmp_path, name, "TensorVMSplit", *more))
        assert results["psnr"] > 8


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
def test_samplers_wait_for_cuda_no_more_than_they_say(strategy, filtered):
    scene = small_scene(n_images=5, height=150, width=170).to("cuda")
    kept = None
    if filtered:
        kept = torch.rand(scene.n_pixels, generator=torch.Generator().manual_seed(0)).to("cuda") < 0.6
    o = parse_options(["--demo", "--batch_size", "500"])
    sampler = build_sampler(strategy, scene, PixelSet(scene.n_pixels, kept), o, make_generator(0, "sampler", "cuda"))
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step and strategy != "soft" else "default")
        try:
            pixels = sampler.sample(step)
            error = torch.rand(len(pixels), 3, device="cuda")
            if pixels.xy.requires_grad:
                pixels.xy.grad = torch.randn_like(pixels.xy) * 1e-5
            weight = sampler.weigh(pixels, error, step)
            sampler.update(pixels, weight * error.square().mean(-1), step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert {t.device.type for t in (pixels.image_id, pixels.xy, weight)} == {"cuda"}
        assert weight.isfinite().all()
