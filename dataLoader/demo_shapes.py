"""Solids of the demo scene and their exact intersection with rays.

Letters: N rays, P solids, K candidate pairs (ray, solid), t ray parameter; a, b end points of an axis, r its radius,
u the axis' direction, L its length. All solids are convex, so a ray meets one in
an interval, and its surface is seen at the interval's start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPHERE, CAPSULE, CYLINDER, BOX = 0, 1, 2, 3
CHUNK_RAYS = 1 << 13  # small enough for its temporaries to stay in cache
MIN_DISTANCE = 1e-3  # keeps a shadow ray off the surface that it starts from
TINY = 1e-12


@dataclass(frozen=True)
class Solids:
    """P solids, sorted by kind.

    kind, material [P] int64; a, b [P, 3] and radius [P] of capsules and (flat) cylinders, u [P, 3] and length [P] of
    their axes; spheres and boxes: centre a = b, length 0; half-extents half [P, 3], frame [P, 3, 3] from world to box
    axes; bound [P]: radius of a sphere around each.
    """

    kind: Tensor
    material: Tensor
    a: Tensor
    b: Tensor
    radius: Tensor
    u: Tensor
    length: Tensor
    half: Tensor
    frame: Tensor
    bound: Tensor


def trace(solids: Solids, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """First hits of rays: t [N] (inf where none) and the solid's index [N] int64 (-1 where none).

    origins [N, 3]; directions [N, 3] of unit length, within 80 degrees of each other. Fast if neighbours in the list
    are neighbours in space.
    """
    parts = [
        _trace_chunk(solids, o, d) for o, d in zip(origins.split(CHUNK_RAYS), directions.split(CHUNK_RAYS), strict=True)
    ]
    return torch.cat([t for t, _ in parts]), torch.cat([index for _, index in parts])


def normals(solids: Solids, points: Tensor, index: Tensor) -> Tensor:
    """Outward unit normals [N, 3] at surface points [N, 3] of the solids index [N]."""
    a, u, length = solids.a[index], solids.u[index], solids.length[index, None]
    y = ((points - a) * u).sum(-1, keepdim=True)
    round_normal = points - a - u * torch.minimum(y.clamp_min(0.0), length)
    # On a cylinder's cap the distance from the axis' end planes is nearer zero than that from the mantle.
    off_mantle = torch.linalg.vector_norm(points - a - u * y, dim=-1, keepdim=True) - solids.radius[index, None]
    on_cap = (torch.minimum(y.abs(), (y - length).abs()) < off_mantle.abs()) & (solids.kind[index, None] == CYLINDER)
    normal = torch.where(on_cap, u * torch.sign(y - 0.5 * length), round_normal)
    boxes = (solids.kind[index] == BOX).nonzero().squeeze(-1)
    which = index[boxes]
    local = local_points(solids, points[boxes], which) / solids.half[which]
    face = torch.nn.functional.one_hot(local.abs().argmax(-1), 3) * torch.sign(local)
    normal[boxes] = (solids.frame[which].transpose(1, 2) @ face[..., None]).squeeze(-1)
    return torch.nn.functional.normalize(normal, dim=-1)


def local_points(solids: Solids, points: Tensor, index: Tensor) -> Tensor:
    """Points [N, 3] in the axes of their solids, relative to the middle of each."""
    local = points - (0.5 * (solids.a + solids.b))[index]
    boxes = (solids.kind[index] == BOX).nonzero().squeeze(-1)
    local[boxes] = (solids.frame[index[boxes]] @ local[boxes, :, None]).squeeze(-1)
    return local


def _trace_chunk(solids: Solids, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    ray, solid, middle = _candidates(solids, origins, directions)
    best = torch.full((len(origins),), torch.inf)
    index = torch.full((len(origins),), -1, dtype=torch.int64)
    if not len(ray):
        return best, index
    d = directions[ray]
    # From the point nearest to the solid's centre, all numbers are small: no digits are lost to cancellation.
    o = origins[ray] + middle[:, None] * d
    t = middle + _entry(solids, solid, o, d)
    t = torch.where(t > MIN_DISTANCE, t, torch.inf)
    best.scatter_reduce_(0, ray, t, "amin")
    winner = (t == best[ray]) & torch.isfinite(t)
    index[ray[winner]] = solid[winner]
    return best, index


def _candidates(solids: Solids, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (ray [K], solid [K]), sorted by solid, where the ray meets the solid's bounding sphere; t [K] nearest to
    its centre."""
    centre = 0.5 * (solids.a + solids.b)
    close = _near_bundle(centre, solids.bound, origins, directions).nonzero().squeeze(-1)
    centre, bound = centre[close], solids.bound[close] + MIN_DISTANCE
    along = torch.addmm(-(origins * directions).sum(-1), centre, directions.T)
    limit = bound.square() - centre.square().sum(-1)
    square = torch.addmm(origins.square().sum(-1), centre, origins.T, alpha=-2.0)
    row, ray = (square.addcmul_(along, along, value=-1.0) <= limit[:, None]).nonzero(as_tuple=True)
    return ray, close[row], along[row, ray]


def _near_bundle(centre: Tensor, bound: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """Solids [P] whose bounding sphere touches a cone (blunt by the spread of the origins) around all the rays."""
    origin = origins.mean(0)
    axis = torch.nn.functional.normalize(directions.mean(0), dim=0)
    blunt = torch.linalg.vector_norm(origins - origin, dim=-1).max()
    forward = directions @ axis
    sideways = torch.linalg.vector_norm(directions - forward[:, None] * axis, dim=-1)
    slope = sideways.max() / forward.min().clamp_min(0.1)
    along = (centre - origin) @ axis
    across = torch.linalg.vector_norm(centre - origin - along[:, None] * axis, dim=-1)
    # A ray's distance from the axis grows by its slope; blunt counts twice, for its part along the axis.
    reach = bound + MIN_DISTANCE + blunt + slope * (along.clamp_min(0.0) + bound + blunt)
    return (across <= reach) & (along > -bound - blunt)


def _entry(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> Tensor:
    """Where rays o + t d [K] enter their solids [K] (sorted): t [K], inf where they miss."""
    enter = (_enter_sphere, _enter_capsule, _enter_cylinder, _enter_box)
    counts = torch.bincount(solids.kind[solid], minlength=len(enter)).tolist()
    parts = zip(enter, solid.split(counts), o.split(counts), d.split(counts), strict=True)
    return torch.cat([function(solids, s, o_s, d_s) for function, s, o_s, d_s in parts])


def _enter_sphere(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> Tensor:
    return _enter_ball(o - solids.a[solid], d, solids.radius[solid])


def _enter_ball(offset: Tensor, d: Tensor, radius: Tensor) -> Tensor:
    """Entry t [K] into balls of `radius` [K]; offset [K, 3]: ray origin minus centre."""
    along = (offset * d).sum(-1)
    discriminant = radius.square() - (offset - along[:, None] * d).square().sum(-1)
    # The root of a negative number is NaN, and NaN means a miss.
    return (-along - discriminant.sqrt()).nan_to_num_(nan=torch.inf)


def _mantle(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The infinite cylinder around the axis: entry and exit t [K] (NaN: missed), height o_u and slope d_u along it."""
    u = solids.u[solid]
    from_a = o - solids.a[solid]
    o_u, d_u = (from_a * u).sum(-1), (d * u).sum(-1)
    o_across, d_across = from_a - o_u[:, None] * u, d - d_u[:, None] * u
    square = d_across.square().sum(-1).clamp_min(TINY)
    half = (o_across * d_across).sum(-1)
    root = (half.square() - square * (o_across.square().sum(-1) - solids.radius[solid].square())).sqrt()
    return (-half - root) / square, (-half + root) / square, o_u, d_u


def _enter_capsule(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> Tensor:
    enter, _, o_u, d_u = _mantle(solids, solid, o, d)
    y, length = o_u + enter * d_u, solids.length[solid]
    on_mantle = (y > 0) & (y < length)
    t = torch.where(on_mantle, enter, torch.inf)
    # Off the mantle only the ball at the end that the ray passes first can be what it meets.
    pairs = (enter.isfinite() & ~on_mantle).nonzero().squeeze(-1)
    which = solid[pairs]
    end = torch.where((y[pairs] <= 0)[:, None], solids.a[which], solids.b[which])
    t[pairs] = _enter_ball(o[pairs] - end, d[pairs], solids.radius[which])
    return t


def _enter_cylinder(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> Tensor:
    enter, leave, o_u, d_u = _mantle(solids, solid, o, d)
    length = solids.length[solid]
    slope = torch.where(d_u.abs() < TINY, torch.full_like(d_u, TINY), d_u)
    bottom, top = -o_u / slope, (length - o_u) / slope
    enter = torch.maximum(enter, torch.minimum(bottom, top))
    leave = torch.minimum(leave, torch.maximum(bottom, top))
    return torch.where(enter <= leave, enter, torch.inf)


def _enter_box(solids: Solids, solid: Tensor, o: Tensor, d: Tensor) -> Tensor:
    frame, half = solids.frame[solid], solids.half[solid]
    o = (frame @ (o - solids.a[solid])[..., None]).squeeze(-1)
    d = (frame @ d[..., None]).squeeze(-1)
    d = torch.where(d.abs() < TINY, torch.full_like(d, TINY), d)
    one, two = (-half - o) / d, (half - o) / d
    enter = torch.minimum(one, two).amax(-1)
    leave = torch.maximum(one, two).amin(-1)
    return torch.where(enter <= leave, enter, torch.inf)
