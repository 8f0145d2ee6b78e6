"""The built-in tasks: problems made on the spot, for ``task:NAME?key=value`` sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from handrail.data.tasks import gsm, gym, house_rules
from handrail.data.tasks.house_rules import FILLERS, Split, Style
from handrail.types import Problem


@dataclass(frozen=True)
class Task:
    """``problems`` makes them; its typed parameters are the task's options. ``ranges`` are those of the numbers."""

    problems: Callable[..., list[Problem]]
    ranges: Callable[[dict[str, Any]], dict[str, range]]


def _house_rules_ranges(options: dict[str, Any]) -> dict[str, range]:
    houses = range(1, len(house_rules.HOUSE_RULES) + 1)
    house = options["house"] if options["house"] in houses else 1
    # One house rule has 10,278 hard prompts to test on, h rules h**3 times as many: beyond those the task would never end.
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
"""The benchmarks that training problems come from; all they need but the procedure is known to the suite's backbones."""

OUT_OF_DOMAIN = {"house-rules-easy": "task:house-rules?level=easy", "chain-sum": "task:chain-sum"}
"""Benchmarks that the suite's backbones can do from the start, and that no training touches."""


def structure(problem: Problem, reference: str) -> list[bool | None]:
    """Of every word of a built-in problem's reference, whether it is structure: decided by the procedure, as signs and separators are
    and the numbers that the procedure picks, or a value that follows from the words before it. None for a lead-in word.

    House rules pick no number: their operands stand in the prompt in the order of use.
    """
    chosen = iter(problem.metadata.get("chosen") or repeat(False))
    return [
        None if word in FILLERS else next(chosen) if word.isdigit() else True for word in reference.split()
    ]
