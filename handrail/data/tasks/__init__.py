"""The built-in tasks: generated problems for ``task:NAME?key=value`` sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from handrail.data.tasks import gsm, gym, house_rules
from handrail.data.tasks.house_rules import FILLERS, Split, Style
from handrail.types.problem import Problem


@dataclass(frozen=True)
class Task:
    """A built-in task.

    ``problems`` generates the problems; its typed parameters are the task's options. ``ranges`` returns the
    allowed values of the numeric options, given all options.
    """

    problems: Callable[..., list[Problem]]
    ranges: Callable[[dict[str, Any]], dict[str, range]]


def _house_rules_ranges(options: dict[str, Any]) -> dict[str, range]:
    houses = range(1, len(house_rules.HOUSE_RULES) + 1)
    house = options["house"] if options["house"] in houses else 1
    # One house rule has 10,278 hard test prompts and h rules have h**3 times as many; generating distinct
    # prompts beyond those would never end.
    return {"house": houses, "n": range(1, min(10_000 * house**3, 100_000) + 1)}


def _gym(family: gym.Family) -> Task:
    def problems(
        n: int = 100, seed: int = 0, style: Style = "clean", split: Split = "train"
    ) -> list[Problem]:
        return list(family.problems(n, seed, style, split))

    return Task(problems, lambda options: {"n": range(1, family.most[options["split"]] + 1)})


TASKS = {
    "house-rules": Task(house_rules.problems, _house_rules_ranges),
    "gsm-symbolic": Task(gsm.problems, lambda options: {"n": range(1, gsm.MOST[options["level"]] + 1)}),
    **{name: _gym(family) for name, family in gym.FAMILIES.items()},
}

IN_DOMAIN = {"house-rules": "task:house-rules?level=hard&house=2"} | {
    name: f"task:{name}" for name in gym.FAMILIES if name != "chain-sum"
}
"""The benchmarks to train on; the suite's backbones know everything that they need except the procedure."""

OUT_OF_DOMAIN = {"house-rules-easy": "task:house-rules?level=easy", "chain-sum": "task:chain-sum"}
"""Benchmarks that the suite's backbones solve before any training and that are never trained on."""


def structure(problem: Problem, reference: str) -> list[bool | None]:
    """Classify every word of a built-in problem's reference as structure (True) or value (False).

    Structure is what the procedure decides: signs, separators, and the numbers that it picks. A value follows
    from the words before it. Lead-in words of the foreign style are None. House rules pick no number, because
    the prompt gives their operands in the order of use.
    """
    chosen = iter(problem.metadata.get("chosen") or repeat(False))
    return [
        None if word in FILLERS else next(chosen) if word.isdigit() else True for word in reference.split()
    ]
