"""Benchmarks from reasoning-gym families, with our own prompts, worked solutions and plans.

The problems and the scorers are reasoning-gym's. We keep the problems in which every value is below 100,
because only those numbers are words of the built-in backbones. A backbone knows the operations, but neither
the family's procedure nor the meaning of its name; ``chain-sum`` is the exception.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from handrail._util.seeds import derive
from handrail.data.tasks.house_rules import Split, Style, is_test, write
from handrail.data.tasks.procedures import (
    PLACES,
    Impossible,
    Operation,
    Procedure,
    Solution,
    carry_out,
    procedure,
)
from handrail.types.problem import Problem

LEGS = {"chicken": 2, "duck": 2, "dog": 4, "cow": 4, "ant": 6, "bee": 6, "spider": 8, "crab": 10}


@dataclass(frozen=True)
class PosedProblem:
    """A reasoning-gym entry in our words.

    ``words`` follow the family's word in the prompt, ``numbers`` are the numbers among them, ``work`` is the
    procedure that solves the problem, and ``things`` holds the number that each thing stands for, such as the
    legs of a dog.
    """

    words: list[str]
    numbers: list[int]
    work: Procedure
    things: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """A benchmark from one reasoning-gym family.

    ``word`` begins every prompt. ``pose`` puts an entry into our words, or returns None if it cannot.
    ``scorer_text`` joins the words of an answer as the family's scorer expects them.
    """

    family: str
    word: str
    options: dict[str, Any]
    pose: Callable[[dict[str, Any]], PosedProblem | None]
    most: dict[Split, int]
    """The number of distinct problems that each split is known to have at least."""
    scorer_text: Callable[[list[str]], str] = " ".join

    def problems(self, n: int, seed: int, style: Style, split: Split) -> Iterator[Problem]:
        seen: set[str] = set()
        style_rng = random.Random(f"style {seed}")
        for entry in self._entries(seed):
            posed = self.pose(entry["metadata"])
            worked = posed and _solve(posed)
            if not posed or not worked:
                continue
            prompt = " ".join([self.word, *posed.words, "?"])
            if prompt in seen or is_test(prompt) != (split == "test"):
                continue
            seen.add(prompt)
            yield Problem(
                id=f"{self.family.replace('_', '-')}-{split}-{seed}-{len(seen) - 1}",
                prompt=prompt,
                answer=worked.answer,
                references=(write(worked.steps, worked.answer, style, style_rng),),
                plan=posed.work.plan,
                metadata=_without_times(entry["metadata"])
                | {"gym_answer": entry["answer"], "steps": worked.steps, "chosen": worked.chosen},
            )
            if len(seen) == n:
                return

    def _entries(self, seed: int) -> Iterator[dict[str, Any]]:
        from reasoning_gym import create_dataset

        # Entry i of seed s equals entry 0 of seed s + i, so consecutive seeds must be spread far apart.
        data = create_dataset(self.family, seed=derive(self.family, seed) % 2**40, size=1, **self.options)
        index = 0
        while True:
            yield data[index]
            index += 1


def _without_times(metadata: dict[str, Any]) -> dict[str, Any]:
    """Drop the times of day, because they contain today's date and so differ between runs."""
    return {key: value for key, value in metadata.items() if key not in ("start_time", "end_time")}


def _solve(posed: PosedProblem) -> Solution | None:
    try:
        return carry_out(posed.work, posed.numbers, posed.things)
    except Impossible:
        return None


def _numbers(numbers: list[int], work: Procedure) -> PosedProblem:
    return PosedProblem([str(number) for number in numbers], numbers, work)


COMPLEX = procedure("""multiply first third then multiply second fourth then subtract that it
multiply first fourth then multiply second third then add that it
answer each""")


def _complex(metadata: dict[str, Any]) -> PosedProblem | None:
    numbers = [int(part) for name in ("num1", "num2") for part in metadata[name]]
    return _numbers(numbers, COMPLEX) if all(0 <= part < 100 for part in metadata["result"]) else None


HORNER = {
    2: procedure("multiply second first then add it third\nanswer last"),
    3: procedure(
        "multiply second first then add it third\nmultiply it first then add it fourth\nanswer last"
    ),
}


def _base(metadata: dict[str, Any]) -> PosedProblem | None:
    digits = [int(digit, 36) for digit in metadata["source_repr"]]
    if metadata["target_base"] != 10 or len(digits) not in HORNER:
        return None
    return _numbers([metadata["source_base"], *digits], HORNER[len(digits)])


def _legs(metadata: dict[str, Any]) -> PosedProblem | None:
    animals = metadata["animals"]
    if not set(animals) <= set(LEGS) or metadata["total_legs"] > 99:
        return None
    lines = [
        (Operation("count", (place,)), Operation("add", ("that", "it"))) for place in PLACES[: len(animals)]
    ]
    work = Procedure((lines[0][:1], *lines[1:]), "last")
    words = [word for animal, count in animals.items() for word in (str(count), animal)]
    return PosedProblem(words, [*animals.values()], work, tuple(LEGS[animal] for animal in animals))


CLOCK = procedure("subtract third first\nsubtract fourth second\nanswer each")
CLOCK_BORROWING = procedure("lend third then subtract it first\nrest second then add it fourth\nanswer each")


def _clock(metadata: dict[str, Any]) -> PosedProblem | None:
    numbers = [
        int(part) for name in ("start_time", "end_time") for part in metadata[name].split()[-1].split(":")[:2]
    ]
    if numbers[:2] >= numbers[2:]:
        return None  # past midnight
    return _numbers(numbers, CLOCK_BORROWING if numbers[1] > numbers[3] else CLOCK)


HALVINGS = {
    2**times: procedure(
        "\n".join(
            ["halve first then halve second", *["halve that then halve that"] * (times - 1), "answer both"]
        )
    )
    for times in (1, 2, 3)
}


def _fraction(metadata: dict[str, Any]) -> PosedProblem | None:
    numbers = [metadata["numerator"], metadata["denominator"]]
    if metadata["factor"] not in HALVINGS or max(numbers) > 99:
        return None
    return _numbers(numbers, HALVINGS[metadata["factor"]])


def _sum(metadata: dict[str, Any]) -> PosedProblem | None:
    words = metadata["expression"].split()
    numbers = [int(word) for word in words[::2]]
    total = numbers[0]
    for sign, number in zip(words[1::2], numbers[1:], strict=True):
        total += number if sign == "+" else -number
        if not 0 <= total < 100:
            return None
    verbs = ["add" if sign == "+" else "subtract" for sign in words[1::2]]
    lines = [(Operation(verb, ("it" if at else "first", PLACES[at + 1])),) for at, verb in enumerate(verbs)]
    return PosedProblem(words, numbers, Procedure(tuple(lines), "last"))


def _as_complex(words: list[str]) -> str:
    return f"{words[0]} + {words[1]}i" if len(words) == 2 else ""


def _as_clock(words: list[str]) -> str:
    return ":".join(words) if len(words) == 2 else ""


def _as_fraction(words: list[str]) -> str:
    return "/".join(words) if len(words) == 2 else ""


FEW: dict[Split, int] = {"train": 600, "test": 150}
SOME: dict[Split, int] = {"train": 1500, "test": 300}
PLENTY: dict[Split, int] = {"train": 10_000, "test": 10_000}
FAMILIES = {
    "complex-arithmetic": Family(
        "complex_arithmetic", "complex",
        {
            "min_real": 1, "max_real": 9, "min_imag": 1, "max_imag": 9,
            "operations": ("*",), "operations_weights": (1.0,),
        },
        _complex, SOME, _as_complex,
    ),
    "base-conversion": Family(
        "base_conversion", "base", {"min_base": 4, "min_value": 16, "max_value": 99}, _base, FEW
    ),
    "leg-counting": Family(
        "leg_counting", "legs", {"min_animals": 2, "max_animals": 2, "max_instances": 9}, _legs, SOME
    ),
    "time-intervals": Family("time_intervals", "clock", {"task_types": ["time"]}, _clock, PLENTY, _as_clock),
    "fraction-simplification": Family(
        "fraction_simplification", "fraction",
        {"min_value": 2, "max_value": 49, "min_factor": 2, "max_factor": 8, "styles": ("plain",)},
        _fraction, FEW, _as_fraction,
    ),
    "chain-sum": Family(
        "chain_sum", "sum", {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}, _sum, PLENTY
    ),
}  # fmt: skip
BY_NAME = {family.family: family for family in FAMILIES.values()}
