"""The renderer's hot spots, each behind one name: lookups in the factors, marching, weights, compositing.

`torch_lookups` (grid_sample) and `torch_rendering` are the definition; `gather_lookups` is plain torch too and works on
every device; `compiled_*` is C++ for CPUs, where there is a compiler. All lookups offer the same four functions, all
renderings the same three; tests/test_kernels.py holds them together. A faster backend is two more such modules and a
line in `select`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from models.kernels import compiled_lookups, compiled_rendering, gather_lookups, torch_rendering
from models.kernels.compiled import libraries


@dataclass(frozen=True)
class Kernels:
    """A backend. name: for results.json; lookups: vm_density, vm_appearance, cp_density, cp_appearance; rendering:
    march_box, ray_weights, composite; weights_until_opaque: lookups and ray_weights in one where no gradient is asked
    for, if the backend has it."""

    name: str
    lookups: ModuleType
    rendering: ModuleType
    weights_until_opaque: Callable[..., Tensor] | None = None


def select(device: torch.device) -> Kernels:
    """The best backend for `device`."""
    if device.type == "cpu" and libraries() is not None:
        return Kernels("cpu-compiled", compiled_lookups, compiled_rendering, compiled_lookups.weights_until_opaque)
    return Kernels("torch-gather", gather_lookups, torch_rendering)
