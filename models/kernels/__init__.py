"""The renderer's hot spots, each behind one name: lookups in the factors, marching, weights, compositing.

`torch_lookups` (grid_sample) and `torch_rendering` are the definition; `gather_lookups` is plain torch too and works on
every device; `compiled_*` is C++ for CPUs, where there is a compiler; `triton_*` is Triton for CUDA, where it is
installed. All lookups offer the same four functions, all renderings the same five; tests/test_kernels.py,
tests/test_compiled.py and tests/test_triton.py hold them together. A faster backend is two more such modules and a line
in `select`.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from components import regularisers
from models.kernels import (
    compiled_l1,
    compiled_lookups,
    compiled_rendering,
    foreach_l1,
    gather_lookups,
    torch_rendering,
)
from models.kernels.compiled import libraries
from utils.console import say


@dataclass(frozen=True)
class Kernels:
    """A backend. name: for results.json; lookups: vm_density, vm_appearance, cp_density, cp_appearance; rendering:
    march_box, march_ndc, count_in_mask, ray_weights, composite; weights_until_opaque: lookups and ray_weights in one
    where no gradient is asked for, if the backend has it; l1_norm: of lists of planes and lines, see
    components.regularisers; fixed_shapes: whether marching takes a capacity, see Field.render; network: the shading's
    network, if the backend has it."""

    name: str
    lookups: ModuleType
    rendering: ModuleType
    weights_until_opaque: Callable[..., Tensor] | None = None
    l1_norm: Callable[[list[Tensor], list[Tensor]], Tensor] = regularisers.l1_norm
    fixed_shapes: bool = False
    network: ModuleType | None = None


def select(device: torch.device) -> Kernels:
    """The best backend for `device`."""
    if device.type == "cpu" and libraries() is not None:
        fused = (compiled_lookups.weights_until_opaque, compiled_l1.l1_norm)
        return Kernels("cpu-compiled", compiled_lookups, compiled_rendering, *fused)
    if device.type == "cuda" and (modules := _triton()) is not None:
        fused = (modules[2].weights_until_opaque, foreach_l1.l1_norm)
        return Kernels("cuda-triton", *modules[:2], *fused, fixed_shapes=True, network=modules[3])
    return Kernels("torch-gather", gather_lookups, torch_rendering)


@functools.cache
def _triton() -> tuple[ModuleType, ...] | None:
    """(lookups, rendering, evaluation, network) in Triton; None, and one line that says why, where it is missing or
    cannot run.

    Triton needs a C compiler for its launchers and a GPU that it knows, which a first launch finds out.
    """
    try:
        importlib.import_module("triton")
        importlib.import_module("models.kernels.triton_common").launch_once()
    except Exception as error:  # triton.errors.TritonError is nothing more, and cannot be named without Triton
        reason = " ".join(str(error).split())[:200]
        say(f"Triton's kernels cannot be used ({reason}): torch's serve, more slowly and with more memory")
        return None
    from models.kernels import triton_evaluation, triton_lookups, triton_network, triton_rendering

    return triton_lookups, triton_rendering, triton_evaluation, triton_network
