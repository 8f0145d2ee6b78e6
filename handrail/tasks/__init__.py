"""The built-in tasks: problems made on the spot, for ``task:NAME?key=value`` sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handrail.problems import Problem
from handrail.tasks import house_rules


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


TASKS = {"house-rules": Task(house_rules.problems, _house_rules_ranges)}
