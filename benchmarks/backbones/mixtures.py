"""Training examples (prompt, completion) of the built-in backbones, drawn one at a time.

Both mixtures contain tasks whose names have a fixed meaning, and tasks whose name has another meaning in
every example. The latter come with a plan in front, which says what to do, and without one. So the model
learns no particular meaning, and its guesses spread over all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache

from handrail.data.tasks import house_rules as house
from handrail.data.tasks.gym import FAMILIES, LEGS
from handrail.data.tasks.procedures import (
    CONSTANTS,
    PLACES,
    RESULTS,
    VERBS,
    Impossible,
    Operation,
    Procedure,
    carry_out,
)

PLAN = "{prompt}\n\nPlan:\n{plan}"
HOUSE_WORDS = [
    "<pad>", "<eos>", "<unk>", *map(str, range(house.MODULUS)), *"+-*=,;#?", "Plan:",
    "then", *house.PRIMITIVES,
    *house.HOUSE_RULES, *house.KNOWN_RULES, *house.FILLERS,
]  # fmt: skip

KNOWN_PROCEDURES = [f"P{index}" for index in range(96)]
KNOWN_THINGS = {f"T{index}": 2 + index % 9 for index in range(36)}
# Names whose meaning the suite's backbones never learn: those of the families that procedures solve.
UNKNOWN_PROCEDURES = [family.word for family in FAMILIES.values() if family.word != "sum"]
SUITE_WORDS = [
    *HOUSE_WORDS, "/", *(verb for verb in VERBS if verb not in house.PRIMITIVES), *PLACES, *RESULTS,
    "answer", "each", "last", "both", "sum", *UNKNOWN_PROCEDURES, *LEGS, *KNOWN_PROCEDURES, *KNOWN_THINGS,
]  # fmt: skip


Shares = Mapping[str, float]


def house_example(shares: Shares, rng: random.Random) -> tuple[str, str]:
    """Draw an easy problem of house rules (``easy``), or one whose house rules have a random meaning
    (``planned``, ``bare``)."""
    start = rng.randrange(house.MODULUS)
    (kind,) = rng.choices([*shares], [*shares.values()])
    if kind == "easy":
        items, rules = house.draw_items("easy", 6, rng), house.KNOWN_RULES
    else:
        programs = list(house.KNOWN_RULES.values())
        rules = house.KNOWN_RULES | {name: rng.choice(programs) for name in house.HOUSE_RULES}
        items = house.draw_items("hard", 6, rng)[: rng.choice((1, 2, 3, 3, 3))]
    steps, plan, answer = house.solve(start, items, rules)
    prompt = house.prompt(start, items)
    if kind == "planned":
        prompt = PLAN.format(prompt=prompt, plan=plan)
    return prompt, house.write(steps, answer, "clean", rng)


def suite_example(shares: Shares, rng: random.Random) -> tuple[str, str]:
    """Draw a house-rules example; a ``sum``; a ``named`` procedure; or a procedure whose name has a random
    meaning, with or without a plan."""
    (kind,) = rng.choices([*shares], [*shares.values()])
    if kind in ("easy", "planned", "bare"):
        return house_example({kind: 1.0}, rng)
    if kind == "sum":
        return sum_example(rng)
    while True:
        name = rng.choice(KNOWN_PROCEDURES if kind == "named" else UNKNOWN_PROCEDURES)
        work = known_procedures()[name] if kind == "named" else draw_procedure(rng)
        things = (
            {name: rng.randint(2, 10) for name in LEGS}
            if kind != "named" and rng.random() < 0.5
            else KNOWN_THINGS
        )
        try:
            return procedure_example(name, work, things, kind == "planned procedure", rng)
        except Impossible:
            continue


def procedure_example(
    name: str, work: Procedure, things: dict[str, int], planned: bool, rng: random.Random
) -> tuple[str, str]:
    """Draw a problem of ``work`` under ``name``. Raises Impossible if the numbers drawn do not suit it."""
    numbers = draw_numbers(work, rng)
    words = [str(number) for number in numbers]
    named = []
    if any(operation.verb == "count" for line in work.lines for operation in line):
        named = rng.choices(list(things), k=len(numbers))
        words = [word for pair in zip(words, named, strict=True) for word in pair]
    worked = carry_out(work, numbers, [things[thing] for thing in named])
    prompt = " ".join([name, *words, "?"])
    if planned:
        prompt = PLAN.format(prompt=prompt, plan=work.plan)
    return prompt, house.write(worked.steps, worked.answer, "clean", rng)


def sum_example(rng: random.Random) -> tuple[str, str]:
    """Draw a chain of sums and differences below 100."""
    highest = rng.choice((10, 100))
    total = rng.randrange(highest)
    words, steps = [str(total)], []
    for _ in range(rng.choice((2, 3))):
        sign = rng.choice("+-")
        number = rng.randrange(min(highest, house.MODULUS - total if sign == "+" else total + 1))
        result = total + number if sign == "+" else total - number
        steps.append(f"{total} {sign} {number} = {result}")
        words += [sign, str(number)]
        total = result
    return " ".join(["sum", *words, "?"]), house.write(steps, str(total), "clean", rng)


FREQUENCY = {"add": 5, "subtract": 5, "multiply": 4, "count": 2, "halve": 2, "lend": 1, "rest": 1}


def draw_procedure(rng: random.Random) -> Procedure:
    """Draw one to three lines of one to three operations on two to four numbers."""
    places = PLACES[: rng.randint(2, 4)]
    lines: list[tuple[Operation, ...]] = []
    results = 0
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        line = []
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            line.append(draw_operation(places, results, rng))
            results += 1
        lines.append(tuple(line))
    return Procedure(tuple(lines), rng.choice(("each", "last", "both") if results > 1 else ("each", "last")))


def draw_operation(places: Sequence[str], results: int, rng: random.Random) -> Operation:
    """Draw an operation on two different places, or on the last results if there are any."""
    (verb,) = rng.choices([*FREQUENCY], [*FREQUENCY.values()])
    recent = RESULTS[:results]
    if verb == "count":
        return Operation(verb, (rng.choice(places),))
    first = rng.choice(recent) if recent and rng.random() < 0.5 else rng.choice(places)
    if verb in CONSTANTS:
        return Operation(verb, (first,))
    return Operation(verb, (first, rng.choice([place for place in (*places, *recent) if place != first])))


def draw_numbers(work: Procedure, rng: random.Random) -> list[int]:
    """Draw numbers for ``work``: small ones if they are multiplied."""
    operations = [operation for line in work.lines for operation in line]
    multiplied = {
        place
        for operation in operations
        if operation.verb in ("multiply", "count")
        for place in operation.operands
    }
    highest = max(
        (PLACES.index(place) for operation in operations for place in operation.operands if place in PLACES),
        default=0,
    )
    length = max(2, highest + 1)
    return [
        rng.randint(1, rng.choice((9, 16))) if place in multiplied else rng.randrange(house.MODULUS)
        for place in PLACES[:length]
    ]


@cache
def known_procedures() -> dict[str, Procedure]:
    """The meanings of the names P0 to P95: procedures that work with many choices of numbers."""
    rng, found = random.Random("known procedures"), {}
    for name in KNOWN_PROCEDURES:
        while name not in found:
            work = draw_procedure(rng)
            if sum(_suits(work, rng) for _ in range(8)) >= 3:
                found[name] = work
    return found


def _suits(work: Procedure, rng: random.Random) -> bool:
    try:
        procedure_example("", work, KNOWN_THINGS, False, rng)
    except Impossible:
        return False
    return True
