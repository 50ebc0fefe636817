"""Factor lookups, the field's hot spot, behind one name each.

`torch_lookups` (grid_sample) is the definition; `gather_lookups` is what trains. Both are plain torch, work on every
device and offer the same four functions; tests/test_kernels.py holds them together. A faster backend is one more
such module and a line in `select`.
"""

from types import ModuleType

import torch

from models.kernels import gather_lookups


def select(device: torch.device) -> tuple[str, ModuleType]:
    """(name for results.json, module with the lookups) of the best backend for `device`."""
    return "torch-gather", gather_lookups
