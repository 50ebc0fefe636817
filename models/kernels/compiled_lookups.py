"""Lookups in the factors, compiled from lookups.cpp for this CPU on first use.

Equal to torch_lookups up to rounding, in single precision; anything else takes gather_lookups' way. The library is
plain C called through ctypes, so building it needs a compiler (c++, g++ or clang++) and nothing of torch or Python;
it is kept in the user's cache folder and built again when its source, the compiler or the CPU is another one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.kernels import gather_lookups
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES
from utils.console import say

SOURCE = Path(__file__).with_name("lookups.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Sums may be reordered for vector instructions; NaN and infinity keep their meaning.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
FLAGS += ("-fassociative-math", "-fno-signed-zeros")
COMPILE_SECONDS = 300
# Points whose products are held at once before they are multiplied by the basis; work too small to share out.
_CHUNK, _ALONE, _BLOCK = 1 << 11, 1 << 10, 8


class _Table(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("axes", ctypes.c_int32 * 2),
        ("sizes", ctypes.c_int32 * 2),
    )


class _Group(ctypes.Structure):
    _fields_ = (("tables", _Table * 3), ("channels", ctypes.c_int64), ("offset", ctypes.c_int64))


# --- building --------------------------------------------------------------------------------------------------------
@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built if it must be; None, and one line that says why, if it cannot be had."""
    try:
        path = _built()
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())[:200]
        say(f"the CPU lookups could not be compiled ({reason}): torch's serve, at about half the speed")
        return None
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.products.argtypes = (pointer, pointer, flag, number, number, pointer, number, flag)
    loaded.scatter.argtypes = (pointer, number, pointer, number, number, pointer, number, flag)
    loaded.positions.argtypes = (pointer, pointer, flag, number, number, pointer, number, flag, pointer, pointer)
    for function in (loaded.products, loaded.scatter, loaded.positions):
        function.restype = None
    return loaded


def _built() -> Path:
    """The library's file. Raises OSError without a compiler, SubprocessError if it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    identity = "\n".join([SOURCE.read_text(encoding="utf-8"), version, " ".join(FLAGS), _cpu()])
    path = _cache_folder() / f"lookups_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        say("compiling the CPU lookups (once, some seconds)")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
            os.replace(built, path)  # whole or not at all, whoever else is building it
    return path


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return "\n".join([platform.machine(), platform.processor(), *[x for x in lines if x.startswith("flags")][:1]])


def _cache_folder() -> Path:
    """A folder for the library: the user's cache, or a temporary one if that cannot be written."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "expansive-supervision"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a home that is read-only, not there or unknown
        pass
    return Path(tempfile.mkdtemp(prefix="expansive-supervision-"))


# --- calling ---------------------------------------------------------------------------------------------------------
@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="lookups")


def _together(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls that do not touch each other's results, in as many threads as torch uses."""
    if len(calls) == 1 or torch.get_num_threads() == 1:
        for call in calls:
            call()
    else:
        list(_pool(torch.get_num_threads()).map(lambda call: call(), calls))


def _parts(first: int, last: int) -> list[tuple[int, int]]:
    """first..last - 1 in as many parts as there are threads, one if they are few."""
    n_parts = 1 if last - first <= _ALONE else torch.get_num_threads()
    size = max(-(-(last - first) // n_parts), 1)
    return [(start, min(start + size, last)) for start in range(first, last, size)]


class _Call:
    """One field's factors as the library wants them.

    axes: for each group the axes of each of its tables; factors: [1, C, H, W], channels-last, in that order;
    gradients: of the same shapes, to add to, or None.
    """

    def __init__(self, axes, factors: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.groups = (_Group * len(axes))()
        self.width, number = 0, 0
        for group, tables in zip(self.groups, axes, strict=True):
            for table, table_axes in zip(group.tables, tables, strict=False):
                factor = factors[number]
                table.values = factor.data_ptr()
                table.gradient = gradients[number].data_ptr() if gradients else None
                table.axes[:] = (*table_axes, -1)[:2]
                table.sizes[:] = (factor.shape[3], factor.shape[2]) if len(table_axes) == 2 else (factor.shape[2], 1)
                number += 1
            group.channels, group.offset = factor.shape[1], self.width
            self.width += factor.shape[1]

    def products(self, xyz: Tensor, summed: bool) -> Tensor:
        """[K, width], or [K] summed."""
        out = xyz.new_zeros(len(xyz)) if summed else xyz.new_empty(len(xyz), self.width)
        width, run = (1 if summed else self.width), library().products
        arguments = (xyz.data_ptr(), ctypes.addressof(self.groups), len(self.groups))
        _together(
            [
                functools.partial(run, *arguments, first, last, out.data_ptr(), width, summed)
                for first, last in _parts(0, len(xyz))
            ]
        )
        return out

    def scatter(self, xyz: Tensor, upstream: Tensor, summed: bool) -> None:
        """Add d loss / d factors, from d loss / d products."""
        width, run, calls = (1 if summed else self.width), library().scatter, []
        for group in self.groups:
            block = -(-group.channels // torch.get_num_threads() // _BLOCK) * _BLOCK
            for begin in range(0, group.channels, max(block, _BLOCK)):
                end = min(begin + max(block, _BLOCK), group.channels)
                arguments = (xyz.data_ptr(), len(xyz), ctypes.addressof(group), begin, end)
                calls.append(functools.partial(run, *arguments, upstream.data_ptr(), width, summed))
        _together(calls)

    def positions(self, xyz: Tensor, upstream: Tensor, summed: bool) -> Tensor:
        """d loss / d xyz [K, 3]."""
        gradient, parts = torch.zeros_like(xyz), _parts(0, len(xyz))
        scratch = xyz.new_empty(len(parts), 3 * max(group.channels for group in self.groups))
        width, run = (1 if summed else self.width), library().positions
        arguments = (xyz.data_ptr(), ctypes.addressof(self.groups), len(self.groups))
        ends = (upstream.data_ptr(), width, summed)
        _together(
            [
                functools.partial(run, *arguments, first, last, *ends, own.data_ptr(), gradient.data_ptr())
                for (first, last), own in zip(parts, scratch, strict=True)
            ]
        )
        return gradient


class _Products(torch.autograd.Function):
    """Products of lookups, summed to [K], or times the basis [F, width] to [K, F]; see gather_lookups._Products."""

    @staticmethod
    def forward(ctx, xyz: Tensor, axes, basis: Tensor | None, *factors: Tensor) -> Tensor:
        factors = [factor.contiguous(memory_format=torch.channels_last) for factor in factors]
        xyz = xyz.contiguous()
        ctx.save_for_backward(xyz, basis, *factors)
        ctx.axes = axes
        call = _Call(axes, factors, None)
        if basis is None:
            return call.products(xyz, summed=True)
        return torch.cat([call.products(points, summed=False) @ basis.T for points in xyz.split(_CHUNK)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        xyz, basis, *factors = ctx.saved_tensors
        gradients = [torch.zeros_like(factor, memory_format=torch.channels_last) for factor in factors]
        call, summed = _Call(ctx.axes, factors, gradients), basis is None
        basis_grad, position_grads = None if summed else torch.zeros_like(basis), []
        grad = grad.contiguous()
        size = max(len(xyz), 1) if summed else _CHUNK
        for points, upstream in zip(xyz.split(size), grad.split(size), strict=True):
            if not summed:
                basis_grad.addmm_(upstream.T, call.products(points, summed=False))
                upstream = upstream @ basis
            call.scatter(points, upstream, summed)
            if ctx.needs_input_grad[0]:
                position_grads.append(call.positions(points, upstream, summed))
        return torch.cat(position_grads) if position_grads else None, None, basis_grad, *gradients


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
    return _Products.apply(xyz, axes, None, *factors)


def vm_appearance(planes: list[Tensor], lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.vm_appearance."""
    axes, factors = _vm_order(planes, lines)
    if not _serves(xyz, [basis, *factors]):
        return gather_lookups.vm_appearance(planes, lines, basis, xyz)
    return _Products.apply(xyz, axes, basis, *factors)


def cp_density(lines: list[Tensor], xyz: Tensor) -> Tensor:
    """Density feature [K]; see torch_lookups.cp_density."""
    if not _serves(xyz, lines):
        return gather_lookups.cp_density(lines, xyz)
    return _Products.apply(xyz, _CP_AXES, None, *lines)


def cp_appearance(lines: list[Tensor], basis: Tensor, xyz: Tensor) -> Tensor:
    """Appearance features [K, F]; see torch_lookups.cp_appearance."""
    if not _serves(xyz, [basis, *lines]):
        return gather_lookups.cp_appearance(lines, basis, xyz)
    return _Products.apply(xyz, _CP_AXES, basis, *lines)
