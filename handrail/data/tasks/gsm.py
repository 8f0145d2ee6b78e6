"""reasoning-gym's GSM-Symbolic with two held-out sets: new numbers test arithmetic, new templates reading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from handrail._util.seeds import derive
from handrail.data.tasks.house_rules import is_test
from handrail.types.problem import Problem

HELD_OUT = 5
"""Every fifth template, 17 of 85, belongs to the split ``new-templates``. Of the prompts of the other
templates, about every fifth belongs to ``new-numbers``."""
Split = Literal["train", "new-numbers", "new-templates"]
Level = Literal["all", "short"]
LINES, LARGEST = 3, 25
"""Limits of the level ``short`` for a worked solution: steps, and the largest of its numbers, all whole."""
DRAWN = {"all": 4 * HELD_OUT, "short": 200 * HELD_OUT}
"""Entries of the family to allow for each problem that is kept; most are never generated."""
MOST = {"all": 20_000, "short": 1_000}
"""The most distinct problems that a level can be asked for."""


def problems(n: int = 1000, seed: int = 0, split: Split = "train", level: Level = "all") -> list[Problem]:
    """Generate ``n`` distinct problems of ``split`` with the family's worked solutions as references.

    No prompt is in two splits.
    """
    return list(_generate(n, seed, split, level))


def is_short(solution: str) -> bool:
    """True if a worked solution is within the limits of level ``short``; its last line is the answer."""
    numbers = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", solution)]
    steps = solution.strip().splitlines()[:-1]
    return len(steps) <= LINES and all(number.is_integer() and number <= LARGEST for number in numbers)


def _generate(n: int, seed: int, split: Split, level: Level) -> Iterator[Problem]:
    from reasoning_gym import create_dataset
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    new_templates = set(tasks_ok[::HELD_OUT])
    data = create_dataset(
        "gsm_symbolic", seed=derive("gsm-symbolic", seed) % 2**40, size=DRAWN[level] * n + 200
    )
    seen: set[str] = set()
    for index, template in enumerate(data.task_indices):
        if (template in new_templates) != (split == "new-templates"):
            continue
        entry = data[index]
        if split != "new-templates" and is_test(entry["question"]) != (split == "new-numbers"):
            continue
        if entry["question"] in seen or level == "short" and not is_short(entry["metadata"]["answer_cot"]):
            continue
        seen.add(entry["question"])
        metadata = {**entry["metadata"], "template": template}
        yield Problem(
            id=f"gsm-symbolic-{split}-{seed}-{len(seen) - 1}",
            prompt=entry["question"],
            answer=entry["answer"],
            references=(metadata.pop("answer_cot"),),
            metadata=metadata,
        )
        if len(seen) == n:
            return
