"""What a loaded checkpoint may consist of. torch reads much more, of which some lets a small file fill the memory."""

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH, MAX_PARTS, MAX_INT = 30, 1_000_000, 2**63


def fault_of_parts(state: object) -> str | None:
    """What in `state` is none of: dictionaries with text or whole numbers as keys, lists and tuples of bounded depth;
    plain tensors that show no more elements than they store; arrays of bytes; plain values. None if all is."""
    level, seen = [state], set()
    for _ in range(MAX_DEPTH):
        following = []
        for part in level:
            fault = _fault_of(part)
            if fault:
                return fault
            # One that is there twice, or holds itself, is looked at once.
            if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
                seen.add(id(part))
                following += part.values() if isinstance(part, dict) else part
        if len(seen) + len(following) > MAX_PARTS:
            return "too many parts"
        level = following
        if not level:
            return None
    return "nested too deeply"


def _fault_of(part: object) -> str | None:
    if isinstance(part, Tensor):
        return _fault_of_tensor(part)
    if isinstance(part, np.ndarray):
        return None if part.dtype == np.uint8 else f"an array of {part.dtype}"
    if isinstance(part, dict):
        wrong = next((key for key in part if not isinstance(key, (str, int))), None)
        return None if wrong is None else f"a key of type {type(wrong).__name__}"
    if isinstance(part, int):
        return None if -MAX_INT < part < MAX_INT else "a whole number of more than 64 bits"
    plain = part is None or isinstance(part, (float, str, bytes, list, tuple))
    return None if plain else f"a {type(part).__name__}"


def _fault_of_tensor(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return "a tensor that is not plain"
    if tensor.device.type == "meta" or tensor.is_complex():
        return "a tensor without real values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a tensor that shows more than it stores"
    return None
