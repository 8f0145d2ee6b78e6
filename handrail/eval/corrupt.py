"""Wrong solutions to measure judges by: one number in one step changed to another."""

from __future__ import annotations

import random

from handrail.experts.planners import NUMBER

MAX_DIGITS = 30


def corrupt(steps: list[str], rng: random.Random) -> tuple[list[str], int] | None:
    """The steps with one of their numbers, any with equal chance, changed to a plausible other, and the index of its step.

    None where no step has a number.
    """
    places = [
        (index, match)
        for index, step in enumerate(steps)
        for match in NUMBER.finditer(step)
        if len(match[0]) <= MAX_DIGITS
    ]
    if not places:
        return None
    index, match = rng.choice(places)
    step = steps[index]
    wrong = step[: match.start()] + another(match[0], rng) + step[match.end() :]
    return [*steps[:index], wrong, *steps[index + 1 :]], index


def another(number: str, rng: random.Random) -> str:
    """A number of another value written in the same way: with as many decimals, with or without separators."""
    whole, _, decimals = number.replace(",", "").partition(".")
    digits = whole + decimals
    changes = [_shifted, _replaced, _swapped, _tenfold, _tenth]
    rng.shuffle(changes)
    found = (change(digits, rng) for change in (*changes, _shifted))
    other = next(other for other in found if other is not None and int(other) != int(digits)).zfill(
        len(decimals) + 1
    )
    places = len(other) - len(decimals)
    whole, decimals = str(int(other[:places])), other[places:]
    return (f"{int(whole):,}" if "," in number else whole) + ("." + decimals if decimals else "")


def _shifted(digits: str, rng: random.Random) -> str | None:
    """Off by one to three in the last place."""
    off = rng.choice([1, 2, 3]) * rng.choice([-1, 1])
    return str(int(digits) + (off if int(digits) + off >= 0 else -off))


def _replaced(digits: str, rng: random.Random) -> str | None:
    """One digit another."""
    place = rng.randrange(len(digits))
    return (
        digits[:place]
        + rng.choice([digit for digit in "123456789" if digit != digits[place]])
        + digits[place + 1 :]
    )


def _swapped(digits: str, rng: random.Random) -> str | None:
    """Two neighbouring digits the other way round, the first no 0 afterwards."""
    places = [
        place
        for place in range(len(digits) - 1)
        if digits[place] != digits[place + 1] and (place or digits[1] != "0")
    ]
    if not places:
        return None
    place = rng.choice(places)
    return digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]


def _tenfold(digits: str, rng: random.Random) -> str | None:
    return digits + "0"


def _tenth(digits: str, rng: random.Random) -> str | None:
    return digits[:-1] if len(digits) > 1 and digits.endswith("0") else None
