"""Colours of the demo scene: procedural textures without aliasing, one lamp with shadow, soft sky light, highlights.

Blinn-Phong (Blinn 1977): colour = albedo * (ambient + lamp * n.l) + gloss * (n.h)^shininess, h between l and the
view. Letters: n normal, l towards the lamp, v towards the eye, p position in the solid's own axes; K hits.
"""

import math

import torch
from torch import Tensor

TEXTURED = ("inlay", "sun", "banded", "marble", "checker", "wood", "striped", "candy")
PLAIN = {
    "brass": (0.80, 0.56, 0.20),
    "ebony": (0.09, 0.08, 0.09),
    "jade": (0.12, 0.55, 0.34),
    "coral": (0.90, 0.30, 0.24),
    "cobalt": (0.10, 0.22, 0.68),
}
MATERIALS = TEXTURED + tuple(PLAIN)
GLOSS = dict.fromkeys(MATERIALS, (0.32, 50.0)) | {
    "inlay": (0.06, 20.0),
    "brass": (0.35, 30.0),
    "wood": (0.08, 20.0),
    "sun": (0.1, 20.0),
    "marble": (0.3, 60.0),
}
LAMP = torch.nn.functional.normalize(torch.tensor([0.45, -0.6, 1.1]), dim=0)
LAMP_COLOUR = torch.tensor([1.0, 0.95, 0.86]) * 0.85
SKY = torch.tensor([0.50, 0.55, 0.62])
GROUND = torch.tensor([0.26, 0.22, 0.19])
RIM = 0.12
NOISE_CELLS, NOISE_SEED = 16, 7


def shade(material: Tensor, p: Tensor, normal: Tensor, view: Tensor, lit: Tensor, world: Tensor) -> Tensor:
    """Display rgb [K, 3] in [0, 1]: material [K]; p [K, 3] in the solid's axes, world [K, 3]; normal and view
    (towards the eye) [K, 3] unit vectors; lit [K], 1 where the lamp shines, 0 in shadow."""
    colour, gloss, shininess = torch.empty_like(p), torch.empty_like(lit), torch.empty_like(lit)
    for index in material.unique().tolist():
        of = (material == index).nonzero().squeeze(-1)
        name = MATERIALS[index]
        colour[of] = _albedo(name, p[of], world[of])
        gloss[of], shininess[of] = GLOSS[name]
    lamp = LAMP.expand_as(normal)
    diffuse = (normal * lamp).sum(-1).clamp_min(0.0) * lit
    sky_share = 0.5 + 0.5 * normal[:, 2:]
    ambient = SKY * sky_share + GROUND * (1.0 - sky_share)
    halfway = torch.nn.functional.normalize(lamp + view, dim=-1)
    highlight = gloss * lit * (normal * halfway).sum(-1).clamp_min(0.0) ** shininess
    rim = RIM * (1.0 - (normal * view).sum(-1).clamp(0.0, 1.0)) ** 3
    linear = colour * (ambient * 0.75 + LAMP_COLOUR * diffuse[:, None]) + (highlight + rim * sky_share[:, 0])[:, None]
    return linear.clamp(0.0, 1.0) ** (1 / 1.8)


def value_noise(p: Tensor) -> Tensor:
    """Smooth noise [K] in [0, 1] at points p [K, 3]: random numbers on a lattice that repeats, blended by
    smoothstep (Perlin's value noise)."""
    table = torch.rand(NOISE_CELLS**3, generator=torch.Generator().manual_seed(NOISE_SEED))
    cell = p.floor()
    f = p - cell
    f = f * f * (3.0 - 2.0 * f)
    cell = cell.long()
    total = torch.zeros_like(p[:, 0])
    for corner in range(8):
        offset = torch.tensor([corner >> 2, (corner >> 1) & 1, corner & 1])
        x, y, z = ((cell + offset) % NOISE_CELLS).unbind(-1)
        weight = torch.where(offset.bool(), f, 1.0 - f).prod(-1)
        total += weight * table[(x * NOISE_CELLS + y) * NOISE_CELLS + z]
    return total


def _mix(one: tuple, two: tuple, share: Tensor) -> Tensor:
    return torch.tensor(one) + (torch.tensor(two) - torch.tensor(one)) * share[:, None]


def _wave(x: Tensor, sharpness: float = 4.0) -> Tensor:
    """A square wave [K] in [0, 1] with period 1 and soft flanks."""
    return 0.5 + 0.5 * torch.tanh(sharpness * torch.sin(2 * math.pi * x)) / math.tanh(sharpness)


def _albedo(name: str, p: Tensor, world: Tensor) -> Tensor:
    x, y, z = p.unbind(-1)
    if name == "inlay":
        return _inlay(world)
    if name == "sun":
        noise = value_noise(p * 11) * 0.65 + value_noise(p * 22 + 3) * 0.35
        return _mix((0.95, 0.28, 0.04), (1.0, 0.85, 0.25), ((noise - 0.25) * 2).clamp(0, 1))
    if name == "marble":
        veins = torch.sin(14 * (x + 0.7 * z) + 7 * value_noise(p * 7) + 2.5 * value_noise(p * 15))
        return _mix((0.10, 0.24, 0.36), (0.88, 0.90, 0.90), (0.5 + 0.5 * veins) ** 0.7)
    if name == "checker":
        board = torch.sin(3 * math.pi * x / 0.4) * torch.sin(3 * math.pi * y / 0.4) * torch.sin(3 * math.pi * z / 0.4)
        return _mix((0.09, 0.16, 0.34), (0.93, 0.86, 0.72), 0.5 + 0.5 * torch.tanh(9 * board))
    if name == "wood":
        rings = torch.sin(34 * torch.sqrt((y + 0.32) ** 2 + (z + 0.2) ** 2) * 2 + 4 * value_noise(p * 6))
        return _mix((0.36, 0.17, 0.07), (0.62, 0.36, 0.16), 0.5 + 0.5 * rings)
    if name == "striped":
        return _mix((0.92, 0.90, 0.84), (0.78, 0.12, 0.16), _wave(z / 0.12 + torch.atan2(y, x) / (2 * math.pi)))
    if name == "candy":
        angle = torch.atan2(world[:, 2] + 0.33, (world[:, 0] - 0.5) * 0.5736 + (world[:, 1] + 0.48) * 0.8192)
        return _mix((0.95, 0.78, 0.15), (0.10, 0.42, 0.40), _wave(angle / (2 * math.pi) * 12))
    if name == "banded":
        swirl = z * 30 + 3 * value_noise(p * 18)
        return _mix((0.85, 0.62, 0.40), (0.55, 0.25, 0.16), 0.5 + 0.5 * torch.sin(swirl))
    return torch.tensor(PLAIN[name]).expand_as(p)


def _inlay(world: Tensor) -> Tensor:
    """The table: a dial of rings and sectors in two woods, with a stone border."""
    x, y = world[:, 0], world[:, 1]
    r, angle = torch.sqrt(x * x + y * y + 1e-9), torch.atan2(y, x) / (2 * math.pi)
    grain = 0.9 + 0.2 * value_noise(torch.stack([x * 4, y * 14, torch.zeros_like(x)], -1))
    ring = _wave(r / 0.5 + 0.13, 5.0)
    sector = _wave(angle * 8, 5.0)
    board = ring * sector + (1 - ring) * (1 - sector)
    wood = _mix((0.40, 0.20, 0.10), (0.86, 0.68, 0.44), board) * grain[:, None]
    border = torch.sigmoid((r - 0.9) * 120) * torch.sigmoid((1.035 - r) * 120)
    ticks = _mix((0.10, 0.13, 0.17), (0.78, 0.78, 0.74), _wave(angle * 24, 4.0))
    return wood * (1 - border)[:, None] + ticks * border[:, None]
