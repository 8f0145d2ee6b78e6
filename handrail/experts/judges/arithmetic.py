"""Arithmetic step judge: a step is wrong if it contains a false equality, suspect if a number has no
origin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from handrail.experts.judges import Scores
from handrail.experts.judges.expressions import CLAUSE, Reader, Style, Unreadable, Value
from handrail.experts.judges.math_text import NOTHING, Token, measure, tokenize
from handrail.experts.judges.provenance import NOTE, find_unfounded
from handrail.types.problem import Problem

MAX_LENGTH, MAX_TOKENS = 10_000, 60
STRICT, MEASURED = Style(), Style(measured=True)
OTHERWISE = (Style(percent=Fraction(1)), Style(relative=True), Style(fractions=True))
OTHER_ARITHMETIC = re.compile(
    r"\b(?:in|to|from) bases?\b|\bbase-[0-9]|\\[pb]?mod\b|\bmod(?:ulo)?\b", re.IGNORECASE
)
ABOUT = {"about", "approximately", "around", "roughly", "nearly", "almost"}
# An expression right after one of these is only part of the calculation: twice 5 + 3, half of 4 + 6, 5 more
# than 3 * 2.
SCALING = {
    "half", "third", "quarter", "fourth", "fifth", "sixth", "tenth", "twice", "thrice", "double",
    "triple", "than", "by", "minus", "plus", "times", "root", "square", "cube",
}  # fmt: skip
# These connect an expression with a preceding number: 24 eggs in 1 tray * 2.
JOINING = {"in", "per", "at", "from", "to", "with", "on"}


class ArithmeticJudge:
    """Check what can be checked without understanding the problem; never guess.

    A step scores 0 if an equality in it is false, .25 if a number in it has no origin (rule disabled by
    ``origins=False``), 1 if all its reliably parsed equalities hold, None if there are none.
    """

    def __init__(self, origins: bool = True) -> None:
        self.origins = origins

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        return [self._scores(problem, steps) for problem, steps in attempts]

    def _scores(self, problem: Problem, steps: list[str]) -> Scores:
        scores = [score(step) for step in steps]
        if not self.origins or any(len(step) > MAX_LENGTH for step in steps):
            return scores
        return [
            0.25 if suspect and known != 0 else known
            for known, suspect in zip(scores, find_unfounded(problem, steps), strict=True)
        ]


def score(step: str) -> float | None:
    """Score a step: 0 if any equality is false, else 1 if any holds, else None."""
    found = [] if len(step) > MAX_LENGTH or OTHER_ARITHMETIC.search(step) else list(equalities(step))
    return 0.0 if False in found else 1.0 if True in found else None


def equalities(text: str) -> Iterator[bool | None]:
    """For every equality in a text, yield True if it holds; None if it cannot be parsed reliably.

    In a chain, each equals sign compares its neighbors. People also write chains the way they press the keys
    of a calculator, ``3 + 4 = 7 * 2 = 14``, so a pair is false only if no truncation of its right side at an
    operator makes it true either.
    """
    notes = NOTE.findall(text)
    for part in (*notes, NOTE.sub(" ", text) if notes else text):
        tokens = tokenize(part)
        ends = [index for index, token in enumerate(tokens) if token.kind in ("equals", "about", "stop")]
        for before, here, after in zip([-1, *ends], ends, [*ends[1:], len(tokens)], strict=False):
            if tokens[here].kind != "stop":
                yield _holds(tokens, before + 1, here, after)


@dataclass(frozen=True)
class Side:
    """One side of an equality.

    ``strict``: its value; None if only beginnings of it can be parsed. ``running``: the values of the
    beginnings that end before an operator. ``doubtful``: True if it may be meant differently. ``named``: True
    if it contains words; a lone number among words may only name a quantity. ``listed``: True if its minus
    may be a list marker.
    """

    tokens: Sequence[Token]
    begin: int
    end: int
    strict: Value | None
    running: tuple[Value, ...] = ()
    doubtful: bool = False
    named: bool = False
    listed: bool = False

    def read(self, style: Style, begin: int | None = None) -> Value | None:
        try:
            return Reader(self.tokens, self.begin if begin is None else begin, self.end, style).read()
        except Unreadable:
            return None

    def readings(self, running: bool = True) -> Iterator[Value]:
        """Yield every value that the side may have, ignoring units."""
        yield from self.running if running else ()
        for style in (STRICT, *OTHERWISE):
            if value := self.read(style):
                yield value
        if self.listed and (value := self.read(STRICT, self.begin + 1)):
            yield value


def _holds(tokens: Sequence[Token], start: int, equals: int, end: int) -> bool | None:
    about, first = tokens[equals].kind == "about", equals + 1
    if first < end and tokens[first].text in ABOUT:
        about, first = True, first + 1
    left, right = _ending(tokens, start, equals), _beginning(tokens, first, end)
    if left is None or right is None or left.strict is None:
        return None
    if right.strict and _equal(left.strict, right.strict, about):
        return True
    in_chain = start > 0 and tokens[start - 1].kind != "stop"
    named = _lone(left) and (left.named or not in_chain)
    if any(_equal(a, b, about) for a in left.readings() for b in right.readings(running=not named)):
        return True
    a, b = left.read(MEASURED), right.read(MEASURED)
    if a and b and a.measured and b.measured and _equal(a, b, about):
        return True
    if right.strict is None or left.doubtful or right.doubtful or named:
        return None
    if right.named and left.strict.digit is not None:
        return None
    span = tokens[left.begin : right.end]
    pairs = ((left.read(style), right.read(style)) for style in (STRICT, *OTHERWISE))
    if _other_units(left.strict, right.strict, span) or any(
        a and b and _near(a, b, about, span) for a, b in pairs
    ):
        return None
    return False


def _lone(side: Side) -> bool:
    """True for a number or a proper fraction, such as 1/2, followed only by words."""
    if side.strict is None or side.strict.digit is not None:
        return True
    share = (
        side.end - side.begin > 3 and side.tokens[side.begin + 1].text == "/" and 0 < side.strict.number < 1
    )
    return share and all(token.kind == "word" for token in side.tokens[side.begin + 3 : side.end])


def _beginning(tokens: Sequence[Token], start: int, end: int) -> Side | None:
    """Parse the side that begins at ``start``."""
    limit = min(end, start + MAX_TOKENS)
    reader = Reader(tokens, start, limit, STRICT)
    try:
        value = reader.read()
    except Unreadable:
        return Side(tokens, start, limit, None, tuple(reader.cuts)) if reader.cuts else None
    doubtful = (
        reader.doubtful
        or reader.at == limit < end
        or _goes_on(tokens[start : reader.at], tokens[reader.at : limit], value)
    )
    named = any(token.kind == "word" for token in tokens[start:limit])
    return Side(tokens, start, reader.at, value, tuple(reader.cuts), doubtful, named)


def _goes_on(read: Sequence[Token], rest: Sequence[Token], value: Value) -> bool:
    """True if the text after an expression may change its meaning: 1 hour and 30 minutes, 1/2 of the cake, 5
    to 6."""
    if not rest:
        return False
    if rest[0].text == "of":
        return value.part and not value.percent
    if rest[0].text in ("and", "to"):
        following = rest[1] if len(rest) > 1 else NOTHING
        return following.kind == "number" or following.text in ("a", "half")
    if rest[0].kind in ("number", "open") and read[-1].kind == "word":
        return read[-2].kind != "word" and measure(read[-1].text) is not None
    if rest[0].kind == "unknown" and read[-1].kind == "word":
        return read[-1].text in SCALING
    return rest[0].kind not in ("word", "close")


def _ending(tokens: Sequence[Token], start: int, end: int) -> Side | None:
    """Parse the side that ends at ``end``: the longest text before it that can be parsed as one
    expression."""
    for begin in range(max(start, end - MAX_TOKENS), end):
        first = tokens[begin]
        if first.kind not in ("number", "open", "frac", "sqrt") and first.text not in ("-", "half"):
            continue
        reader = Reader(tokens, begin, end, STRICT)
        try:
            value = reader.read()
        except Unreadable:
            continue
        if reader.at == end:
            named = begin > start or any(token.kind == "word" for token in tokens[begin:end])
            listed = begin == start and first.text == "-" and not tokens[begin + 1].tight
            doubtful = reader.doubtful or _continues(tokens, start, begin)
            return Side(tokens, begin, end, value, (), doubtful, named, listed)
    return None


def _continues(tokens: Sequence[Token], start: int, begin: int) -> bool:
    """True if an expression that begins at ``begin`` may belong to the text before it."""
    while begin > start and tokens[begin - 1].kind == "open":
        begin -= 1
        if begin > start and tokens[begin].tight:
            return True  # f(3 + 4
    if begin == start:
        return False
    before, first = tokens[begin - 1], tokens[begin]
    if (
        before.kind != "word"
        or before.text in SCALING
        or first.text == "-"
        or (first.kind == "open" and first.tight)
    ):
        return True
    if before.text == "of" and (
        begin - 2 < start or tokens[begin - 2].kind != "word" or tokens[begin - 2].text.rstrip("s") in SCALING
    ):
        return True
    back = begin - 1
    while back >= start and tokens[back].kind == "word":
        back -= 1
    words = [token.text for token in tokens[back + 1 : begin] if token.text != "and"]
    if back < start or (back == start and tokens[back].kind == "operator") or CLAUSE.intersection(words):
        return False
    if tokens[back].kind not in ("number", "close", "percent", "open") or (
        back > start and tokens[back - 1].kind == "operator"
    ):
        return True  # 5 + 4 apples with the 3 + 2 pears
    if not words:  # 5 and 3/4, but not 3 + 4 = 7 and 7 * 2
        return back > start or start == 0 or tokens[start - 1].kind == "stop"
    if len(words) == 1:  # 3 hours and 30 minutes
        return measure(words[0]) is not None
    return words[-1] in JOINING or (words[-1] == "of" and len(words) == 2)


def _equal(a: Value, b: Value, about: bool) -> bool:
    """True if two values are equal up to rounding: of written decimals or, after ≈, of any digits."""
    gap = abs(a.number - b.number)
    allowed = max(_written(value, about) / 2 if value.decimals or about else Fraction(0) for value in (a, b))
    return gap <= allowed or (not _whole(a, b) and gap * 10**9 <= max(abs(a.number), abs(b.number)))


def _near(a: Value, b: Value, about: bool, tokens: Sequence[Token]) -> bool:
    """True if two values that differ could be meant as equal.

    Their decimals may have been rounded earlier. If the expression multiplies or divides, such rounding
    matters more, and a whole number may be truncated or rounded up.
    """
    gap, sizes = abs(a.number - b.number), sorted((abs(a.number), abs(b.number)))
    if any(token.text in "*/÷^" or token.kind in ("frac", "open") for token in tokens):
        rounded = gap < max(_written(a, False), _written(b, False)) or (
            gap * 1000 <= sizes[1] and not _whole(a, b)
        )
    else:
        rounded = gap <= max(
            _written(a, False) / 2,
            _written(b, False) / 2,
            sum(token.digit / 2 for token in tokens if token.digit < 1),
        )
    return rounded or (about and gap * 10 <= sizes[1])


def _other_units(a: Value, b: Value, tokens: Sequence[Token]) -> bool:
    """True if the values differ by a power of ten, as grams and kilograms do: at least 1000, or 100 for
    money."""
    small, large = sorted((abs(a.number), abs(b.number)))
    least = 2 if any(token.money for token in tokens) else 3
    return any(large == small * 10**power for power in range(least, 31))


def _whole(a: Value, b: Value) -> bool:
    return a.number.denominator == b.number.denominator == 1


def _written(value: Value, about: bool) -> Fraction:
    """Place value of the last written digit; after ≈, of the last nonzero digit."""
    if value.digit is None or not about or value.number.denominator > 1 or not value.number:
        return value.digit or Fraction(0)
    digits = str(abs(value.number.numerator))
    return Fraction(10 ** (len(digits) - len(digits.rstrip("0"))))
