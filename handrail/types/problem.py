"""The problem: its prompt, its verified answer, and what the user already knows about solving it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from handrail._util.digests import digest_items

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One problem to solve.

    ``prompt``: text or chat messages. ``answer``: what the verifier compares completions with.
    ``references``: worked solutions that end in the answer. ``plan``: how to approach the problem, without
    revealing values. ``metadata``: all other fields of the user's row. ``where``: the file and line that the
    problem came from.
    """

    id: str
    prompt: str | list[Message]
    answer: str
    references: tuple[str, ...] = ()
    plan: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


def digest(problems: Sequence[Problem]) -> str:
    """Checksum of the problems' contents; a data set with the same checksum needs no new attempts."""
    rows = (
        [problem.id, problem.prompt, problem.answer, problem.references, problem.plan, problem.metadata]
        for problem in problems
    )
    return digest_items(rows, default=_as_json)


def _as_json(value: Any) -> Any:
    """Serialize metadata that JSON does not support, identically in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return type(value).__name__ if repr(value).startswith("<") else str(value)
