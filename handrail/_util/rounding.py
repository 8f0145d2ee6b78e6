"""Rounding of shares."""

from __future__ import annotations

from fractions import Fraction
from math import ceil


def round_up(share: float, count: int) -> int:
    """Round ``share`` · ``count`` up, with the share as it is written: 0.55 of 20 is 11.

    In floating point, 0.55 · 20 is a little more than 11, which would become 12.
    """
    return ceil(Fraction(repr(share)) * count)
