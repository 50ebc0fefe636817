"""Lookups in the factors on a CPU, by lookups.cpp and this machine's threads.

Equal to torch_lookups up to rounding, in single precision; anything else takes gather_lookups' way. The backward pass
is deterministic for a given number of threads: points (CP) or bands of plane rows (VM) are shared out, and what several
shares add up to is summed in their order.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from components.marching import Samples
from models.kernels import gather_lookups, threads, torch_rendering
from models.kernels.compiled import libraries
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

# Points whose products are multiplied by the basis at once; points whose d loss / d products is held at once; work too
# small to share out; every so many points are looked at to share out a plane's rows.
_CHUNK, _BLOCK, _ALONE, _EVERY = 1 << 10, 1 << 14, 1 << 9, 16
# Rays that are too few to share out; the light that is left behind which nothing is looked up in evaluations.
_RAYS_ALONE, _OPAQUE = 1 << 6, 1e-7


class _Table(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("gradient", ctypes.c_void_p), ("axes", ctypes.c_int32 * 2))


class _Group(ctypes.Structure):
    _fields_ = (("tables", _Table * 3), ("channels", ctypes.c_int64), ("offset", ctypes.c_int64))


def _library() -> ctypes.CDLL:
    return libraries()["lookups"]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class _Call:
    """One field's factors as the library wants them.

    axes: for each group the axes of each of its tables; factors: [1, C, H, W], channels-last, in that order;
    gradients: of the same shapes, to add to, or None.
    """

    def __init__(self, axes, factors: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.groups = (_Group * len(axes))()
        self.grid = (ctypes.c_int32 * 3)()
        self.gradients: list[list[Tensor]] = []
        self.width, number = 0, 0
        for group, tables in zip(self.groups, axes, strict=True):
            self.gradients.append([])
            for table, table_axes in zip(group.tables, tables, strict=False):
                factor = factors[number]
                table.values = factor.data_ptr()
                table.axes[:] = (*table_axes, -1)[:2]
                for axis, size in zip(table_axes, (factor.shape[3], factor.shape[2])[-len(table_axes) :], strict=True):
                    self.grid[axis] = size
                if gradients:
                    table.gradient = gradients[number].data_ptr()
                    self.gradients[-1].append(gradients[number])
                number += 1
            group.channels, group.offset = factor.shape[1], self.width
            self.width += factor.shape[1]

    def products(self, xyz: Tensor, first: int, end: int, out: Tensor, summed: bool) -> None:
        """Products of points first..end - 1 into out: [K, width], or [K] summed."""
        width = ctypes.c_int64(1 if summed else self.width)
        _library().products(
            _at(xyz),
            self.grid,
            self.groups,
            len(self.groups),
            *map(ctypes.c_int64, (first, end)),
            _at(out),
            width,
            summed,
        )

    def scatter(self, xyz: Tensor, upstream: Tensor, summed: bool) -> None:
        """Add d loss / d factors, from d loss / d products [K, width], or [K] summed."""
        width, calls, lines = ctypes.c_int64(1 if summed else self.width), [], []
        for group, gradients in zip(self.groups, self.gradients, strict=True):
            if group.tables[0].axes[1] < 0:
                for first, end in threads.parts(len(xyz), _ALONE):
                    own = [torch.zeros_like(gradient) for gradient in gradients]
                    lines += zip(gradients, own, strict=True)
                    pointers = (ctypes.c_void_p * 3)(*[gradient.data_ptr() for gradient in own])
                    arguments = (self.grid, ctypes.byref(group), *map(ctypes.c_int64, (first, end)))
                    calls.append(
                        partial(_library().scatter_lines, _at(xyz), *arguments, _at(upstream), width, summed, pointers)
                    )
                continue
            for low, high in self.bands(xyz, group.tables[0].axes[1]):
                own = torch.zeros_like(gradients[1])
                lines.append((gradients[1], own))
                arguments = (ctypes.c_int64(len(xyz)), self.grid, ctypes.byref(group))
                band = (ctypes.c_int64(low), ctypes.c_int64(high))
                calls.append(
                    partial(
                        _library().scatter_plane, _at(xyz), *arguments, *band, _at(upstream), width, summed, _at(own)
                    )
                )
        threads.together(calls)
        for gradient, own in lines:
            gradient.add_(own)

    def bands(self, xyz: Tensor, axis: int) -> list[tuple[int, int]]:
        """Rows 0..N - 1 of an axis as (first, end) of bands, one a thread, that hold about as many points each."""
        size, n_bands = self.grid[axis], 1 if len(xyz) <= _ALONE else threads.count()
        if n_bands == 1:
            return [(0, size)]
        counts = torch.zeros(size, dtype=torch.int64)
        _library().occupancy(_at(xyz), ctypes.c_int64(len(xyz)), axis, size, ctypes.c_int64(_EVERY), _at(counts))
        shares = torch.arange(1, n_bands) * counts.sum() // n_bands
        borders = [0, *(torch.searchsorted(counts.cumsum(0), shares) + 1).clamp_max(size).tolist(), size]
        return [(low, high) for low, high in pairwise(borders) if high > low]

    def positions(self, xyz: Tensor, upstream: Tensor, summed: bool) -> Tensor:
        """d loss / d xyz [K, 3]."""
        gradient = torch.zeros_like(xyz)
        width = ctypes.c_int64(1 if summed else self.width)
        arguments = (_at(xyz), self.grid, self.groups, len(self.groups))
        threads.together(
            [
                partial(
                    _library().positions,
                    *arguments,
                    *map(ctypes.c_int64, part),
                    _at(upstream),
                    width,
                    summed,
                    _at(gradient),
                )
                for part in threads.parts(len(xyz), _ALONE)
            ]
        )
        return gradient


class _Summed(torch.autograd.Function):
    """Products of lookups, summed over all components to [K]."""

    @staticmethod
    def forward(ctx, xyz: Tensor, axes, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, *factors)
        ctx.axes = axes
        call, out = _Call(axes, factors, None), xyz.new_empty(len(xyz))
        threads.together([partial(call.products, xyz, *part, out, True) for part in threads.parts(len(xyz), _ALONE)])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        xyz, *factors = ctx.saved_tensors
        grad = grad.contiguous()
        gradients = [torch.zeros_like(factor, memory_format=torch.channels_last) for factor in factors]
        call = _Call(ctx.axes, factors, gradients)
        call.scatter(xyz, grad, summed=True)
        return call.positions(xyz, grad, summed=True) if ctx.needs_input_grad[0] else None, None, *gradients


class _Projected(torch.autograd.Function):
    """Products of lookups times the basis [F, width]: [K, F]. Backward makes the products again, a block at a time."""

    @staticmethod
    def forward(ctx, xyz: Tensor, axes, basis: Tensor, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, basis, *factors)
        ctx.axes = axes
        call, out, transposed = _Call(axes, factors, None), xyz.new_empty(len(xyz), len(basis)), basis.detach().T

        def project(first: int, end: int) -> None:
            products = xyz.new_empty(end - first, call.width)
            call.products(xyz[first:end], 0, end - first, products, False)
            torch.mm(products, transposed, out=out[first:end])

        threads.together([partial(project, *part) for part in _chunks(0, len(xyz))])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        xyz, basis, *factors = ctx.saved_tensors
        grad = grad.contiguous()
        gradients = [torch.zeros_like(factor, memory_format=torch.channels_last) for factor in factors]
        call, basis_grad, position_grads = _Call(ctx.axes, factors, gradients), torch.zeros_like(basis), []
        for start in range(0, len(xyz), _BLOCK):
            points, upstream = xyz[start : start + _BLOCK], grad[start : start + _BLOCK]
            to_products = xyz.new_empty(len(points), call.width)
            parts = _chunks(0, len(points))
            basis_parts = basis.new_empty(len(parts), *basis.shape)

            def through_basis(
                number: int, first: int, end: int, points=points, upstream=upstream, out=to_products, own=basis_parts
            ) -> None:
                products = points.new_empty(end - first, call.width)
                call.products(points[first:end], 0, end - first, products, False)
                torch.mm(upstream[first:end].T, products, out=own[number])
                torch.mm(upstream[first:end], basis, out=out[first:end])

            threads.together([partial(through_basis, number, *part) for number, part in enumerate(parts)])
            basis_grad += basis_parts.sum(0)
            call.scatter(points, to_products, summed=False)
            if ctx.needs_input_grad[0]:
                position_grads.append(call.positions(points, to_products, summed=False))
        return torch.cat(position_grads) if position_grads else None, None, basis_grad, *gradients


def _chunks(first: int, end: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, end)) for start in range(first, end, _CHUNK)]


def weights_until_opaque(
    planes: list[Tensor], lines: list[Tensor], samples: Samples, activation: str, shift: float, scale: float
) -> Tensor:
    """Weights [K] without gradients, as ray_weights of the density's features (planes are empty for CP), but what lies
    behind 1 - 1e-7 of a ray's opacity, float32's rounding of 1, is not looked up."""
    axes, factors = _vm_order(planes, lines) if planes else (_CP_AXES, lines)
    if not _serves(samples.position, factors):
        features = gather_lookups.vm_density(planes, lines, samples.position) if planes else None
        features = gather_lookups.cp_density(lines, samples.position) if features is None else features
        return torch_rendering.ray_weights(features, samples, activation, shift, scale)
    factors = [factor.detach().contiguous(memory_format=torch.channels_last) for factor in factors]
    call, weights = _Call(axes, factors, None), torch.empty_like(samples.t)
    given = (_at(samples.position), call.grid, call.groups, len(call.groups), _at(samples.delta), _at(samples.offsets))
    ends = (activation == "softplus", *map(ctypes.c_float, (shift, scale, _OPAQUE)), _at(weights))
    threads.together(
        [
            partial(_library().weights_until_opaque, *given, *map(ctypes.c_int64, part), *ends)
            for part in threads.parts(samples.n_rays, _RAYS_ALONE)
        ]
    )
    return weights


def _serves(xyz: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether the library can take these: floats on the CPU."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (xyz, *factors))


def _vm_order(planes: list[Tensor], lines: list[Tensor]) -> tuple[tuple, list[Tensor]]:
    axes = tuple((plane, (line,)) for plane, line in zip(PLANE_AXES, LINE_AXES, strict=True))
    return axes, [factor for pair in zip(planes, lines, strict=True) for factor in pair]


_CP_AXES = (tuple((axis,) for axis in LINE_AXES),)


def vm_density(planes: list[Tensor], lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.vm_density."""
    axes, factors = _vm_order(planes, lines)
    if not _serves(xyz, factors):
        return gather_lookups.vm_density(planes, lines, xyz)
    return _Summed.apply(xyz, axes, *factors)


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.vm_appearance."""
    axes, factors = _vm_order(planes, lines)
    if not _serves(xyz, [basis, *factors]):
        return gather_lookups.vm_appearance(planes, lines, basis, xyz)
    return _Projected.apply(xyz, axes, basis, *factors)


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.cp_density."""
    if not _serves(xyz, lines):
        return gather_lookups.cp_density(lines, xyz)
    return _Summed.apply(xyz, _CP_AXES, *lines)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.cp_appearance."""
    if not _serves(xyz, [basis, *lines]):
        return gather_lookups.cp_appearance(lines, basis, xyz)
    return _Projected.apply(xyz, _CP_AXES, basis, *lines)
