"""Two fields, rays and a scene for timing a step: seeded and analytic, so that everybody times the same work.

`before_mask`: a fresh 128^3 field of the syn settings. `after_mask`: blobs and their alpha mask with 11 to 13 colours
and 45 to 50 density lookups a ray, as a lego field trained at 200x200 has.
"""

from dataclasses import replace

import torch

from components.cameras import rays_of
from components.regularisers import l1_norm
from components.types import PixelBatch, Rays, Scene
from models import FieldConfig, build_field
from models.field import Field
from models.growth import shrink, update_alpha_mask
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

GRID = (128, 128, 128)
CONFIG = FieldConfig("TensorVMSplit", (16, 16, 16), (48, 48, 48), near=2.0, far=6.0)
# Blobs of the trained field: their number a mode, and what makes them as dense and as large as lego.
BLOBS, PEAK, WIDTH = 6, 18.0, 0.0875
PICTURES = 16
# Side of the pictures that rays are drawn from.
PIXELS = 200


def cameras(n: int, generator: torch.Generator) -> torch.Tensor:
    """Poses [n, 3, 4] on a hemisphere of radius 4 that look at the origin (as lego's)."""
    azimuth = torch.rand(n, generator=generator) * 2 * torch.pi
    height = torch.rand(n, generator=generator)
    level = (1 - height**2).sqrt()
    position = 4.0 * torch.stack([level * azimuth.cos(), level * azimuth.sin(), height], -1)
    forward = torch.nn.functional.normalize(-position, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([[0.0, 0.0, 1.0]])), dim=-1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward, position], -1)


def intrinsics(size: int) -> torch.Tensor:
    """Lego's focal length for pictures of size x size pixels, [4]."""
    return torch.tensor([1.389 * size, 1.389 * size, size / 2, size / 2])


def camera_pixels(n_rays: int, seed: int) -> tuple[torch.Tensor, PixelBatch]:
    """(poses of 100 cameras, random pixels of their pictures of PIXELS x PIXELS)."""
    generator = torch.Generator().manual_seed(seed)
    c2w = cameras(100, generator)
    chosen = torch.randint(100, (n_rays,), generator=generator)
    return c2w, PixelBatch(chosen, torch.rand(n_rays, 2, generator=generator) * PIXELS)


def camera_rays(n_rays: int, seed: int, device: torch.device | str = "cpu") -> Rays:
    """Rays through random pixels of 100 cameras."""
    c2w, pixels = camera_pixels(n_rays, seed)
    rays = rays_of(pixels.xy, c2w[pixels.image_id], intrinsics(PIXELS).expand(n_rays, 4), PIXELS, PIXELS, ndc=False)
    return Rays(rays.origins.to(device), rays.directions.to(device))


def camera_scene(n_rays: int, seed: int, device: torch.device | str = "cpu") -> tuple[Scene, PixelBatch]:
    """(a scene, its pixels) whose rays are camera_rays'."""
    c2w, pixels = camera_pixels(n_rays, seed)
    scene = replace(shapes_scene(len(c2w), PIXELS), c2w=c2w)
    return scene.to(device), PixelBatch(pixels.image_id.to(device), pixels.xy.to(device))


def shapes_scene(n_images: int, size: int) -> Scene:
    """Smooth shapes on size x size pixels of 4 bytes, as NeRF-synthetic's; 16 different pictures, repeated."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(min(n_images, PICTURES), 4, 12, 12, generator=generator)
    shapes = torch.nn.functional.interpolate(noise, (size, size), mode="bilinear").permute(0, 2, 3, 1)
    shapes[..., 3] = (shapes[..., 3] > 0.5).float()
    c2w = cameras(n_images, generator)
    return Scene(
        name="shapes",
        dataset="syn",
        split="train",
        images=(255 * shapes).byte()[torch.arange(n_images) % PICTURES],
        c2w=c2w,
        intrinsics=intrinsics(size).expand(n_images, 4),
        aabb=torch.tensor([[-1.5] * 3, [1.5] * 3]),
        near=CONFIG.near,
        far=CONFIG.far,
        white_background=True,
        random_background=False,
        ndc=False,
        image_paths=(),
        render_path=c2w[:0],
    )


def before_mask(device: torch.device | str = "cpu", seed: int = 0) -> Field:
    """A fresh field in the box +-1.5."""
    return build_field(CONFIG, torch.tensor([[-1.5] * 3, [1.5] * 3], device=device), GRID, seed)


def after_mask(device: torch.device | str = "cpu", seed: int = 0) -> Field:
    """A field of soft blobs, its alpha mask, shrunk to it and with 128^3 points again."""
    field = build_field(CONFIG, torch.tensor([[-1.5] * 3, [1.5] * 3]), GRID, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for mode, ((u, v), w) in enumerate(zip(PLANE_AXES, LINE_AXES, strict=True)):
            field.density_plane[mode].zero_()
            field.density_line[mode].zero_()
            for component in range(BLOBS):
                centre = (torch.rand(3, generator=generator) - 0.5) * 1.1
                bell = [
                    torch.exp(-0.5 * ((torch.linspace(-1.5, 1.5, n) - centre[axis]) / (3 * WIDTH)).pow(4))
                    for axis, n in enumerate(GRID)
                ]
                field.density_plane[mode][0, component] = PEAK * bell[v][:, None] * bell[u][None]
                field.density_line[mode][0, component, :, 0] = bell[w]
    box = update_alpha_mask(field, GRID)
    shrink(field, box)
    field.resize_factors(GRID)
    field.set_geometry(field.aabb, GRID)
    update_alpha_mask(field, GRID)
    field.to(device)
    field.select_kernels()
    return field


def as_reference(field: Field) -> None:
    """Lay a field's factors out in memory, and take their L1 norm, as the reference does: for the dense twin."""
    for parameter in field.parameters():
        parameter.data = parameter.data.contiguous()
    field.density_l1 = lambda: l1_norm(*field.density_factors())
