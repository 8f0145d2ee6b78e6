"""Numbers as text, the way people write them: 0.00001, not 1e-05, which is e − 5 to a reader of mathematics."""

from __future__ import annotations

from decimal import Decimal

MAX_DIGITS = 400
"""Every double fits. What is larger or smaller, as 1e-999999999 in JSON, would be a text of that many zeros."""


class Written(float):
    """A float that keeps the text it was read from: 0.50 and 0.5 are one number, but not one answer to every verifier."""

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number


def positional(number: float | Decimal) -> str:
    """The number without an exponent: a Written one with the digits it was written with, a double with the fewest that name it.

    Raises OverflowError for more than MAX_DIGITS digits, ValueError for what is not finite.
    """
    if isinstance(number, int):
        return str(number)
    exact = Decimal(number.text if isinstance(number, Written) else repr(number)) if isinstance(number, float) else number
    if not exact.is_finite():
        raise ValueError("not a finite number")
    if max(exact.adjusted(), -int(exact.as_tuple().exponent)) > MAX_DIGITS:
        raise OverflowError("too many digits")
    # A double knows nothing of how it was written: 36.0 may be a 36 whose column has an empty cell.
    return f"{exact:f}" if isinstance(number, Written | Decimal) else f"{exact:f}".removesuffix(".0")
