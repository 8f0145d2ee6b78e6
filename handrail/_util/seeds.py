"""Randomness as a function of what it is for, so that nothing about it has to be saved to resume exactly."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part, in order."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
