"""Where a sampler spends its rays, seen on one picture."""

import numpy as np
import torch
from torch import Tensor

from components.types import PixelBatch, Scene
from utils.images import to_uint8


class DrawCounts:
    """How often each pixel of the scene's middle view was drawn.

    tensor: [H * W + 1] float32 on the scene's device; its last entry takes the pixels of all other views.
    """

    def __init__(self, scene: Scene):
        self._scene, self._view = scene, scene.n_images // 2
        self.tensor: Tensor = torch.zeros(scene.height * scene.width + 1, device=scene.device)

    def add(self, pixels: PixelBatch) -> None:
        """Count a step's pixels."""
        elsewhere = self.tensor.shape[0] - 1
        column, row = pixels.xy.detach().long().unbind(-1)
        index = torch.where(pixels.image_id == self._view, row * self._scene.width + column, elsewhere)
        self.tensor.index_add_(0, index.clamp_(0, elsewhere), torch.ones_like(index, dtype=self.tensor.dtype))

    def counts(self) -> np.ndarray:
        """The counts, [H, W] float32."""
        return self.tensor[:-1].view(self._scene.height, self._scene.width).cpu().numpy()

    def photo(self) -> np.ndarray:
        """The view itself, [H, W, 3] uint8."""
        return to_uint8(self._scene.image_rgb(self._view).cpu().numpy())
