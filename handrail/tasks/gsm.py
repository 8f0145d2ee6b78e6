"""reasoning-gym's GSM-Symbolic, with whole templates held out: new numbers test arithmetic, new templates test reading."""

from __future__ import annotations

from collections.abc import Iterator

from handrail.problems import Problem
from handrail.seeds import derive
from handrail.tasks.house_rules import Split

HELD_OUT = 5
"""Every fifth template is one of split ``test``: 17 of 85."""


def problems(n: int = 1000, seed: int = 0, split: Split = "train") -> list[Problem]:
    """``n`` distinct problems of the templates of ``split``, with the worked solutions that the family carries."""
    return list(_generate(n, seed, split))


def _generate(n: int, seed: int, split: Split) -> Iterator[Problem]:
    from reasoning_gym import create_dataset
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    test = set(tasks_ok[::HELD_OUT])
    data = create_dataset("gsm_symbolic", seed=derive("gsm-symbolic", seed) % 2**40, size=2 * HELD_OUT * n + 200)
    seen: set[str] = set()
    for index, template in enumerate(data.task_indices):
        if (template in test) != (split == "test"):
            continue
        entry = data[index]
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        metadata = {**entry["metadata"], "template": template}
        yield Problem(
            id=f"gsm-symbolic-{split}-{seed}-{len(seen) - 1}", prompt=entry["question"], answer=entry["answer"],
            references=(metadata.pop("answer_cot"),), metadata=metadata,
        )  # fmt: skip
        if len(seen) == n:
            return
