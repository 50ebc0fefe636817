"""Lookups in the factors as weighted sums of table rows, with a backward pass that recomputes instead of storing.

Letters: K points, T taps of a table (2 for a line, 4 for a plane), C components, table [rows, C]: a factor
[1, C, H, W] seen as H*W rows of C numbers, which is a view where the factor is stored channels-last.

Equal to torch_lookups up to rounding. Neither grids of coordinates nor [C, K] intermediates are kept for backward:
the row sums (torch's embedding_bag) are cheap enough to be done twice, a chunk of points at a time. Positions get a
gradient only if they ask for one (soft mining's do).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

# Values (points x components) at once: few on a CPU, whose cache they should fit; on CUDA launches cost more.
_CHUNK_VALUES, _OTHER_CHUNK_VALUES = {"cpu": 3 << 19}, 1 << 26

# A table's axes (fastest first) and its points along each.
Shape = tuple[tuple[int, ...], tuple[int, ...]]


def _taps(xyz: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(row [K, T] int64, weight [K, T]) of the table rows around each point; taps outside weigh nothing."""
    row = weight = None
    stride = 1
    for axis, size in zip(*shape, strict=True):
        position = ((xyz[:, axis] + 1) / 2) * (size - 1)
        lower = position.floor()
        upper_weight = position - lower
        index = torch.stack([lower, lower + 1], -1)
        share = torch.stack([1 - upper_weight, upper_weight], -1)
        share = torch.where((index >= 0) & (index < size), share, torch.zeros_like(share))
        index = index.clamp(0, size - 1).long() * stride
        stride *= size
        if row is None:
            row, weight = index, share
        else:
            row = (index[:, :, None] + row[:, None, :]).flatten(1)
            weight = (share[:, :, None] * weight[:, None, :]).flatten(1)
    return row, weight


class _Products(torch.autograd.Function):
    """For each group of tables the product of their lookups, [K, C] a group: summed to [K] where `basis` is None,
    else side by side and times the basis, [K, sum C] @ basis.T -> [K, F].

    groups: per group the shapes of its tables; basis: [F, sum C]; tables: [rows, C], in the order of the groups.
    """

    @staticmethod
    def forward(ctx, xyz: Tensor, groups: tuple[tuple[Shape, ...], ...], basis: Tensor | None, *tables: Tensor):
        ctx.save_for_backward(xyz, basis, *tables)
        ctx.groups = groups
        outputs = []
        for points in xyz.split(_chunk(tables)):
            products = [math.prod(values) for _, values in _lookups(points, groups, tables)]
            outputs.append(sum(p.sum(1) for p in products) if basis is None else torch.cat(products, 1) @ basis.T)
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        xyz, basis, *tables = ctx.saved_tensors
        table_grads = [torch.zeros_like(table) for table in tables]
        basis_grad = None if basis is None else torch.zeros_like(basis)
        size, position_grads = _chunk(tables), []
        for points, upstream in zip(xyz.split(size), grad.split(size), strict=True):
            looked_up = _lookups(points, ctx.groups, tables)
            if basis is None:
                parts = [upstream[:, None]] * len(ctx.groups)
            else:
                products = torch.cat([math.prod(values) for _, values in looked_up], 1)
                basis_grad.addmm_(upstream.T, products)
                parts = (upstream @ basis).split([values[0].shape[1] for _, values in looked_up], dim=1)
            remaining, slopes = iter(zip(tables, table_grads, strict=True)), []
            for part, (taps, values) in zip(parts, looked_up, strict=True):
                for number, (row, weight) in enumerate(taps):
                    others = math.prod([v for i, v in enumerate(values) if i != number], start=part)
                    table, table_grad = next(remaining)
                    for tap in range(row.shape[1]):
                        table_grad.index_add_(0, row[:, tap], others * weight[:, tap, None])
                    if ctx.needs_input_grad[0]:
                        slopes.append(torch.stack([(others * table[r]).sum(1) for r in row.unbind(1)], 1))
            if ctx.needs_input_grad[0]:
                position_grads.append(_through_weights(points, ctx.groups, slopes))
        return torch.cat(position_grads) if position_grads else None, None, basis_grad, *table_grads


def _through_weights(points: Tensor, groups: tuple[tuple[Shape, ...], ...], slopes: list[Tensor]) -> Tensor:
    """d loss / d points [K, 3] from d loss / d tap weights, a slope [K, T] for each table."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        weights = [_taps(points, shape)[1] for group in groups for shape in group]
    return torch.autograd.grad(weights, points, slopes)[0]


def _chunk(tables: Sequence[Tensor]) -> int:
    """Points to look up at once."""
    components = sum(table.shape[1] for table in tables)
    return max(_CHUNK_VALUES.get(tables[0].device.type, _OTHER_CHUNK_VALUES) * 2 // components, 1024)


def _lookups(points: Tensor, groups: tuple[tuple[Shape, ...], ...], tables: Sequence[Tensor]) -> list:
    """For each group (taps of its tables, values [K, C] of its tables)."""
    result, remaining = [], iter(tables)
    for group in groups:
        taps = [_taps(points, shape) for shape in group]
        values = [embedding_bag(row, next(remaining), per_sample_weights=w, mode="sum") for row, w in taps]
        result.append((taps, values))
    return result


def _rows(factor: Tensor) -> Tensor:
    """A factor [1, C, H, W] as its table [H*W, C]; no copy if it is stored channels-last."""
    return factor[0].permute(1, 2, 0).reshape(-1, factor.shape[1]).contiguous()


def _vm(planes: list[Tensor], lines: list[Tensor], basis: Tensor | None, xyz: Tensor) -> Tensor:
    groups = tuple(
        ((axes, (plane.shape[3], plane.shape[2])), ((axis,), (line.shape[2],)))
        for plane, line, axes, axis in zip(planes, lines, PLANE_AXES, LINE_AXES, strict=True)
    )
    tables = [_rows(factor) for pair in zip(planes, lines, strict=True) for factor in pair]
    return _Products.apply(xyz, groups, basis, *tables)


def _cp(lines: list[Tensor], basis: Tensor | None, xyz: Tensor) -> Tensor:
    group = tuple(((axis,), (line.shape[2],)) for line, axis in zip(lines, LINE_AXES, strict=True))
    return _Products.apply(xyz, (group,), basis, *[_rows(line) for line in lines])


def vm_density(planes: list[Tensor], lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.vm_density."""
    return _vm(planes, lines, None, xyz)


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.vm_appearance."""
    return _vm(planes, lines, basis, xyz)


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.cp_density."""
    return _cp(lines, None, xyz)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.cp_appearance."""
    return _cp(lines, basis, xyz)
