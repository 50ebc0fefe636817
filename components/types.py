"""Types that cross module borders.

Letters: B rays of a batch, M images, H rows, W columns, K live samples.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelBatch:
    """Pixels that a sampler chose.

    image_id: [B] int64; xy: [B, 2] float32, pixels, (column + 0.5, row + 0.5) at a pixel's centre.
    `xy` requires a gradient only if the sampler wants d loss / d xy in `update`. It is the true one, unless
    detach_samples says that the gradient passes by the positions of the rays' samples (see Rays).
    """

    image_id: Tensor
    xy: Tensor
    detach_samples: bool = False

    def __len__(self) -> int:
        return self.image_id.shape[0]


@dataclass(frozen=True)
class Rays:
    """origins [B, 3] and directions [B, 3], world units (NDC for forward-facing scenes).

    Directions have unit length, except in NDC, where their length is the ray's extent (t runs from 0 to 1).
    detach_samples: no gradient flows from the field back to where a ray's samples lie, only to what else depends on
    its direction: the view direction, in NDC also the samples' distances (the reference's soft mining).
    """

    origins: Tensor
    directions: Tensor
    detach_samples: bool = False

    def __len__(self) -> int:
        return self.origins.shape[0]

    def __getitem__(self, index) -> "Rays":
        return Rays(self.origins[index], self.directions[index], self.detach_samples)


@dataclass(frozen=True)
class RenderOutput:
    """rgb [B, 3] in [0, 1]; opacity [B]; depth [B] in ray parameter t (no gradient);
    n_live, n_colour: how many samples were looked up in the density and in the colour field; of a rendering with a
    Capacity 0-dim tensors: how many there was need of, n_colour among the live samples that had room."""

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    n_live: int | Tensor = 0
    n_colour: int | Tensor = 0


@dataclass(frozen=True)
class Capacity:
    """How many samples a rendering has room for, whatever the rays: live ones, and those that have a colour."""

    live: int
    coloured: int


@dataclass(frozen=True)
class Scene:
    """Posed images and the volume they look at. Immutable; pixels stay 8 bit, rays are made on demand.

    name: scene name; dataset: format name (`syn`, `nsvf`, `tt`, `llff`, `own_data`); split: `train` or `test`.
    images: [M, H, W, 3] or [M, H, W, 4] uint8 (RGB, or straight-alpha RGBA).
    c2w: [M, 3, 4] float32. intrinsics: [M, 4] float32, (fx, fy, cx, cy) in pixels.
    aabb: [2, 3] float32, the box that holds the scene. near, far: ray parameter t of the first and last sample.
    white_background: what transparent pixels and empty rays show, white or black.
    random_background: while training, each step uses a white background with probability 0.5 (LLFF).
    ndc: rays are warped to normalised device coordinates with near plane 1 (LLFF).
    image_paths: the files of the images, for messages. render_path: [P, 3, 4] float32 poses of a video.
    """

    name: str
    dataset: str
    split: str
    images: Tensor
    c2w: Tensor
    intrinsics: Tensor
    aabb: Tensor
    near: float
    far: float
    white_background: bool
    random_background: bool
    ndc: bool
    image_paths: tuple[str, ...]
    render_path: Tensor

    @property
    def n_images(self) -> int:
        return self.images.shape[0]

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    @property
    def n_pixels(self) -> int:
        """Pixels of all images together, M*H*W."""
        return self.n_images * self.height * self.width

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "Scene":
        """The same scene with all its tensors on `device`."""
        moved = {k: getattr(self, k).to(device) for k in ("images", "c2w", "intrinsics", "aabb", "render_path")}
        return replace(self, **moved)

    def cameras_to(self, device: torch.device | str) -> "Scene":
        """The same scene with everything but the images on `device`: enough to render its views."""
        moved = {k: getattr(self, k).to(device) for k in ("c2w", "intrinsics", "aabb", "render_path")}
        return replace(self, **moved)

    def colors(self, pixels: PixelBatch) -> Tensor:
        """Ground-truth rgb [B, 3] float32 of the pixels under `pixels.xy`; RGBA is blended on white as
        rgb*a + (1 - a), on black as rgb*a (the TensoRF loaders' rule)."""
        xy = pixels.xy.detach()
        column = xy[:, 0].long().clamp_(0, self.width - 1)
        row = xy[:, 1].long().clamp_(0, self.height - 1)
        if not self.images.is_contiguous():  # by one flat index they would all be copied
            return self.blend(self.images[pixels.image_id, row, column])
        flat = (pixels.image_id * self.height + row) * self.width + column
        return self.blend(self.images.view(self.n_pixels, -1).index_select(0, flat))

    def image_rgb(self, index: int) -> Tensor:
        """Ground-truth rgb [H, W, 3] float32 of a whole image, blended as in `colors`."""
        return self.blend(self.images[index])

    def blend(self, values: Tensor) -> Tensor:
        """rgb [..., 3] float32 in [0, 1] of pixels [..., 3 or 4] uint8, blended as in `colors`."""
        values = values.float() / 255.0
        if values.shape[-1] == 3:
            return values
        rgb, alpha = values[..., :3], values[..., 3:]
        return rgb * alpha + (1.0 - alpha) if self.white_background else rgb * alpha


class Sampler(Protocol):
    """Chooses the pixels of a training step and weighs their errors.

    Built from (scene, kept pixels, options, generator), and built anew when the kept pixels change. B, the
    number of pixels of one step, may differ from batch_size and from step to step.
    """

    def sample(self, step: int) -> PixelBatch:
        """The pixels of this step."""

    def weigh(self, pixels: PixelBatch, error: Tensor, step: int) -> Tensor:
        """Weight [B] of each ray, given its residual `error` [B, 3] (detached); 1 is ordinary supervision."""

    def update(self, pixels: PixelBatch, ray_loss: Tensor, step: int) -> None:
        """Learn from the step: ray_loss [B] is detached, `pixels.xy.grad` is set if xy required a gradient."""

    def state_dict(self) -> dict:
        """All that a resumed run needs, the generator included; tensors and plain values only, which stay as they are
        while the sampler goes on: with --cuda_graphs steps may be made again from here."""

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
