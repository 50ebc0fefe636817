"""Lookups in the factors on a CPU, by lookups.cpp and this machine's threads.

Equal to torch_lookups up to rounding, in single precision; anything else takes gather_lookups' way. The backward pass
is deterministic for a given number of threads: points (CP) or bands of plane rows (VM) are shared out, and what several
shares add up to is summed in their order.
"""

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.marching import Samples
from models.kernels import gather_lookups, threads, torch_rendering
from models.kernels.compiled import libraries
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

# Points whose products are multiplied by the basis at once; points whose d loss / d products is held at once; the light
# that is left behind which nothing is looked up in evaluations.
_CHUNK, _BLOCK, _OPAQUE = 1 << 10, 1 << 14, 1e-7


class _Table(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("gradient", ctypes.c_void_p), ("axes", ctypes.c_int32 * 2))


class _Group(ctypes.Structure):
    _fields_ = (("tables", _Table * 3), ("channels", ctypes.c_int64), ("offset", ctypes.c_int64))


def _library() -> ctypes.CDLL:
    return libraries()["lookups"]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Factors:
    """One field's factors as the library wants them.

    axes: for each group the axes of each of its tables; factors: [1, C, H, W], channels-last, in that order.
    `width`: P, products of all groups.
    """

    def __init__(self, axes, factors: Sequence[Tensor]) -> None:
        self.groups = (_Group * len(axes))()
        self.grid = (ctypes.c_int32 * 3)()
        self.width, self._tables = 0, []
        for group, tables in zip(self.groups, axes, strict=True):
            for table, table_axes in zip(group.tables, tables, strict=False):
                factor = factors[len(self._tables)]
                table.values = factor.data_ptr()
                table.axes[:] = (*table_axes, -1)[:2]
                for axis, size in zip(table_axes, (factor.shape[3], factor.shape[2])[-len(table_axes) :], strict=True):
                    self.grid[axis] = size
                self._tables.append(table)
            group.channels, group.offset = factor.shape[1], self.width
            self.width += factor.shape[1]

    def into(self, gradients: Sequence[Tensor]) -> None:
        """Where `scatter` writes from now on: tensors like the factors, in their order."""
        for table, gradient in zip(self._tables, gradients, strict=True):
            table.gradient = gradient.data_ptr()

    def _at(self, xyz: Tensor) -> tuple:
        return _at(xyz), ctypes.c_int64(len(xyz)), self.grid, self.groups, len(self.groups)

    def products(self, xyz: Tensor, out: Tensor, n_threads: int) -> None:
        """Products at xyz [K, 3] into out: [K, width], or [K] summed."""
        width = ctypes.c_int64(out.shape[1] if out.dim() > 1 else 1)
        _library().products(*self._at(xyz), _at(out), width, out.dim() == 1, n_threads)

    def scatter(self, xyz: Tensor, upstream: Tensor, fresh: bool = True) -> None:
        """d loss / d factors into the gradients, from d loss / d products [K, width or more], or [K] summed.

        fresh: the gradients hold nothing yet."""
        width = ctypes.c_int64(upstream.shape[1] if upstream.dim() > 1 else 1)
        _library().scatter(*self._at(xyz), _at(upstream), width, upstream.dim() == 1, fresh, threads.count())

    def positions(self, xyz: Tensor, upstream: Tensor) -> Tensor:
        """d loss / d xyz [K, 3]."""
        gradient, width = torch.empty_like(xyz), ctypes.c_int64(upstream.shape[1] if upstream.dim() > 1 else 1)
        _library().positions(*self._at(xyz), _at(upstream), width, upstream.dim() == 1, _at(gradient), threads.count())
        return gradient


class _Summed(torch.autograd.Function):
    """Products of lookups, summed over all components to [K]."""

    @staticmethod
    def forward(ctx, xyz: Tensor, axes, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, *factors)
        ctx.factors, out = Factors(axes, factors), xyz.new_empty(len(xyz))
        ctx.factors.products(xyz, out, threads.count())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        xyz, *factors = ctx.saved_tensors
        grad = grad.contiguous()
        gradients = [torch.empty_like(factor, memory_format=torch.channels_last) for factor in factors]
        ctx.factors.into(gradients)
        ctx.factors.scatter(xyz, grad)
        return ctx.factors.positions(xyz, grad) if ctx.needs_input_grad[0] else None, None, *gradients


class _Projected(torch.autograd.Function):
    """Products of lookups times the basis [F, width]: [K, F]. Backward makes the products again, a block at a time."""

    @staticmethod
    def forward(ctx, xyz: Tensor, axes, basis: Tensor, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, basis, *factors)
        ctx.factors = ours = Factors(axes, factors)
        out, transposed = xyz.new_empty(len(xyz), len(basis)), basis.detach().T

        def project(first: int, end: int) -> None:
            products = xyz.new_empty(end - first, ours.width)
            ours.products(xyz[first:end], products, 1)
            torch.mm(products, transposed, out=out[first:end])

        threads.together([partial(project, *part) for part in _chunks(0, len(xyz))])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        xyz, basis, *factors = ctx.saved_tensors
        grad = grad.contiguous()
        gradients = [torch.empty_like(factor, memory_format=torch.channels_last) for factor in factors]
        ours, basis_grad, position_grads = ctx.factors, torch.zeros_like(basis), []
        ours.into(gradients)
        for start in range(0, max(len(xyz), 1), _BLOCK):
            points, upstream = xyz[start : start + _BLOCK], grad[start : start + _BLOCK]
            to_products = xyz.new_empty(len(points), ours.width)
            parts = _chunks(0, len(points))
            basis_parts = basis.new_empty(len(parts), *basis.shape)

            def through_basis(
                number: int, first: int, end: int, points=points, upstream=upstream, out=to_products, own=basis_parts
            ) -> None:
                products = points.new_empty(end - first, ours.width)
                ours.products(points[first:end], products, 1)
                torch.mm(upstream[first:end].T, products, out=own[number])
                torch.mm(upstream[first:end], basis, out=out[first:end])

            threads.together([partial(through_basis, number, *part) for number, part in enumerate(parts)])
            basis_grad += basis_parts.sum(0)
            ours.scatter(points, to_products, fresh=start == 0)
            if ctx.needs_input_grad[0]:
                position_grads.append(ours.positions(points, to_products))
        return torch.cat(position_grads) if position_grads else None, None, basis_grad, *gradients


def _chunks(first: int, end: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, end)) for start in range(first, end, _CHUNK)]


def weights_until_opaque(
    planes: list[Tensor], lines: list[Tensor], samples: Samples, activation: str, shift: float, scale: float
) -> Tensor:
    """Weights [K] without gradients, as ray_weights of the density's features (planes are empty for CP), but what lies
    behind 1 - 1e-7 of a ray's opacity, float32's rounding of 1, is not looked up."""
    axes, factors = vm_order(planes, lines) if planes else (CP_AXES, lines)
    if not serves(samples.position, factors):
        features = gather_lookups.vm_density(planes, lines, samples.position) if planes else None
        features = gather_lookups.cp_density(lines, samples.position) if features is None else features
        return torch_rendering.ray_weights(features, samples, activation, shift, scale)
    factors = [factor.detach().contiguous(memory_format=torch.channels_last) for factor in factors]
    position, delta, offsets = (x.contiguous() for x in (samples.position, samples.delta, samples.offsets))
    ours, weights = Factors(axes, factors), torch.empty_like(delta)
    _library().weights_until_opaque(
        *(_at(position), ours.grid, ours.groups, len(ours.groups), _at(delta), _at(offsets)),
        *(ctypes.c_int64(samples.n_rays), activation == "softplus", *map(ctypes.c_float, (shift, scale, _OPAQUE))),
        *(_at(weights), threads.count()),
    )
    return weights


def serves(xyz: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether the library can take these: floats on the CPU."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (xyz, *factors))


def vm_order(planes: list[Tensor], lines: list[Tensor]) -> tuple[tuple, list[Tensor]]:
    """(axes, factors) for Factors: each plane followed by its line."""
    axes = tuple((plane, (line,)) for plane, line in zip(PLANE_AXES, LINE_AXES, strict=True))
    return axes, [factor for pair in zip(planes, lines, strict=True) for factor in pair]


CP_AXES = (tuple((axis,) for axis in LINE_AXES),)


def vm_density(planes: list[Tensor], lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.vm_density."""
    axes, factors = vm_order(planes, lines)
    if not serves(xyz, factors):
        return gather_lookups.vm_density(planes, lines, xyz)
    return _Summed.apply(xyz, axes, *factors)


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.vm_appearance."""
    axes, factors = vm_order(planes, lines)
    if not serves(xyz, [basis, *factors]):
        return gather_lookups.vm_appearance(planes, lines, basis, xyz)
    return _Projected.apply(xyz, axes, basis, *factors)


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.cp_density."""
    if not serves(xyz, lines):
        return gather_lookups.cp_density(lines, xyz)
    return _Summed.apply(xyz, CP_AXES, *lines)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.cp_appearance."""
    if not serves(xyz, [basis, *lines]):
        return gather_lookups.cp_appearance(lines, basis, xyz)
    return _Projected.apply(xyz, CP_AXES, basis, *lines)
