"""Numbers as text without an exponent: 0.00001, not 1e-05, which a math verifier would read as e − 5."""

from __future__ import annotations

import sys
from decimal import Decimal

TOO_MANY_DIGITS = f"it holds a whole number of more than {sys.get_int_max_str_digits()} digits"
"""Why Python refuses to read a JSON or TOML text that is correct."""
MAX_DIGITS = 400
"""Enough for every double. Larger exponents, such as 1e-999999999 in JSON, would become that many zeros."""


class FloatLiteral(float):
    """A float with the text it was read from: 0.50 and 0.5 are equal, but not to every verifier."""

    text: str

    def __new__(cls, text: str) -> FloatLiteral:
        number = super().__new__(cls, text)
        number.text = text
        return number


def positional(number: float | Decimal) -> str:
    """Write a number without an exponent.

    The digits are those of the source text if it is known, else the shortest that identify the double.
    Raises OverflowError for more than MAX_DIGITS digits and ValueError for NaN and infinities.
    """
    if isinstance(number, int):
        return str(number)
    exact = number if isinstance(number, Decimal) else Decimal(getattr(number, "text", repr(number)))
    if not exact.is_finite():
        raise ValueError("not a finite number")
    if max(exact.adjusted(), -int(exact.as_tuple().exponent)) > MAX_DIGITS:
        raise OverflowError("too many digits")
    # A plain float has lost its source text: 36.0 may be the integer 36 from a column with an empty cell.
    return f"{exact:f}" if isinstance(number, FloatLiteral | Decimal) else f"{exact:f}".removesuffix(".0")
