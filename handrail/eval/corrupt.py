"""Make wrong solutions for measuring judges: change one number in one step."""

from __future__ import annotations

import random

from handrail.experts.planners import NUMBER

MAX_DIGITS = 30


def corrupt(steps: list[str], rng: random.Random) -> tuple[list[str], int] | None:
    """Change one number in one step to a plausible other; return the steps and the index of the changed one.

    Every number is equally likely to change. Returns None if no step has a number.
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
    """Return another number in the same notation: with as many decimals, with or without separators."""
    whole, _, decimals = number.replace(",", "").partition(".")
    digits = whole + decimals
    changes = [_shift, _replace_digit, _swap_digits, _append_zero, _drop_zero]
    rng.shuffle(changes)
    found = (change(digits, rng) for change in (*changes, _shift))
    other = next(other for other in found if other is not None and int(other) != int(digits)).zfill(
        len(decimals) + 1
    )
    places = len(other) - len(decimals)
    whole, decimals = str(int(other[:places])), other[places:]
    return (f"{int(whole):,}" if "," in number else whole) + ("." + decimals if decimals else "")


def _shift(digits: str, rng: random.Random) -> str | None:
    """Change the value by one to three in the last place."""
    off = rng.choice([1, 2, 3]) * rng.choice([-1, 1])
    return str(int(digits) + (off if int(digits) + off >= 0 else -off))


def _replace_digit(digits: str, rng: random.Random) -> str | None:
    """Replace one digit."""
    place = rng.randrange(len(digits))
    return (
        digits[:place]
        + rng.choice([digit for digit in "123456789" if digit != digits[place]])
        + digits[place + 1 :]
    )


def _swap_digits(digits: str, rng: random.Random) -> str | None:
    """Swap two neighbouring digits, but do not make the first digit 0."""
    places = [
        place
        for place in range(len(digits) - 1)
        if digits[place] != digits[place + 1] and (place or digits[1] != "0")
    ]
    if not places:
        return None
    place = rng.choice(places)
    return digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]


def _append_zero(digits: str, rng: random.Random) -> str | None:
    return digits + "0"


def _drop_zero(digits: str, rng: random.Random) -> str | None:
    return digits[:-1] if len(digits) > 1 and digits.endswith("0") else None
