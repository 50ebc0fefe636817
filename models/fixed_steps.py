"""Training steps whose shapes are known beforehand, so that CUDA can replay them as graphs and nothing but a sampler
waits for the device.

Letters: B rays, S sample numbers a ray.

A step's shapes are the numbers of its live and of its coloured samples, and only the device knows them. `FixedStep` has
room for more of both than the steps before it needed (a Capacity). A step that needs more still changes nothing: from
it on the optimiser's updates are skipped on the device, until the host has looked and makes these steps again.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from components.cameras import cast_rays
from components.regularisers import Regulariser
from components.types import Capacity, PixelBatch, Scene
from models.field import Field

# Steps between two looks at what they needed.
WINDOW = 16
# A capacity is MARGIN times the most that the last SEEN steps needed, plus LEAST: the first steps have no colours.
MARGIN, SEEN, LEAST = 1.5, 16, 4096
# It makes way for a smaller one when less than IDLE_SHARE of it would have done for IDLE_STEPS steps.
IDLE_SHARE, IDLE_STEPS = 0.7, 32

Part = Callable[[], None]
Record = Callable[[Part], Part]


def obstacle(field: Field) -> str | None:
    """Why a field's steps cannot have fixed shapes; None if they can."""
    if not field.kernels.fixed_shapes:
        return "a CUDA device and Triton are needed"
    return "--debug looks at every operation" if torch.is_anomaly_enabled() else None


def graph_recorder() -> Record:
    """Records parts of a step as CUDA graphs, without running them; what it returns replays a part.

    Parts share their memory: they are to be replayed in the order in which they were recorded, and what is read after a
    part must be held by a name while the later ones are recorded, or these write over it.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(part: Part) -> Part:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            part()
        return graph.replay

    return record


class FixedStep:
    """One step of a field in three parts, `show`, `learn` and `update`, that read and write the same memory each time.

    Between them a sampler is asked, as in the trainer's ordinary step. Everything that changes from step to step is
    copied into tensors of its own: pixels, jitter, background, the rays' weights, learning rates, the regularisers'
    weights. All else - the factors, the mask, S, which regularisers have a weight - must stay as it was, or a new
    FixedStep be made.
    """

    def __init__(
        self,
        field: Field,
        scene: Scene,
        optimizer: torch.optim.Adam,
        regularisers: Sequence[Regulariser],
        capacity: Capacity,
        pixels: PixelBatch,
        n_samples: int,
        record: Record,
    ) -> None:
        """optimizer: fused, and with moments from steps before. pixels: any batch such as the steps will have. record:
        a new `graph_recorder()`."""
        self.field, self.scene, self.optimizer = field, scene, optimizer
        self.regularisers = [regulariser for regulariser in regularisers if regulariser.weight > 0]
        self.capacity, self.n_samples = capacity, n_samples
        device, n_rays = pixels.xy.device, len(pixels)
        xy = pixels.xy.detach().clone().requires_grad_(pixels.xy.requires_grad)
        self.pixels = PixelBatch(pixels.image_id.clone(), xy, pixels.detach_samples)
        self.jitter = torch.zeros(field.jitter_shape(n_rays, n_samples), device=device)
        self.background = torch.zeros((), device=device)
        self.weight = torch.zeros(n_rays, device=device)
        self.penalty_weights = [torch.zeros((), device=device) for _ in self.regularisers]
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.most = torch.tensor([capacity.live, capacity.coloured], device=device)
        # 1 while updates are skipped. So nothing changes in the trial, which has kernels compiled and handles made
        # before the recording.
        self.stopped = torch.ones((), device=device)
        parts = [self._show, self._learn, self._update]
        with _on_a_side_stream(device):
            for part in parts:
                part()
        del self.error, self.needs, self.terms, self.gradients, self.ray_loss, self.losses
        # MB that a replay needs and torch's allocator does not see: what was taken while recording and given back.
        self.replayed_mb = 0.0
        with _recording(device):
            self.show, self.learn, self.update = (record(part) for part in parts)
        if device.type == "cuda":
            taken, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
            self.replayed_mb = (taken - kept) / 2**20

    def fits(self, pixels: PixelBatch) -> bool:
        """Whether a step can be made of these pixels."""
        ours = self.pixels
        same = pixels.detach_samples == ours.detach_samples and pixels.xy.requires_grad == ours.xy.requires_grad
        return same and len(pixels) == len(ours)

    def give(self, pixels: PixelBatch, background: float, generator: torch.Generator) -> None:
        """The step's pixels and background; its jitter is drawn, as Field.draw_jitter draws it."""
        with torch.no_grad():
            self.pixels.image_id.copy_(pixels.image_id)
            self.pixels.xy.copy_(pixels.xy)
            torch.rand(self.jitter.shape, generator=generator, out=self.jitter)
            self.background.fill_(background)

    def set_rates(self, rates: list[float]) -> None:
        """The step's learning rate of each of the optimiser's groups."""
        for tensor, rate in zip(self.rates, rates, strict=True):
            tensor.fill_(rate)

    def set_penalty_weights(self) -> None:
        """Those of the step are the regularisers' own, as they are now."""
        for tensor, regulariser in zip(self.penalty_weights, self.regularisers, strict=True):
            tensor.fill_(regulariser.weight)

    def _show(self) -> None:
        rays = cast_rays(self.scene, self.pixels)
        out = self.field.render(rays, self.background, self.jitter, self.n_samples, self.capacity)
        self.error = out.rgb - self.scene.colors(self.pixels)
        self.needs = torch.stack((out.n_live, out.n_colour))
        torch.maximum(self.stopped, (self.needs > self.most).any().float(), out=self.stopped)

    def _learn(self) -> None:
        ray_loss = self.weight * self.error.square().mean(-1)
        weighed = zip(self.regularisers, self.penalty_weights, strict=True)
        self.terms = {r.name: weight * r.penalty(self.field) for r, weight in weighed}
        loss = ray_loss.mean() + sum(self.terms.values())
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        wanted = [*learning, *([self.pixels.xy] if self.pixels.xy.requires_grad else [])]
        # Not backward(): it would add to gradients that are there, in memory that is not the graph's.
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        self.gradients = [_laid_out_as(x, gradient) for x, gradient in zip(wanted, gradients, strict=True)]
        self.pixels.xy.grad = self.gradients[-1] if self.pixels.xy.requires_grad else None
        self.terms = {name: term.detach() for name, term in self.terms.items()}
        self.error, self.ray_loss = self.error.detach(), ray_loss.detach()
        self.losses = torch.stack((self.error.square().mean(), loss.detach()))

    def _update(self) -> None:
        groups, optimizer = self.optimizer.param_groups, self.optimizer
        learning = [parameter for group in groups for parameter in group["params"]]
        floats = [group["lr"] for group in groups]
        optimizer.found_inf = self.stopped
        try:
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"], group["capturable"] = rate, capturing
            for parameter, gradient in zip(learning, self.gradients, strict=False):
                parameter.grad = gradient
            optimizer.step()
        finally:
            del optimizer.found_inf
            for group, rate in zip(groups, floats, strict=True):
                group["lr"], group["capturable"] = rate, False
            optimizer.zero_grad(set_to_none=True)


class FixedSteps:
    """The FixedStep there is, if any, and what the last steps needed, from which the next one's capacity follows."""

    def __init__(self, recorder: Callable[[], Record] = graph_recorder) -> None:
        self.step: FixedStep | None = None
        self.n_made = 0
        self._recorder, self._idle = recorder, 0
        self._seen: list[tuple[int, int]] = []

    def forget(self) -> None:
        """The field or the sampler is another one now."""
        self.step, self._seen, self._idle = None, [], 0

    def see(self, n_live: int, n_colour: int) -> None:
        """What a step needed: live samples, coloured ones."""
        self._seen = [*self._seen, (n_live, n_colour)][-SEEN:]

    @property
    def ready(self) -> bool:
        """Whether enough steps were seen."""
        return len(self._seen) == SEEN

    @property
    def capacity(self) -> Capacity:
        """Room for what was seen and more."""
        return Capacity(*(int(MARGIN * max(needs)) + LEAST for needs in zip(*self._seen, strict=True)))

    def make(self, *given, **more) -> FixedStep:
        """A step with this capacity; given, more: everything else that FixedStep takes, by name."""
        self.n_made += 1
        self.step = FixedStep(*given, **more, capacity=self.capacity, record=self._recorder())
        return self.step

    def judge(self, needs: Sequence[Sequence[int]]) -> int:
        """How many of a window's steps had room; if not all, or if much less would do, the FixedStep is given up."""
        room = self.step.capacity
        for number, (n_live, n_colour) in enumerate(needs):
            self.see(n_live, n_colour)
            if n_live > room.live or n_colour > room.coloured:
                self.step, self._idle = None, 0
                return number
        would_do = self.capacity
        smaller = would_do.live < IDLE_SHARE * room.live or would_do.coloured < IDLE_SHARE * room.coloured
        self._idle = self._idle + len(needs) if smaller else 0
        if self._idle >= IDLE_STEPS:
            self.step, self._idle = None, 0
        return len(needs)


def _laid_out_as(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient as its parameter lies in memory, as backward() leaves it: a fused optimiser goes through
    both in the order of memory, whatever their strides."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


@functools.cache
def _trial_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _clear_workspaces() -> None:
    """Give back cuBLAS's memory, which torch keeps for every stream for good; as torch's own graphs do."""
    torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _on_a_side_stream(device: torch.device) -> Iterator[None]:
    """As CUDA wants it before a recording; elsewhere nothing special."""
    if device.type != "cuda":
        yield
        return
    stream, current = _trial_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
    _clear_workspaces()


@contextmanager
def _recording(device: torch.device) -> Iterator[None]:
    """Without Python's garbage collector, which must not free CUDA's objects within; the allocator's peak begins
    here. cuBLAS's workspaces, taken anew while recording, stay in the graphs' pool. Elsewhere nothing special."""
    if device.type != "cuda":
        yield
        return
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        if collecting:
            gc.enable()
    _clear_workspaces()
