"""Soft mining: walkers that climb the error by Langevin steps; importance correction of the loss."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from components import langevin
from components.edges import edge_density, largest_magnitude, sobel_magnitude
from components.pixel_sets import PixelSet
from components.types import PixelBatch, Scene
from utils.console import say
from utils.parallel import in_threads

# Pixels of a row whose edge density is summed into one number.
_BLOCK = 32


class SoftMiningSampler:
    """ceil(B / images) walkers an image, at positions (y, x) in [0, 1].

    Dead walkers are reborn on the edges of their image. Of the edges' density only the sums of blocks of 32 pixels
    are kept; a block is computed again from the image when a walker is reborn in it. `update` therefore waits once
    for the number of dead walkers (a tenth of all): blocks for all would take ten times the memory and time. (kornia's
    Sobel kernel, nine numbers, is copied to the device each time as well.)
    """

    def __init__(self, scene: Scene, kept: PixelSet, options, generator: torch.Generator) -> None:
        self._scene, self._options, self._generator = scene, options, generator
        shape = (scene.n_images, scene.height, scene.width)
        self._kept = None if kept.kept is None else kept.kept.view(shape)
        images = (kept.image_starts(scene.n_images).diff() > 0).nonzero()[:, 0].to(scene.device)
        self._image = images.repeat_interleave(-(-options.batch_size // len(images)))
        if options.batch_size < len(images):
            say(f"warning: soft has a walker an image at least: {len(images)} rays a step, not {options.batch_size}")
        self._blocks_in_row = -(-scene.width // _BLOCK)
        self._sums, self._largest = self._sum_blocks()
        blank = int(self._largest.isinf().sum())
        if blank:
            say(f"warning: {blank} of {scene.n_images} images have no edges (soft): walkers are reborn anywhere there")
        self._position = self._uniform(len(self._image))
        if self._kept is not None:
            self._give_birth(self._dropped())

    def _sum_blocks(self) -> tuple[Tensor, Tensor]:
        """(edge density on kept pixels, summed over each block and cumulated over all blocks of all images, float64,
        0 first; largest magnitude [M], infinite where there are no edges)."""

        def sums_of(image: int) -> tuple[Tensor, Tensor]:
            magnitude = sobel_magnitude(self._scene.image_rgb(image)[None])[0]
            largest = largest_magnitude(magnitude)
            density = edge_density(magnitude, largest)
            if self._kept is not None:
                density = density * self._kept[image]
            blocks = pad(density, (0, -density.shape[1] % _BLOCK)).view(-1, _BLOCK)
            return blocks.sum(1, dtype=torch.float64), largest

        sums, largest = zip(*in_threads(sums_of, self._scene.n_images, "edges of images", "image"), strict=True)
        return langevin.cumulate(torch.cat(sums)), torch.stack(largest)

    def _uniform(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, 2]."""
        return torch.rand(n, 2, generator=self._generator, device=self._scene.device, dtype=dtype)

    def _pixels(self) -> Tensor:
        return langevin.pixel_under(self._position, self._scene.height, self._scene.width)

    def _dropped(self) -> Tensor:
        """[N] bool: walkers on pixels that ray filtering dropped."""
        row, column = self._pixels().unbind(-1)
        return ~self._kept[self._image, row, column]

    def _give_birth(self, dead: Tensor) -> None:
        """Put the dead walkers [N] bool on pixels drawn from the edge density of their image."""
        walker = dead.nonzero()[:, 0]
        # Numbers for all walkers, so that the stream does not depend on who dies.
        u = self._uniform(len(dead), torch.float64)[walker]
        image = self._image[walker]
        height, width, device = self._scene.height, self._scene.width, u.device
        per_image = height * self._blocks_in_row
        block = langevin.draw_between(self._sums, image * per_image, (image + 1) * per_image, u[:, 0])
        row, first = block // self._blocks_in_row % height, block % self._blocks_in_row * _BLOCK
        rows = (row[:, None] + torch.arange(-1, 2, device=device)).clamp(0, height - 1)
        columns = first[:, None] + torch.arange(-1, _BLOCK + 1, device=device)
        patch = self._scene.images[image[:, None, None], rows[:, :, None], columns.clamp(0, width - 1)[:, None]]
        magnitude = sobel_magnitude(self._scene.blend(patch))[:, 1, 1:-1]
        density = edge_density(magnitude, self._largest[image][:, None])
        columns = columns[:, 1:-1]
        density = torch.where(columns < width, density, 0.0)
        if self._kept is not None:
            density = density * self._kept[image[:, None], row[:, None], columns.clamp_max(width - 1)]
        column = first + langevin.draw_index(langevin.cumulate(density), u[:, 1:])
        self._position[walker] = langevin.position_of(row, column, height, width)

    def sample(self, step: int) -> PixelBatch:
        """The pixels under the walkers; xy requires a gradient."""
        xy = self._pixels().flip(-1).float() + 0.5
        return PixelBatch(self._image, xy.requires_grad_(), self._options.soft_mining_grad == "viewdir")

    def weigh(self, pixels: PixelBatch, error: Tensor, step: int) -> Tensor:
        """The importance correction."""
        o = self._options
        if o.wo_correction_loss:
            return error.new_ones(error.shape[0])
        return langevin.correction(error, step, o.soft_mining_alpha, o.soft_mining_warmup)

    def update(self, pixels: PixelBatch, ray_loss: Tensor, step: int) -> None:
        """One Langevin step, deaths and births."""
        o, n = self._options, len(self._image)
        # None where the colour does not depend on the view direction (viewdir with RGB shading): noise alone moves.
        gradient = torch.zeros_like(self._position) if pixels.xy.grad is None else pixels.xy.grad.flip(-1)
        drift = langevin.drift(gradient, ray_loss)
        noise = torch.randn(n, 2, generator=self._generator, device=drift.device)
        position = langevin.langevin_move(self._position, drift, noise, o.soft_mining_a, o.soft_mining_b)
        dead = langevin.dead_walkers(position, ray_loss)
        offset = torch.randint(n, (), generator=self._generator, device=drift.device)
        slots = langevin.fresh_slots(n, offset)
        position[slots] = self._uniform(len(slots))
        # A diverged loss makes NaN of its walker, which is dead, but must name a pixel until it is reborn.
        self._position = position.nan_to_num(0.5).clamp(0.0, 1.0)
        if self._kept is not None:
            dead |= self._dropped()
        self._give_birth(dead)

    def state_dict(self) -> dict:
        return {"position": self._position.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if state["position"].shape != self._position.shape:
            raise ValueError(f"{len(state['position'])} walkers instead of {len(self._position)}")
        self._position = state["position"].to(self._position.device).clone()
        self._generator.set_state(state["generator"])
