"""What stands in the demo scene: a still life on a round inlaid table, inside the box +-1.2, z up."""

import math
from functools import cache

import torch
from torch import Tensor

from dataLoader.demo_shading import MATERIALS
from dataLoader.demo_shapes import BOX, CAPSULE, CYLINDER, SPHERE, TINY, Solids

TABLE_TOP = -0.62
Vector = tuple[float, float, float]


@cache
def demo_solids() -> Solids:
    """All solids of the scene."""
    builder = _Builder()
    _table(builder)
    _orrery(builder)
    _still_life(builder)
    return builder.build()


class _Builder:
    """Collects solids one by one and stacks them."""

    def __init__(self) -> None:
        self._rows: list[tuple] = []

    def capsule(self, material: str, a: Vector, b: Vector, radius: float) -> None:
        self._add(CAPSULE, material, a, b, radius)

    def sphere(self, material: str, centre: Vector, radius: float) -> None:
        self._add(SPHERE, material, centre, centre, radius)

    def cylinder(self, material: str, a: Vector, b: Vector, radius: float) -> None:
        self._add(CYLINDER, material, a, b, radius)

    def box(self, material: str, centre: Vector, half: Vector, turn_degrees: float) -> None:
        angle = math.radians(turn_degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        frame = [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]
        self._add(BOX, material, centre, centre, 0.0, half, frame)

    def ring(self, material: str, centre: Vector, x: Vector, y: Vector, radius: float, tube: float, n: int) -> None:
        """A ring of n capsules in the plane of the unit vectors x and y."""
        for start, end in zip(range(n), range(1, n + 1), strict=True):
            self.capsule(
                material,
                _on_circle(centre, x, y, radius, 2 * math.pi * start / n),
                _on_circle(centre, x, y, radius, 2 * math.pi * (end % n) / n),
                tube,
            )

    def _add(self, kind: int, material: str, a: Vector, b: Vector, radius: float, half=(0.0,) * 3, frame=None) -> None:
        frame = frame or [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
        self._rows.append((kind, MATERIALS.index(material), a, b, radius, half, frame))

    def build(self) -> Solids:
        kind, material, *rest = zip(*sorted(self._rows), strict=True)
        a, b, radius, half, frame = (torch.tensor(column) for column in rest)
        kind, material = torch.tensor(kind), torch.tensor(material)
        length = torch.linalg.vector_norm(b - a, dim=-1)
        u = (b - a) / length[:, None].clamp_min(TINY)
        bound = _bounding_radius(kind, length, radius, half)
        return Solids(kind, material, a, b, radius, u, length, half, frame, bound)


def _bounding_radius(kind: Tensor, length: Tensor, radius: Tensor, half: Tensor) -> Tensor:
    cylinder = (0.25 * length.square() + radius.square()).sqrt()
    rounded = 0.5 * length + radius + torch.linalg.vector_norm(half, dim=-1)
    return torch.where(kind == CYLINDER, cylinder, rounded)


def _on_circle(centre: Vector, x: Vector, y: Vector, radius: float, angle: float) -> Vector:
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return tuple(c + cos * i + sin * j for c, i, j in zip(centre, x, y, strict=True))


def _table(add: _Builder) -> None:
    add.cylinder("inlay", (0, 0, TABLE_TOP - 0.09), (0, 0, TABLE_TOP), 1.05)
    add.cylinder("brass", (0, 0, TABLE_TOP - 0.13), (0, 0, TABLE_TOP - 0.09), 0.98)
    for k in range(6):
        angle = math.pi / 6 + math.pi / 3 * k
        add.sphere("ebony", (0.78 * math.cos(angle), 0.78 * math.sin(angle), TABLE_TOP - 0.2), 0.085)


def _orrery(add: _Builder) -> None:
    """A sun on a mast, and planets on two thin tilted rings around it."""
    sun = (0.0, 0.0, 0.42)
    add.capsule("brass", (0, 0, TABLE_TOP), (0, 0, 0.3), 0.035)
    add.cylinder("ebony", (0, 0, TABLE_TOP), (0, 0, TABLE_TOP + 0.06), 0.15)
    add.sphere("sun", sun, 0.21)
    orbits = (
        (0.52, 0.024, 20.0, 10.0, 32, ((40, 0.085, "jade"), (200, 0.06, "coral"))),
        (0.82, 0.022, -14.0, 70.0, 40, ((95, 0.11, "banded"), (330, 0.07, "cobalt"), (215, 0.05, "brass"))),
    )
    for radius, tube, tilt, node, n, planets in orbits:
        t, m = math.radians(tilt), math.radians(node)
        x = (math.cos(m), math.sin(m), 0.0)
        y = (-math.sin(m) * math.cos(t), math.cos(m) * math.cos(t), math.sin(t))
        add.ring("brass", sun, x, y, radius, tube, n)
        for angle, size, material in planets:
            add.sphere(material, _on_circle(sun, x, y, radius, math.radians(angle)), size)
        for angle in (0.0, math.pi):
            add.capsule("brass", sun, _on_circle(sun, x, y, radius, angle), 0.018)


def _still_life(add: _Builder) -> None:
    add.sphere("marble", (-0.50, -0.36, TABLE_TOP + 0.27), 0.27)
    add.box("checker", (0.50, 0.42, TABLE_TOP + 0.2), (0.2, 0.2, 0.2), 28.0)
    add.sphere("coral", (0.50, 0.42, TABLE_TOP + 0.4 + 0.11), 0.11)
    add.box("wood", (-0.42, 0.46, TABLE_TOP + 0.09), (0.32, 0.17, 0.09), -24.0)
    add.cylinder("striped", (-0.42, 0.46, TABLE_TOP + 0.18), (-0.42, 0.46, TABLE_TOP + 0.48), 0.12)
    add.sphere("cobalt", (-0.42, 0.46, TABLE_TOP + 0.48), 0.09)
    c, s = math.cos(math.radians(55)), math.sin(math.radians(55))
    add.ring("candy", (0.50, -0.48, TABLE_TOP + 0.29), (c, s, 0.0), (0.0, 0.0, 1.0), 0.235, 0.055, 28)
    _jack(add, (0.02, -0.72, TABLE_TOP + 0.155), 0.19)
    for x, y, size, material in ((0.02, 0.74, 0.1, "jade"), (0.2, 0.82, 0.06, "coral"), (-0.86, 0.02, 0.08, "cobalt")):
        add.sphere(material, (x, y, TABLE_TOP + size), size)


def _jack(add: _Builder, centre: Vector, reach: float) -> None:
    """Three crossed thin rods with balls on their ends, standing on three of them."""
    axes = ((0.8165, 0.0, 0.5774), (-0.4082, 0.7071, 0.5774), (-0.4082, -0.7071, 0.5774))
    for axis in axes:
        one = tuple(c + reach * k for c, k in zip(centre, axis, strict=True))
        two = tuple(c - reach * k for c, k in zip(centre, axis, strict=True))
        add.capsule("ebony", one, two, 0.024)
        add.sphere("coral", one, 0.045)
        add.sphere("jade", two, 0.045)
