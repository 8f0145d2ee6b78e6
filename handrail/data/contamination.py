"""Find test problems among the training data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from handrail.types.problem import Problem

PUNCTUATION = re.compile(r"[\s\"'`.,;:!?¿¡’‘“”]+")
AROUND_SIGNS = re.compile(r" ?([^\w ]) ?")


def normal_prompt(problem: Problem) -> str:
    """Return the prompt (of a chat, its last message) up to case, spacing, punctuation and Unicode form.

    Mathematical signs stay: 3 + 4 is not 3 - 4.
    """
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    text = PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", prompt).casefold())
    return AROUND_SIGNS.sub(r"\1", text).strip()


def shared_prompts(train: Sequence[Problem], test: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    """Return a (train, test) pair for every problem of ``test`` with the prompt of one of ``train``."""
    known: dict[str, Problem] = {}
    for problem in train:
        known.setdefault(normal_prompt(problem), problem)
    return [(known[normal], problem) for problem in test if (normal := normal_prompt(problem)) in known]


def overlap(train: Sequence[Problem], test: Sequence[Problem], name: str) -> str | None:
    """Return a warning if problems of ``test``, called ``name`` in it, are also in ``train``."""
    found = shared_prompts(train, test)
    if not found:
        return None
    mine, theirs = found[0]
    return (
        f"{len(found)} of the {len(test)} problems of {name} are among the training problems, "
        "up to case, spacing and punctuation, "
        f"first {theirs.where or theirs.id}, which equals {mine.where or mine.id}"
    )
