"""House rules: arithmetic modulo 100 with named two-operation rules.

A problem starts from a number and applies rules to it, each with an operand: ``77 A 8 C 9 B 4 ?``. A rule is
two primitive operations. The reference writes out every primitive, with one step for each rule, and ends in
the values after each step: ``77 + 8 = 85 , 85 * 2 = 70 ; 70 - 9 = 61 , ... # 70 22 40``. Rules ``K0`` to
``K107`` are common knowledge: the built-in backbones were taught them, twelve names for each of the nine
programs. ``A`` to ``F`` are house rules, whose meaning no backbone knows. A *hard* problem (house rules
applied three times) therefore cannot be solved by sampling: a rollout would have to guess up to three
meanings at once, and three values leave little to luck.

Every word is one token of the built-in backbones. See ``docs/backbones.md``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from handrail.types.problem import Problem

MODULUS = 100
OPERANDS = range(2, 10)
PRIMITIVES = ("add", "subtract", "double")
Program = tuple[str, str]

# With many names for few programs, a backbone reads a rule from its name's embedding, so that it can learn a
# new name without unlearning much about the others.
SYNONYMS = 12
KNOWN_RULES: dict[str, Program] = {
    f"K{index}": program
    for index, program in enumerate([(a, b) for a in PRIMITIVES for b in PRIMITIVES] * SYNONYMS)
}
HOUSE_RULES: dict[str, Program] = {
    "A": ("add", "double"),
    "B": ("double", "subtract"),
    "C": ("subtract", "double"),
    "D": ("double", "add"),
    "E": ("subtract", "subtract"),
    "F": ("add", "add"),
}
FILLERS = ("well", "now", "okay", "so", "hmm", "next", "right", "anyway")
FILLER_SHARE = 0.6

Level = Literal["easy", "hard"]
Style = Literal["clean", "foreign"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Item:
    """A rule or a primitive of a prompt, with its operand."""

    name: str
    operand: int

    @property
    def text(self) -> str:
        signs = {"add": f"+ {self.operand}", "subtract": f"- {self.operand}", "double": "* 2"}
        return signs.get(self.name, f"{self.name} {self.operand}")


def solve(start: int, items: list[Item], rules: dict[str, Program]) -> tuple[list[str], str, str]:
    """Return the steps (one item's equalities each), the plan (names of primitives) and the answer.

    The answer is the value after each item.
    """
    value, steps, plan, values = start, [], [], []
    for item in items:
        equalities, program = [], rules.get(item.name, (item.name,))
        for primitive in program:
            sign, operand = {"add": ("+", item.operand), "subtract": ("-", item.operand), "double": ("*", 2)}[
                primitive
            ]
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % MODULUS
            equalities.append(f"{value} {sign} {operand} = {result}")
            value = result
        steps.append(" , ".join(equalities))
        plan.append(" then ".join(program))
        values.append(str(value))
    return steps, "\n".join(plan), " ".join(values)


def write(steps: list[str], answer: str, style: Style, rng: random.Random) -> str:
    """Write the worked solution; in foreign style, most steps begin with words unknown to the backbones."""
    if style == "foreign":
        steps = [
            " ".join([*rng.choices(FILLERS, k=rng.randint(1, 2)), step])
            if rng.random() < FILLER_SHARE
            else step
            for step in steps
        ]
    return " ; ".join(steps) + f" # {answer}"


def prompt(start: int, items: list[Item]) -> str:
    """Write the prompt of a problem."""
    return " ".join([str(start), *(item.text for item in items), "?"])


def draw_items(level: Level, house: int, rng: random.Random) -> list[Item]:
    if level == "hard":
        return [Item(rng.choice(list(HOUSE_RULES)[:house]), rng.choice(OPERANDS)) for _ in range(3)]
    names = [[*KNOWN_RULES], [*KNOWN_RULES], [*PRIMITIVES]]
    return [Item(rng.choice(rng.choice(names)), rng.choice(OPERANDS)) for _ in range(rng.randint(1, 3))]


def is_test(text: str) -> bool:
    """True if the prompt ``text`` is for testing.

    The split depends on the text alone, so that no held-out prompt can be in any training set.
    """
    return zlib.crc32(text.encode()) % 5 == 0


def problems(
    level: Level = "hard",
    n: int = 1000,
    seed: int = 0,
    style: Style = "clean",
    split: Split = "train",
    house: int = 6,
) -> list[Problem]:
    """Generate ``n`` distinct problems; ``house`` is the number of house rules in use (1 to 6)."""
    return list(_generate(level, n, seed, style, split, house))


def _generate(level: Level, n: int, seed: int, style: Style, split: Split, house: int) -> Iterator[Problem]:
    rng = random.Random(f"{level} {seed} {split}")
    style_rng = random.Random(f"style {seed}")
    seen: set[str] = set()
    while len(seen) < n:
        start, items = rng.randrange(MODULUS), draw_items(level, house, rng)
        text = prompt(start, items)
        if text in seen or is_test(text) != (split == "test"):
            continue
        seen.add(text)
        steps, plan, answer = solve(start, items, KNOWN_RULES | HOUSE_RULES)
        yield Problem(
            id=f"{level}-{split}-{seed}-{len(seen) - 1}",
            prompt=text,
            answer=answer,
            references=(write(steps, answer, style, style_rng),),
            plan=plan,
            metadata={"steps": steps},
        )


def derivation_is_right(problem: Problem, completion: str) -> bool:
    """True if all of the completion's steps are correct, lead-in words aside, and not only its answer."""
    words = [word for word in completion.split("#")[0].split() if word not in FILLERS]
    steps: list[str] = problem.metadata["steps"]
    return " ".join(words).split(" ; ") == steps
