"""A keyed pseudo-random permutation of 0..n-1 that needs no table.

Letters: n size of the set, (a, b) sides of a rectangle a*b >= n with a, b close to sqrt(n), x an index.

A Feistel network over Z_a x Z_b (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5) permutes
0..a*b-1; walking along its cycles until the image is below n makes it a permutation of 0..n-1.
"""

import math

import torch
from torch import Tensor

_ROUNDS = 6
_MASK = 0xFFFFFFFF
# At most 2*sqrt(n) of the a*b values lie outside, so a walk longer than this has probability < 1e-16 for n >= 2^16.
_WALKS = 8
_SMALL = 1 << 16


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash of int64 values (the finaliser of MurmurHash3); products wrap, the low 32 bits are exact."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _feistel(x: Tensor, key: Tensor, a: int, b: int) -> Tensor:
    """One pass of the network over x in 0..a*b-1; sides change roles each round."""
    left, right = x // b, x % b
    for number in range(_ROUNDS):
        mixed = _mix(_mix(right + key) ^ (key >> 32) ^ (0x9E3779B9 * (number + 1)))
        # The round's output is added modulo the side it lands on; even rounds change a's side, odd ones b's.
        left, right = right, (left + mixed) % (a if number % 2 == 0 else b)
    return left * b + right


def permute(x: Tensor, key: Tensor, n: int) -> Tensor:
    """The image of x [B] int64 in 0..n-1 under the permutation of 0..n-1 that `key` ([B] int64, >= 0) names."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    # No walk is longer than there are values outside: none at all where n is a square, as of square images.
    walks = min(_WALKS, a * b - n) if n >= _SMALL else a * b - n
    y = _feistel(x, key, a, b)
    # Asking whether all have arrived would make the host wait for a GPU; a small set may need a long walk, though.
    ask = n < _SMALL or x.device.type == "cpu"
    for _ in range(walks):
        outside = y >= n
        if ask and not bool(outside.any()):
            break
        y = torch.where(outside, _feistel(y, key, a, b), y)
    return y.clamp_max(n - 1)
