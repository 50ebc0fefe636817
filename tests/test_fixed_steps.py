"""Steps of fixed shapes equal ordinary ones: renderings with a capacity, recorded steps, windows that had no room.

On a CUDA device with CUDA's graphs (marked cuda then). Elsewhere Triton's kernels are interpreted, and tests/tape.py
stands for the graphs.
"""

import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.optimizers
import train
from benchmarks import replayed_step
from components.perceptual import load_perceptual_metrics
from components.regularisers import build_regularisers
from components.types import Capacity, PixelBatch, Rays
from models import fixed_steps, kernels
from models.field import first_places
from models.fixed_steps import FixedStep, FixedSteps, obstacle
from models.kernels import compiled_network, foreach_l1
from opt import parse_options
from samplers.soft_mining import SoftMiningSampler
from samplers.standard import StandardSampler
from tests.helpers import Waits, exact_products, random_field, random_rays
from tests.test_cameras import small_scene
from tests.test_training import data_folder, options  # noqa: F401 - data_folder is a fixture
from utils.memory import MemoryMeter

pytest.importorskip("triton", reason="Triton is not installed")
from models.kernels import triton_evaluation, triton_lookups, triton_network, triton_rendering
from tests.tape import tape_recorder

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = [pytest.mark.cuda] if ON_CUDA else []
TRITON = kernels.Kernels(
    "interpreted",
    triton_lookups,
    triton_rendering,
    triton_evaluation.weights_until_opaque,
    foreach_l1.l1_norm,
    fixed_shapes=True,
    network=triton_network,
)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """Triton's kernels and torch's Adam on the CPU, with few operations for the interpreter."""
    if ON_CUDA:
        return
    monkeypatch.setattr(triton_evaluation, "_SEGMENT", 64)
    monkeypatch.setattr(triton_lookups, "_LENGTH", 1)
    monkeypatch.setattr(triton_lookups, "_TILE", 1 << 12)
    monkeypatch.setattr(triton_lookups, "_GRADIENT_TILE", 1 << 11)
    monkeypatch.setattr(triton_rendering, "_BLOCK", 64)
    monkeypatch.setattr(triton_rendering, "_FLAT_BLOCK", 1 << 10)
    monkeypatch.setattr(triton_network, "_ROWS", 512)
    monkeypatch.setattr("models.field._COLOUR_CHUNK", {})
    monkeypatch.setattr(kernels, "select", lambda device: TRITON)
    monkeypatch.setattr(compiled_network, "serves", lambda *given: False)
    monkeypatch.setattr(models.optimizers.compiled_adam, "serves", lambda parameters: False)


# --- renderings ---
@pytest.fixture(autouse=True)
def _without_tf32():
    with exact_products():  # and back to it after a training, which chooses TF32
        yield


def a_field(seed=2, model="TensorVMSplit", **more):
    field = random_field(seed, model, **more).to(DEVICE)
    field.select_kernels()
    return field


def some_rays(n, seed=2, detached=False, ndc=False):
    rays = random_rays(seed, n, ndc)
    return Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE), detached)


def rendered(field, rays, capacity, background=1.0):
    """(rgb, opacity, depth, gradients of all parameters and of the rays, n_live, n_colour)."""
    rays = Rays(rays.origins.clone().requires_grad_(), rays.directions.clone().requires_grad_(), rays.detach_samples)
    field.zero_grad()
    jitter = torch.full(field.jitter_shape(len(rays), 61), 0.3, device=DEVICE)
    out = field.render(rays, background, jitter, 61, capacity)
    out.rgb.square().sum().backward()
    gradients = [x.grad for x in (*field.parameters(), rays.origins, rays.directions) if x.grad is not None]
    return [out.rgb.detach(), out.opacity.detach(), out.depth, *gradients], int(out.n_live), int(out.n_colour)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize(
    ("model", "shading"), [("TensorVMSplit", "MLP_Fea"), ("TensorVMSplit", "MLP_PE"), ("TensorCP", "SH")]
)
@pytest.mark.parametrize("spare", [(0, 0), (1, 0), (0, 1), (37, 90)])
def test_a_rendering_with_room_enough_equals_one_without_a_capacity(model, shading, spare, detached):
    field, rays = a_field(model=model, shading=shading), some_rays(9, detached=detached)
    near = 1e-5 if ON_CUDA else 1e-6
    expected, n_live, n_colour = rendered(field, rays, None)
    assert 0 < n_colour <= n_live
    ours, *needs = rendered(field, rays, Capacity(n_live + spare[0], n_colour + spare[1]))
    assert needs == [n_live, n_colour]
    assert len(ours) == len(expected)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=10 * near, atol=near * max(wanted.abs().max().item(), 1e-3))


@pytest.mark.parametrize("detached", [False, True])
def test_a_rendering_in_ndc_with_room_enough_equals_one_without_a_capacity(detached):
    field, rays = a_field(ndc=True), some_rays(9, detached=detached, ndc=True)
    near = 1e-5 if ON_CUDA else 1e-6
    expected, n_live, n_colour = rendered(field, rays, None)
    assert 0 < n_colour <= n_live
    ours, *needs = rendered(field, rays, Capacity(n_live + 37, n_colour + 90))
    assert needs == [n_live, n_colour]
    assert len(ours) == len(expected)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=10 * near, atol=near * max(wanted.abs().max().item(), 1e-3))


def test_samples_beyond_the_capacity_are_counted_and_touch_nothing():
    field, rays = a_field(), some_rays(9)
    _, n_live, n_colour = rendered(field, rays, None)
    values, *needs = rendered(field, rays, Capacity(n_live, n_colour - 1))
    assert needs == [n_live, n_colour]
    assert all(x.isfinite().all() for x in values)
    values, live, colour = rendered(field, rays, Capacity(n_live - 1, n_colour))
    assert live == n_live
    assert colour <= n_colour
    assert all(x.isfinite().all() for x in values)
    # A ray that lies before the end of the room is whole.
    samples = field.march(rays, None, 61, n_live // 2)
    whole = field.march(rays, None, 61)
    assert len(samples) == n_live // 2 + 1
    assert samples.offsets.max() == n_live // 2
    torch.testing.assert_close(samples.position[:-1], whole.position[: n_live // 2], rtol=0, atol=0)
    assert (samples.position[-1] == 4.0).all()
    assert samples.delta[-1] == 0


def test_rays_that_meet_nothing_fit_into_no_room_at_all():
    field, rays = a_field(), some_rays(3)
    away = Rays(rays.origins + 100.0, rays.directions)
    values, n_live, n_colour = rendered(field, away, Capacity(1, 1), 0.25)
    assert (n_live, n_colour) == (0, 0)
    assert (values[0] == 0.25).all()


def test_padding_gets_no_colour_whatever_the_threshold():
    field, rays = a_field(), some_rays(9)
    object.__setattr__(field.config, "weight_threshold", -1.0)
    _, n_live, n_colour = rendered(field, rays, Capacity(2000, 2000))
    assert n_live == n_colour == len(field.march(rays, torch.full((9, 1), 0.3, device=DEVICE), 61))


@pytest.mark.parametrize("seed", range(20))
def test_first_places_are_those_of_nonzero(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 60, (), generator=generator))
    end, capacity = (int(torch.randint(0, size + 1, (), generator=generator)) for _ in range(2))
    chosen = torch.rand(size, generator=generator) < 0.4
    places, count = first_places(chosen, torch.tensor(end), capacity)
    expected = chosen[:end].nonzero()[:, 0]
    assert count == len(expected)
    assert len(places) == capacity
    assert places[: len(expected)].tolist() == expected[:capacity].tolist()
    assert (places[len(expected) :] == size - 1).all()


@pytest.mark.skipif(ON_CUDA, reason="a graph that waited could not be recorded")
def test_a_step_with_a_capacity_does_not_wait():
    field, rays = a_field(), some_rays(3)
    with Waits() as waits:
        out = field.render(rays, 1.0, torch.rand(3, 1), 61, Capacity(500, 300))
        out.rgb.square().mean().backward()
    assert waits.count == 0


class Devices(TorchDispatchMode):
    """Collects the devices of all tensors that operations take and return."""

    def __init__(self):
        super().__init__()
        self.seen, self.count = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        self.count += 1
        return out


@pytest.mark.skipif(ON_CUDA, reason="a graph that copied from the host could not be recorded")
@pytest.mark.parametrize("moving", [False, True])
def test_a_recorded_step_takes_nothing_from_the_host(monkeypatch, moving):
    # On torch's device without data, tensors that the host makes on the way would be seen to be elsewhere.
    field, scene = random_field(2), small_scene(n_images=5, height=50, width=70)
    for module in field.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="meta")
    optimizer = torch.optim.Adam(field.param_groups(0.02, 1e-3), fused=True)
    for parameter in field.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device="meta"), **moments}
    updates = []
    monkeypatch.setattr(torch, "_fused_adam_", lambda *_, **given: updates.append((given["lr"], given["found_inf"])))
    for module in (triton_lookups, triton_network, triton_rendering):
        monkeypatch.setattr(module, "serves", lambda *_: True)
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", lambda *_, **__: None)
    xy = torch.zeros(64, 2, device="meta").requires_grad_(moving)
    pixels = PixelBatch(torch.zeros(64, dtype=torch.int64, device="meta"), xy)
    terms = build_regularisers(1e-4, 1e-2, 1e-2, 1e-4)
    devices = Devices()

    def record(part):
        with devices:
            part()
        return part

    FixedStep(field, scene.to("meta"), optimizer, terms, Capacity(500, 300), pixels, 40, record)
    assert devices.seen == {"meta"}
    assert devices.count > 200
    assert len(updates) == 2 * len(optimizer.param_groups)
    assert {x.device.type for given in updates for x in given} == {"meta"}


def test_double_precision_has_no_capacity():
    field, rays = a_field().double(), some_rays(3)
    with pytest.raises(ValueError, match="float32"):
        field.render(Rays(rays.origins.double(), rays.directions.double()), 1.0, None, 61, Capacity(500, 300))


@pytest.mark.parametrize("name", ["before", "after"])
def test_replayed_steps_are_measured_and_move_nothing(monkeypatch, name):
    recorder = fixed_steps.graph_recorder if ON_CUDA else tape_recorder(monkeypatch)
    field, made = a_field(), []

    class Noted(FixedSteps):
        def make(self, *given, **more):
            made.append((super().make(*given, **more), given[2]))
            return made[-1][0]

    monkeypatch.setattr(replayed_step, f"{name}_mask", lambda device: field)
    monkeypatch.setattr(replayed_step, "FixedSteps", Noted)
    monkeypatch.setattr(replayed_step, "WINDOW", 2)
    monkeypatch.setattr(fixed_steps, "LEAST", 64)
    before, clock = [parameter.clone() for parameter in field.parameters()], time.perf_counter()
    result = replayed_step.measure(name, 8, 3, torch.device(DEVICE), recorder)
    seconds = time.perf_counter() - clock
    assert result["ms"]["step"] < 1000 * seconds / 6  # of three windows of two
    assert min(result["ms"].values()) > 0
    assert result["ms"]["step"] >= result["ms"]["backward"]
    assert result["live_per_ray"] > 0
    ((step, optimizer),) = made
    assert step.ray_loss.sum() > 0
    assert step.terms["reg_l1"] > 0
    # One ordinary step, and four windows of two.
    assert {int(state["step"]) for state in optimizer.state.values()} == {9}
    assert all(torch.equal(a, b) for a, b in zip(field.parameters(), before, strict=True))


def test_replayed_steps_without_room_are_no_measurement(monkeypatch):
    recorder = fixed_steps.graph_recorder if ON_CUDA else tape_recorder(monkeypatch)
    field = a_field()
    monkeypatch.setattr(replayed_step, "before_mask", lambda device: field)
    monkeypatch.setattr(replayed_step, "WINDOW", 1)
    monkeypatch.setattr(FixedSteps, "capacity", property(lambda steps: Capacity(3, 3)))
    with pytest.raises(RuntimeError, match="updates were skipped"):
        replayed_step.measure("before", 8, 1, torch.device(DEVICE), recorder)


# --- what stands in the way ---
def test_obstacles_are_named():
    field = a_field()
    assert obstacle(field) is None
    assert obstacle(a_field(1, ndc=True)) is None
    with torch.autograd.set_detect_anomaly(True):
        assert "--debug" in obstacle(field)
    field.kernels = kernels.Kernels("", triton_lookups, triton_rendering)
    assert "CUDA" in obstacle(field)


# --- trainings ---
SHORT = ["--n_iters", "17", "--batch_size", "6", "--upsamp_list", "[11]", "--update_AlphaMask_list", "[6]"]
SHORT += ["--progress_refresh_rate", "100", "--vis_every", "100", "--save_every", "100", "--device", DEVICE]
SHORT += ["--cuda_graphs", "0"]
SHORT += ["--L1_weight_inital", "1e-3", "--L1_weight_rest", "5e-4", "--Ortho_weight", "1e-3"]
SHORT += ["--TV_weight_density", "1e-2"]


class Counting(FixedSteps):
    """Also keeps what was judged: (steps of a window, those that had room)."""

    windows: list

    def judge(self, needs):
        had_room = super().judge(needs)
        self.windows.append((len(needs), had_room))
        return had_room


@pytest.fixture
def replaying(monkeypatch):
    """Steps recorded after 2 ordinary ones, replayed in windows of 4; the class that counts them."""
    recorder = fixed_steps.graph_recorder if ON_CUDA else tape_recorder(monkeypatch)

    class Recorded(Counting):
        windows: ClassVar[list] = []

        def __init__(self):
            super().__init__(recorder)

    monkeypatch.setattr(train, "FixedSteps", Recorded)
    monkeypatch.setattr(train, "WINDOW", 4)
    monkeypatch.setattr(fixed_steps, "SEEN", 2)
    monkeypatch.setattr(fixed_steps, "LEAST", 64)
    return Recorded


def test_an_ordinary_step_leaves_no_way_back_for_a_recording_to_meet(data_folder):  # noqa: F811
    # A graph cannot be recorded while nodes of the default stream are alive: autograd would join the two.
    trainer = trained(data_folder, "--n_iters", "2")
    assert trainer.terms
    assert not any(term.requires_grad for term in (*trainer.terms.values(), *trainer.losses))


def trained(data_folder, *more, scene="syn"):  # noqa: F811
    """A trainer after all its steps and the growing between them."""
    o = options(data_folder, "unused", scene, "TensorVMSplit", *SHORT, *more)
    scenes = {split: train.load_split(o, split) for split in ("train", "test")}
    device = torch.device(DEVICE)
    trainer = train.Trainer(
        o, Path("unused"), device, scenes, load_perceptual_metrics(None, device), MemoryMeter(device)
    )
    trainer.begin()
    trainer.fixed = trainer.fixed_steps()
    ended, calls = [], 0
    while trainer.iteration < o.n_iters:
        assert (calls := calls + 1) < 100
        if trainer.advance(trainer.steps_ahead()):
            trainer.grow()
            trainer.iteration += 1
            ended.append(trainer.iteration)
    # Growth happened where it should.
    assert {n for n in (7, 12, o.n_iters) if n <= o.n_iters} <= set(ended)
    assert len(trainer.losses) == o.n_iters
    return trainer


def assert_same_training(ours, expected):
    """Parameters, moments, losses and terms up to rounding; streams and counts exactly."""
    # On CUDA the order of additions, and with it the last bits of every step, vary from run to run.
    near = 0.03 if ON_CUDA else 1e-4

    def alike(got, wanted, tolerance):
        assert (got - wanted).norm() <= tolerance * wanted.norm()

    for name, generator in expected.generators.items():
        assert torch.equal(ours.generators[name].get_state(), generator.get_state()), name
    assert torch.equal(ours.sampler.state_dict()["generator"], expected.sampler.state_dict()["generator"])
    for key in ("steps", "rays"):
        assert ours.stages.total(key) == expected.stages.total(key)
    for got, wanted in zip(ours.optimizer.param_groups, expected.optimizer.param_groups, strict=True):
        assert {k: v for k, v in got.items() if k != "params"} == {k: v for k, v in wanted.items() if k != "params"}
    assert ours.field.grid_size == expected.field.grid_size
    assert ours.terms.keys() == expected.terms.keys()
    if ON_CUDA and isinstance(expected.sampler, SoftMiningSampler):
        return  # whose few walkers step on other pixels by a last bit
    assert torch.equal(ours.draws.tensor, expected.draws.tensor)
    for got, wanted in zip(ours.field.parameters(), expected.field.parameters(), strict=True):
        alike(got, wanted, near)
        one, other = ours.optimizer.state[got], expected.optimizer.state[wanted]
        assert one["step"] == other["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            alike(one[name], other[name], 10 * near)
    alike(torch.stack(ours.losses), torch.stack(expected.losses), 10 * near)
    assert [r.weight for r in ours.regularisers] == [r.weight for r in expected.regularisers]
    for name, term in expected.terms.items():
        assert ours.terms[name].item() == pytest.approx(term.item(), rel=10 * near)
    for key in ("live_samples", "colour_samples"):
        assert ours.stages.total(key) == pytest.approx(expected.stages.total(key), rel=10 * near)


@pytest.mark.parametrize(("strategy", "steps"), [("full", 17), ("egra", 6), ("soft", 17), ("expansive", 6)])
def test_a_replayed_training_is_the_ordinary_one(data_folder, replaying, strategy, steps):  # noqa: F811
    more = ["--strategy", strategy, "--n_iters", str(steps)]
    expected, ours = trained(data_folder, *more), trained(data_folder, *more, "--cuda_graphs", "1")
    # The others are ordinary: two before the first window, and two after each growth.
    assert sum(had_room for _, had_room in replaying.windows) == steps - (6 if steps == 17 else 2)
    assert_same_training(ours, expected)


@pytest.mark.parametrize("strategy", ["full", "soft"])
def test_a_replayed_training_in_ndc_is_the_ordinary_one(data_folder, replaying, strategy):  # noqa: F811
    more = ["--strategy", strategy, "--n_iters", "6", "--nSamples", "40"]
    expected = trained(data_folder, *more, scene="llff")
    ours = trained(data_folder, *more, "--cuda_graphs", "1", scene="llff")
    assert sum(had_room for _, had_room in replaying.windows) == 4
    assert_same_training(ours, expected)


@pytest.mark.parametrize("strategy", ["full", "soft"])
def test_steps_that_had_no_room_are_made_again(data_folder, replaying, monkeypatch, strategy):  # noqa: F811
    needs, step = [], train.Trainer.step

    def noted(trainer):
        losses = step(trainer)
        needs.append(trainer.needs)
        return losses

    for seed in range(8):
        needs.clear()
        more = ["--strategy", strategy, "--n_iters", "7", "--seed", str(seed)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Trainer, "step", noted)
            expected = trained(data_folder, *more)
        # The first step that needs more than those before it, from the third on, which is the first replayed one.
        larger = [n for n in range(3, 7) if needs[n][0] > max(live for live, _ in needs[2:n])]
        if larger:
            break
    # No room for the first replayed step, then room up to the larger one, then for all.
    largest = larger[0]
    live, coloured = (max(of_one) for of_one in zip(*needs[2:largest], strict=True))
    rooms = [Capacity(1, 1), Capacity(live, coloured), Capacity(1 << 12, 1 << 12)]
    monkeypatch.setattr(replaying, "capacity", property(lambda steps: rooms[min(max(steps.n_made, 1), 3) - 1]))
    monkeypatch.setattr(train, "WINDOW", 5)
    ours = trained(data_folder, *more, "--cuda_graphs", "1")
    had = largest - 2
    assert replaying.windows[0] == (5, 0)
    assert sum(had_room for _, had_room in replaying.windows) == 5
    # On CUDA a walker may step on another pixel by a last bit.
    assert (ON_CUDA and strategy == "soft") or replaying.windows[1:] == [(5, had), (5 - had, 5 - had)]
    assert_same_training(ours, expected)


def test_a_sampler_whose_batches_vary_is_asked_step_by_step(data_folder, replaying, monkeypatch, capsys):  # noqa: F811
    sample = StandardSampler.sample

    def varying(self, step):
        pixels = sample(self, step)
        return PixelBatch(pixels.image_id[: 6 - step % 5 // 4], pixels.xy[: 6 - step % 5 // 4])

    monkeypatch.setattr(StandardSampler, "sample", varying)
    expected = trained(data_folder, "--n_iters", "6")
    ours = trained(data_folder, "--n_iters", "6", "--cuda_graphs", "1")
    assert replaying.windows == [(2, 2)]
    assert capsys.readouterr().out.count("steps of 6 rays, then 5; steps are made one by one") == 1
    assert_same_training(ours, expected)


@pytest.mark.skipif(ON_CUDA, reason="of a CPU")
def test_on_a_cpu_one_line_says_that_steps_are_not_replayed(data_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.undo()
    o = options(data_folder, tmp_path, "syn", "TensorVMSplit", "--n_iters", "3", "--N_vis", "0", "--cuda_graphs", "1")
    train.run(o)
    assert capsys.readouterr().out.count("--cuda_graphs: a CUDA device and Triton are needed") == 1


# --- capacities ---
def test_a_capacity_follows_what_steps_need(monkeypatch):
    steps = FixedSteps(lambda: None)
    for n in range(fixed_steps.SEEN):
        assert not steps.ready
        steps.see(1000 + n, 10)
    assert steps.ready
    least, margin = fixed_steps.LEAST, fixed_steps.MARGIN
    assert steps.capacity == Capacity(int(margin * (1000 + n)) + least, int(margin * 10) + least)

    class Step:
        capacity = Capacity(20_000, 20_000)

    steps.step = Step()
    assert steps.judge([(20_000, 20_000)] * 3) == 3
    assert steps.step is not None
    assert steps.judge([(19_000, 5), (20_001, 5), (1, 1)]) == 1
    assert steps.step is None
    assert steps.ready
    assert steps.capacity.live > 20_001
    steps.step = Step()
    for _ in range(fixed_steps.IDLE_STEPS // 16 - 1):
        assert steps.judge([(9_000, 9_000)] * 16) == 16
        assert steps.step is not None
        assert steps.judge([(100, 100)] * 16) == 16
        assert steps.step is not None
    while steps.step is not None:
        steps.judge([(100, 100)] * 16)
    steps.forget()
    assert not steps.ready


def test_the_option_is_no_part_of_a_runs_identity():
    assert parse_options(["--demo"]).cuda_graphs == "auto"
    assert "cuda_graphs" in train.RUN_IDENTITY_EXEMPT
