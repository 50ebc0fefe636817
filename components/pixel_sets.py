"""Sets of pixels: all of a scene, or those that ray filtering kept, numbered 0..count-1.

Letters: B pixels, P = M*H*W pixels of a scene in image-major, row-major order (the flat index).
"""

import numpy as np
import torch
from torch import Tensor

from components.types import PixelBatch

_BLOCK = 64


def pixel_batch(index: Tensor, height: int, width: int) -> PixelBatch:
    """Pixels at flat indices [B] int64, at their centres."""
    per_image = height * width
    image, within = index // per_image, index % per_image
    xy = torch.stack([within % width, within // width], dim=-1).float() + 0.5
    return PixelBatch(image, xy)


class PixelSet:
    """Some or all of P pixels: `count` of them, the r-th by `select(r)`.

    A filtered set holds one byte a pixel and one number a block of 64, not a list of 8-byte indices: selecting is
    a binary search among the blocks and a running count inside one.
    """

    def __init__(self, n_pixels: int, kept: Tensor | None = None) -> None:
        """kept: [P] bool, or None for all. Raises ValueError if nothing is kept."""
        self.n_pixels, self.kept = n_pixels, kept
        self.count = n_pixels
        if kept is not None:
            missing = -n_pixels % _BLOCK
            # Padding copies even where nothing is missing.
            whole = torch.nn.functional.pad(kept, (0, missing)) if missing else kept
            self._blocks = whole.view(-1, _BLOCK)
            self._ends = self._blocks.sum(1).cumsum(0)
            self.count = int(self._ends[-1])
        if self.count == 0:
            raise ValueError("no pixel is kept")

    def select(self, rank: Tensor) -> Tensor:
        """Flat indices [B] of the pixels with these ranks [B] int64, 0 <= rank < count."""
        if self.kept is None:
            return rank
        block = torch.searchsorted(self._ends, rank, right=True)
        members = self._blocks[block]
        before = self._ends[block] - members.sum(1)
        running = members.cumsum(1)
        inside = (running == (rank - before + 1)[:, None]) & members
        return block * _BLOCK + inside.byte().argmax(1)

    def image_starts(self, n_images: int) -> Tensor:
        """[n_images + 1] int64: the rank of each image's first kept pixel, and `count` at the end."""
        per_image = self.n_pixels // n_images
        if self.kept is None:
            return torch.arange(n_images + 1) * per_image
        counts = self.kept.view(n_images, per_image).sum(1).cpu()
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def ranks_in_image(self, image: int, index: np.ndarray, starts: Tensor) -> np.ndarray:
        """Ranks [N'] of those of an image's pixels that are kept; index [N]: flat within the image, ascending.

        starts: as from `image_starts`.
        """
        if self.kept is None:
            return index + int(starts[image])
        per_image = self.n_pixels // (len(starts) - 1)
        kept = self.kept[image * per_image : (image + 1) * per_image].cpu().numpy()
        return (kept.cumsum() - 1)[index[kept[index]]] + int(starts[image])
