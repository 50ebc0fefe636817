"""EGRA: edge-guided ray allocation, drawn exactly in O(B), plain mean squared error."""

import numpy as np
import torch
from torch import Tensor

from components.edges import egra_edges, grey_8bit
from components.egra import edge_share, shift_edges
from components.pixel_sets import PixelSet, pixel_batch
from components.types import PixelBatch, Scene
from utils.console import say
from utils.parallel import in_threads


class EgraSampler:
    """A uniform image, then its shifted edge pixels or any pixel; with replacement.

    Held in memory: the edge pixels, 4 bytes each, once as found (only with egra_refresh) and once as shifted. The
    shifts follow from a key and the number of the refresh, so a checkpoint holds the key alone. Drawing waits for
    nothing; new shifts, every egra_refresh steps, are made on the host.
    """

    def __init__(self, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> None:
        self._scene, self._kept, self._generator = scene, kept, generator
        self._batch_size, self._every = options.batch_size, options.egra_refresh
        self._key = int(torch.randint(0, 1 << 62, (1,), generator=generator, device=generator.device))
        self._starts = kept.image_starts(scene.n_images)
        with_pixels = (self._starts.diff() > 0).nonzero()[:, 0]
        self._first = self._starts[with_pixels].to(scene.device)
        self._count = self._starts.diff()[with_pixels].to(scene.device)
        self._with_pixels = with_pixels.tolist()
        self._found = in_threads(self._find, len(self._with_pixels), "edges of images", "image")
        self._shifted: int | None = None
        self._refresh(0)
        blank = sum(len(found) == 0 for found in self._found)
        if blank:
            say(f"warning: {blank} of {len(self._found)} images have no edges (egra): their rays are spread evenly")
        if not self._every:
            self._found = []  # found again if a checkpoint brings another key

    def _find(self, number: int) -> np.ndarray:
        image = self._scene.images[self._with_pixels[number]].cpu().numpy()
        return np.flatnonzero(egra_edges(grey_8bit(image))).astype(np.int32)

    def _refresh(self, number: int) -> None:
        """Shift the edges for the number-th time and list them by rank."""
        n_pixels = self._scene.height * self._scene.width
        found = self._found or in_threads(self._find, len(self._with_pixels), "edges of images", "image")
        ranks = []
        for position, image in enumerate(self._with_pixels):
            random = np.random.default_rng((self._key, number, image))
            shifted = shift_edges(found[position], n_pixels, random)
            ranks.append(self._kept.ranks_in_image(image, shifted, self._starts) - int(self._starts[image]))
        # int32 within an image, whatever the number of images.
        self._edges = torch.from_numpy(np.concatenate([*ranks, [0]]).astype(np.int32)).to(self._scene.device)
        counts = torch.tensor([len(r) for r in ranks], device=self._scene.device)
        self._edge_first, self._edge_count = counts.cumsum(0) - counts, counts
        self._share = edge_share(counts.double(), self._count.double())
        self._shifted = number

    def sample(self, step: int) -> PixelBatch:
        """batch_size pixels."""
        number = step // self._every if self._every else 0
        if number != self._shifted:
            self._refresh(number)
        device = self._scene.device
        u = torch.rand(3, self._batch_size, generator=self._generator, device=device, dtype=torch.float64)
        image = (u[0] * len(self._with_pixels)).long()
        edge = self._edges[self._edge_first[image] + (u[1] * self._edge_count[image]).long()].long()
        anywhere = (u[1] * self._count[image]).long()
        rank = self._first[image] + torch.where(u[2] < self._share[image], edge, anywhere)
        return pixel_batch(self._kept.select(rank), self._scene.height, self._scene.width)

    def weigh(self, pixels: PixelBatch, error: Tensor, step: int) -> Tensor:
        """All ones."""
        return error.new_ones(error.shape[0])

    def update(self, pixels: PixelBatch, ray_loss: Tensor, step: int) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict:
        return {"key": self._key, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if state["key"] != self._key:
            self._key, self._shifted = state["key"], None
        self._generator.set_state(state["generator"])
