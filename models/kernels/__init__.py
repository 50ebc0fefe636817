"""Factor lookups, the field's hot spot, behind one name each.

`torch_lookups` (grid_sample) is the definition; `gather_lookups` is plain torch too and works on every device;
`compiled_lookups` is C++ for CPUs, where there is a compiler. All offer the same four functions;
tests/test_kernels.py holds them together. A faster backend is one more such module and a line in `select`.
"""

from types import ModuleType

import torch

from models.kernels import compiled_lookups, gather_lookups


def select(device: torch.device) -> tuple[str, ModuleType]:
    """(name for results.json, module with the lookups) of the best backend for `device`."""
    if device.type == "cpu" and compiled_lookups.library() is not None:
        return "cpu-compiled", compiled_lookups
    return "torch-gather", gather_lookups
