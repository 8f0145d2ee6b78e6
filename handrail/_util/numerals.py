"""Numbers as text, as people write them: 0.00001, not 1e-05, which is e − 5 to a reader of mathematics."""

from __future__ import annotations

from decimal import Decimal

MAX_DIGITS = 400
"""Enough for every double. Beyond, as 1e-999999999 in JSON, the text would be as many zeros."""


class Written(float):
    """A float that keeps the text it was read from: 0.50 and 0.5 are one number, but two answers to some verifiers."""

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number


def positional(number: float | Decimal) -> str:
    """The number without an exponent: with the digits it was written with, or the fewest that tell a double.

    Raises OverflowError for more than MAX_DIGITS digits, ValueError for what is not finite.
    """
    if isinstance(number, int):
        return str(number)
    exact = number if isinstance(number, Decimal) else Decimal(getattr(number, "text", repr(number)))
    if not exact.is_finite():
        raise ValueError("not a finite number")
    if max(exact.adjusted(), -int(exact.as_tuple().exponent)) > MAX_DIGITS:
        raise OverflowError("too many digits")
    # A double knows nothing of how it was written: 36.0 may be a 36 whose column has an empty cell.
    return f"{exact:f}" if isinstance(number, Written | Decimal) else f"{exact:f}".removesuffix(".0")
