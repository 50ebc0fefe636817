"""What a loaded checkpoint may consist of. torch reads much more, of which some lets a small file fill the memory."""

import math
from typing import Any

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


def check_like(expected: Any, found: Any, where: str) -> None:
    """Raise ValueError, naming the place, unless `found` is of the same make as `expected`: tensors of the same shape
    and type, finite numbers for numbers, lists of the same length, and whatever keys the dictionaries of `expected`
    have."""
    if isinstance(expected, dict):
        _demand(isinstance(found, dict), where)
        for key, value in expected.items():
            _demand(key in found, f"{where}/{key}")
            check_like(value, found[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        _demand(isinstance(found, (list, tuple)) and len(found) == len(expected), where)
        for number, (value, other) in enumerate(zip(expected, found, strict=True)):
            check_like(value, other, f"{where}/{number}")
    elif isinstance(expected, Tensor):
        _demand(isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype, where)
        _demand(not found.is_floating_point() or bool(found.isfinite().all()), where)
    elif isinstance(expected, float):
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        _demand(number and math.isfinite(found), where)
    else:
        _demand(type(found) is type(expected), where)


def _demand(good: bool, where: str) -> None:
    if not good:
        raise ValueError(f"{where} is of another kind")
