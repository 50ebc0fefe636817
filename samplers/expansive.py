"""Expansive supervision: anchors on the edges and sources elsewhere, weighed by the expanded loss."""

import numpy as np
import torch
from torch import Tensor

from components.edges import grey_8bit
from components.expansive import anchor_pixels, group_weights, source_factor
from components.pixel_sets import PixelSet, pixel_batch
from components.types import PixelBatch, Scene
from utils.console import say
from utils.parallel import in_threads


class ExpansiveSampler:
    """int(N*es_beta_a) anchors, then sources, N = int(es_ratio*batch_size), with replacement.

    Held in memory: one number an anchor (4 bytes below 2^31 pixels): how many sources lie before it. The a-th anchor
    has the rank before[a] + a; the s-th source has the rank s + the number of anchors with before <= s.
    """

    def __init__(self, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> None:
        self._scene, self._kept, self._options, self._generator = scene, kept, options, generator
        self._key = int(torch.randint(0, 1 << 62, (1,), generator=generator, device=generator.device))
        self._find_anchors()
        self._n_anchors = int(self.n_rays * options.es_beta_a)
        without = [] if self._total_anchors else ["no edges: all rays are sources"]
        without += [] if self._kept.count > self._total_anchors else ["nothing but edges: all rays are anchors"]
        if without:
            self._n_anchors = self.n_rays if self._total_anchors else 0
            say(f"warning: the training images have {without[0]} (expansive)")
        elif options.es_beta_a > 0 and self._n_anchors == 0:
            say(f"warning: {self.n_rays} rays a step at --es_beta_a {options.es_beta_a:g} leave no anchor (expansive)")

    @property
    def n_rays(self) -> int:
        """N, rays a step."""
        return max(int(self._options.es_ratio * self._options.batch_size), 1)

    def _find_anchors(self) -> None:
        starts = self._kept.image_starts(self._scene.n_images)

        def find(image: int) -> tuple[np.ndarray, bool]:
            grey = grey_8bit(self._scene.images[image].cpu().numpy())
            random = np.random.default_rng((self._key, image))
            pixels = anchor_pixels(grey, self._options.es_search, random)
            return self._kept.ranks_in_image(image, pixels, starts), len(pixels) > 0

        anchors, has_edges = zip(*in_threads(find, self._scene.n_images, "anchors of images", "image"), strict=True)
        ranks = np.concatenate(anchors)
        before = ranks - np.arange(len(ranks))
        kind = np.int32 if self._kept.count < 2**31 else np.int64
        self._before = torch.from_numpy(before.astype(kind)).to(self._scene.device)
        self._total_anchors = len(ranks)
        # Of images that ray filtering left nothing of nobody expects anchors.
        seen = [edges for edges, count in zip(has_edges, starts.diff().tolist(), strict=True) if count > 0]
        blank = seen.count(False)
        if 0 < blank < len(seen):
            say(f"warning: {blank} of {len(seen)} images have no edges (expansive): no anchors are drawn there")

    def sample(self, step: int) -> PixelBatch:
        """Anchors, then sources."""
        device, n_anchors = self._scene.device, self._n_anchors
        u = torch.rand(self.n_rays, generator=self._generator, device=device, dtype=torch.float64)
        anchor = (u[:n_anchors] * self._total_anchors).long()
        source = (u[n_anchors:] * (self._kept.count - self._total_anchors)).to(self._before.dtype)
        anchors_before = torch.searchsorted(self._before, source, right=True)
        rank = torch.cat([self._before[anchor] + anchor, source + anchors_before])
        return pixel_batch(self._kept.select(rank), self._scene.height, self._scene.width)

    def weigh(self, pixels: PixelBatch, error: Tensor, step: int) -> Tensor:
        """The two-part loss as weights: mean(weight*error) = lamda_a*MSE_anchor + lamda_s*c(t)*MSE_source."""
        o, n_anchors = self._options, self._n_anchors
        if o.use_mse:
            return error.new_ones(error.shape[0])
        c = 1.0 if o.a_s_add else source_factor(step, o.n_iters)
        scale = 1.0 / (1.0 + c) if o.es_normalize else 1.0
        weights = group_weights(n_anchors, self.n_rays - n_anchors, o.lamda_a, o.lamda_s, c)
        is_source = torch.arange(error.shape[0], device=error.device) >= n_anchors
        return torch.where(is_source, scale * weights[1], scale * weights[0]).to(error.dtype)

    def update(self, pixels: PixelBatch, ray_loss: Tensor, step: int) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict:
        return {"key": self._key, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if state["key"] != self._key:
            self._key = state["key"]
            self._find_anchors()
        self._generator.set_state(state["generator"])
