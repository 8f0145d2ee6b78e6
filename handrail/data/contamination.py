"""Test problems that stand in training data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from handrail.types.problem import Problem

PUNCTUATION = re.compile(r"[\s\"'`.,;:!?¿¡’‘“”]+")
AROUND_SIGNS = re.compile(r" ?([^\w ]) ?")


def normal_prompt(problem: Problem) -> str:
    """The prompt up to case, spacing, punctuation and the form of its characters; of a chat, its last message.

    Signs count: 3 + 4 is not 3 - 4.
    """
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    text = PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", prompt).casefold())
    return AROUND_SIGNS.sub(r"\1", text).strip()


def contaminated(train: Sequence[Problem], test: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    """Every problem of ``test`` whose normal prompt one of ``train`` has, behind that one."""
    known: dict[str, Problem] = {}
    for problem in train:
        known.setdefault(normal_prompt(problem), problem)
    return [(known[normal], problem) for problem in test if (normal := normal_prompt(problem)) in known]


def overlap(train: Sequence[Problem], test: Sequence[Problem], name: str) -> str | None:
    """A warning if problems of ``test``, which is called ``name``, are among those of ``train``."""
    found = contaminated(train, test)
    if not found:
        return None
    mine, theirs = found[0]
    return (
        f"{len(found)} of the {len(test)} problems of {name} are among the training problems, up to case, spacing and punctuation, "
        f"first {theirs.where or theirs.id} as {mine.where or mine.id}"
    )
