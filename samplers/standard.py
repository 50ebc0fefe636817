"""The standard sampler: epochs over all kept pixels without replacement, plain mean squared error."""

import torch
from torch import Tensor

from components.permutation import permute
from components.pixel_sets import PixelSet, pixel_batch
from components.types import PixelBatch, Scene

# Batches permuted together: a permutation is hundreds of small operations, and on CUDA each is a launch.
_AHEAD, _OTHER_AHEAD = {"cpu": 8}, 64


class StandardSampler:
    """Walks through a keyed permutation of the pixels; a new epoch has a new key.

    Nothing is stored but key, position and the ranks of some batches ahead, whatever the number of pixels. A batch
    that crosses the end of an epoch takes the rest from the next one.
    """

    def __init__(self, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> None:
        self._height, self._width = scene.height, scene.width
        self._kept, self._batch_size = kept, options.batch_size
        self._generator = generator
        self._key = int(torch.randint(0, 1 << 62, (1,), generator=generator, device=generator.device))
        self._position = 0
        ahead = _AHEAD.get(scene.device.type, _OTHER_AHEAD)
        self._offsets = torch.arange(ahead * self._batch_size, device=scene.device)
        self._ranks, self._used = self._offsets[:0], 0

    def sample(self, step: int) -> PixelBatch:
        """The next batch_size pixels."""
        if self._used == len(self._ranks):
            self._ranks, self._used = self._ranks_ahead(), 0
        rank = self._ranks[self._used : self._used + self._batch_size]
        self._used += self._batch_size
        self._position += self._batch_size
        return pixel_batch(self._kept.select(rank), self._height, self._width)

    def _ranks_ahead(self) -> Tensor:
        """Ranks [batches ahead * batch_size] of the pixels from the position on."""
        position = self._offsets + self._position
        epoch, rank = position // self._kept.count, position % self._kept.count
        # Keys of consecutive epochs only need to differ: the network hashes them.
        key = (self._key + epoch * 0x9E3779B97F4A7C1) & ((1 << 62) - 1)
        return permute(rank, key, self._kept.count)

    def weigh(self, pixels: PixelBatch, error: Tensor, step: int) -> Tensor:
        """All ones."""
        return error.new_ones(error.shape[0])

    def update(self, pixels: PixelBatch, ray_loss: Tensor, step: int) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict:
        return {"key": self._key, "position": self._position, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self._key, self._position = state["key"], state["position"]
        self._ranks, self._used = self._offsets[:0], 0
        self._generator.set_state(state["generator"])
