"""Exact evaluation of arithmetic expressions, with limits on depth, exponents and the size of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from handrail.experts.judges.math_text import NOTHING, Token, measure

MAX_BITS, MAX_DEPTH, MAX_EXPONENT, MAX_UNIT_WORDS = 1 << 14, 20, 64, 6

CLAUSE = {
    "so", "then", "is", "are", "was", "were", "be", "because", "which", "that", "therefore", "thus",
    "hence", "since", "while", "but", "if", "when", "means", "gives", "makes", "let",
}  # fmt: skip
NO_UNIT = CLAUSE | {"and", "or", "of", "to", "than"}


class Unreadable(ValueError):
    """The text is not arithmetic that can be evaluated."""


@dataclass(frozen=True)
class Value:
    """Value of an expression.

    ``digit``: the place value of the last digit of a literal number; None for a calculated value.
    ``decimals``: True if it is written with decimals. ``part``: True if it can be a share of something, as in
    1/2 of. ``tens``: True if it is a power of ten. ``measured``: True if a unit of known size has scaled it.
    """

    number: Fraction
    digit: Fraction | None = None
    decimals: bool = False
    percent: bool = False
    part: bool = False
    tens: bool = False
    measured: bool = False

    def times(self, scale: Fraction) -> Value:
        return replace(self, number=self.number * scale, digit=self.digit and self.digit * abs(scale))


@dataclass(frozen=True)
class Style:
    """A way to interpret expressions.

    ``percent``: value of one percent. ``relative``: True if ``+ 10%`` means 10% of the number that it is
    added to. ``fractions``: True if ``1/3`` is one number in ``12 ÷ 1/3``. ``measured``: True if units scale
    the numbers.
    """

    percent: Fraction = Fraction(1, 100)
    relative: bool = False
    fractions: bool = False
    measured: bool = False


class Reader:
    """Parser that evaluates the longest expression that begins at ``start``; afterwards ``at`` is its end.

    ``cuts``: its values up to each of its operators. ``doubtful``: True if it may be meant differently.
    """

    def __init__(self, tokens: Sequence[Token], start: int, end: int, style: Style) -> None:
        self.tokens, self.at, self.end, self.style = tokens, start, end, style
        self.cuts: list[Value] = []
        self.doubtful = False

    def read(self) -> Value:
        """Evaluate the expression. Raises Unreadable."""
        return self._sum(0)

    def _peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < self.end else NOTHING

    def _sum(self, depth: int) -> Value:
        total = self._product(depth, Fraction(0), 1)
        while self._peek().kind == "operator" and self._peek().text in "+-":
            sign = 1 if self._peek().text == "+" else -1
            self._cut(depth, total)
            self.at += 1
            term = self._product(depth, total.number, sign)
            share = total.number if self.style.relative and term.percent and not total.percent else 1
            number = _bounded(total.number + sign * term.number * share)
            total = Value(
                number, percent=total.percent and term.percent, measured=total.measured or term.measured
            )
        return total

    def _product(self, depth: int, before: Fraction, sign: int) -> Value:
        """Evaluate a product, which is added to ``before`` with ``sign``."""
        total = self._signed(depth)
        while True:
            token, adjacent = self._peek(), self.tokens[self.at - 1].kind in ("number", "close", "percent")
            cut = Value(before + sign * total.number) if before else total
            if token.kind == "operator" and token.text in "*/÷":
                self._cut(depth, cut)
                self.at += 1
                factor = self._signed(depth)
                if token.text == "*":
                    written = total.digit is not None and factor.tens
                    digit, decimals = (total.digit, total.decimals) if written else (None, False)
                    total = Value(
                        total.number, digit, decimals, measured=total.measured or factor.measured
                    ).times(factor.number)
                elif factor.number:
                    total = Value(
                        total.number / factor.number, part=True, measured=total.measured or factor.measured
                    )
                else:
                    raise Unreadable
            elif token.kind in ("open", "frac", "sqrt") and adjacent:
                self.doubtful |= total.part or not token.tight or token.kind != "open"
                self._cut(depth, cut)
                total = Value(total.number * self._signed(depth).number)
            elif token.text == "of" and adjacent and total.part and (ahead := self._amount()):
                self._cut(depth, cut)
                self.at += ahead
                total = Value(total.number * self._signed(depth).number)
                self.doubtful |= self._peek().text in ("+", "-")  # 10% of 400 + 1580
            else:
                return total
            _bounded(total.number)

    def _amount(self) -> int:
        """Number of tokens before the number in ``of 20`` or ``of the 20``; 0 if there is no number."""
        ahead = 2 if self._peek(1).kind == "word" else 1
        return ahead if self._peek(ahead).kind in ("number", "open", "frac") else 0

    def _cut(self, depth: int, value: Value) -> None:
        if not depth:
            self.cuts.append(value)

    def _signed(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise Unreadable
        token = self._peek()
        if token.text == "-":
            self.at += 1
            return self._signed(depth + 1).times(Fraction(-1))
        value = self._operand(depth)
        if self._peek().text == "^":
            self.at += 1
            value = Value(_power(value.number, self._exponent(depth + 1)), tens=value.number == 10)
        return self._with_unit(value, token.money)

    def _exponent(self, depth: int) -> Fraction:
        sign = -1 if self._peek().text == "-" else 1
        self.at += sign < 0
        exponent = self._operand(depth).number
        if self._peek().text == "^":
            self.at += 1
            exponent = _power(exponent, self._exponent(depth + 1))
        return sign * exponent

    def _operand(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise Unreadable
        token, start = self._peek(), self.at
        if token.kind == "open":
            value = self._group(depth)
        else:
            self.at += 1
            if token.kind == "number":
                value = self._number(token)
            elif token.kind == "frac":
                above, below = self._group(depth), self._group(depth)
                if not below.number:
                    raise Unreadable
                self.doubtful |= any(inner.kind == "word" for inner in self.tokens[start : self.at])
                value = Value(above.number / below.number, part=True)
            elif token.kind == "sqrt":
                value = Value(_root(self._operand(depth + 1).number))
            elif token.text == "half" and self._peek().text in ("*", "of"):
                return Value(Fraction(1, 2), part=True)
            else:
                raise Unreadable
        if self._peek().kind == "percent":
            self.at += 1
            if self._peek().kind == "number":  # 17 % 5
                raise Unreadable
            value = replace(value.times(self.style.percent), percent=True, part=True)
        return value

    def _number(self, token: Token) -> Value:
        """Evaluate a number as written, including 2 1/2 and 2½."""
        whole, next_, slash, below = token.value, self._peek(), self._peek(1), self._peek(2)
        if next_.kind == "number" and not next_.digit and token.digit == 1:
            self.at += 1
            return Value(whole + next_.value)
        fraction = next_.kind == below.kind == "number" and slash.text == "/" and slash.tight and below.tight
        if fraction and next_.value < below.value and token.digit == next_.digit == below.digit == 1:
            self.at += 3
            return Value(whole + next_.value / below.value)
        divided = self.at > 1 and self.tokens[self.at - 2].text in ("/", "÷")
        if self.style.fractions and divided and next_.text == "/" and slash.kind == "number" and slash.value:
            self.at += 2
            return Value(whole / slash.value, part=True)
        return Value(whole, token.digit, 0 < token.digit < 1, part=whole < 1)

    def _group(self, depth: int) -> Value:
        if self._peek().kind != "open":
            raise Unreadable
        self.at += 1
        value = self._sum(depth + 1)
        if self._peek().kind != "close":
            raise Unreadable
        self.at += 1
        return value

    def _with_unit(self, value: Value, money: str) -> Value:
        """Skip the words after a number; if the style says so, scale it by units of known size among them."""
        units, words = [money] if money else [], 0
        while True:
            token, following = self._peek(), self._peek(1)
            if (
                token.kind == "word"
                and words < MAX_UNIT_WORDS
                and (token.text not in NO_UNIT or self._names_more(words))
            ):
                units += re.split("(/)", token.text)
                words += 1
            elif token.text == "/" and following.kind == "word":
                units.append("/")
            elif token.text == "^" and words:
                self.at += 1
                self._exponent(0)
                continue
            elif token.kind == "open" and not token.tight and (length := self._remark()):
                self.at += length
            else:
                break
            self.at += 1
        # A lone letter may also be a variable.
        self.doubtful |= any(
            len(unit) == 1 and unit.isalpha() and measure(unit) is not None for unit in units
        )
        if not self.style.measured:
            return value
        return replace(value.times(_size(units)), measured=any(measure(unit) for unit in units))

    def _names_more(self, words: int) -> bool:
        """True at the ``of`` in 5 pairs of socks."""
        return words > 0 and self._peek().text == "of" and self._peek(1).kind == "word"

    def _remark(self) -> int:
        """Number of tokens before the end of a parenthesis that contains only words; 0 if this is not one."""
        for ahead in range(1, 10):
            if self._peek(ahead).kind != "word":
                return ahead if self._peek(ahead).kind == "close" else 0
        return 0


def _size(units: Sequence[str]) -> Fraction:
    """Scale of 6 pounds/week or $5 per hour: the first unit of known size in the numerator over the
    denominator's."""
    size, sign, counted = Fraction(1), 1, False
    for unit in units:
        if unit in ("/", "per", "a", "each", "every"):
            sign, counted = -1, False
        elif not counted and (known := measure(unit)):
            size, counted = size * known**sign, True
    return size


def _bounded(number: Fraction) -> Fraction:
    if number.numerator.bit_length() + number.denominator.bit_length() > MAX_BITS:
        raise Unreadable
    return number


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = base.numerator.bit_length() + base.denominator.bit_length()
    if (
        exponent.denominator > 1
        or abs(exponent) > MAX_EXPONENT
        or size * abs(exponent) > MAX_BITS
        or (exponent < 0 and not base)
    ):
        raise Unreadable
    return base ** int(exponent)


def _root(number: Fraction) -> Fraction:
    if number < 0:
        raise Unreadable
    root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
    if root * root != number:
        raise Unreadable
    return root
