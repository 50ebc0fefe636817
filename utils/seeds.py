"""Named random generators: every consumer of randomness owns one, made from (seed, name)."""

import hashlib

import torch


def seed_for(seed: int, name: str) -> int:
    """A 63-bit seed that depends on `seed` and on the consumer's `name`, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` of its own stream; two names never share one, the global state stays untouched."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, name))
