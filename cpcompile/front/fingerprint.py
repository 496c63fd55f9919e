"""Fingerprints: 64 bits that depend on every element of a tensor and its place, or on a text. The same in every process."""

from __future__ import annotations

import hashlib

import torch

# The step and the first multiplier of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
MIX = 0x9E3779B97F4A7C15 - (1 << 64)
_SCRAMBLE = 0xBF58476D1CE4E5B9 - (1 << 64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # words of 8 bytes: what is mixed at once takes three times as much memory for a moment


def value_fingerprint(x: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar on the device of `x` that depends on every element and its place."""
    words = _words(x)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        places = torch.arange(start + 1, start + 1 + len(part), device=x.device, dtype=torch.int64)
        # Not linear in the values: a sum of products with the places is the same for 0 1 1 0 and 1 0 0 1.
        mixed = places.mul_(MIX).add_(part.to(torch.int64))
        mixed = mixed.bitwise_xor_(mixed >> 30).mul_(_SCRAMBLE)
        total += mixed.bitwise_xor_(mixed >> 27).sum()
    return total


def _words(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of `x` as a flat tensor of integers, of 8 bytes where that many bytes can be cut so."""
    flat = x.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    if flat.nbytes % 8:
        return flat.view(_INTEGERS[flat.element_size()])
    # A view of larger elements needs an aligned beginning. Which words there are must depend on the values alone.
    is_aligned = flat.storage_offset() * flat.element_size() % 8 == 0
    return (flat if is_aligned else flat.clone()).view(torch.int64)


def text_fingerprint(*texts: bytes) -> int:
    """Return a signed number of 64 bits that depends on every text and on where it ends."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little", signed=True)


def joined(fingerprints: list[torch.Tensor]) -> torch.Tensor:
    """Return one int64 scalar that depends on all fingerprints and their order."""
    return torch.stack(fingerprints).mul_(MIX).cumsum_(0).sum()
