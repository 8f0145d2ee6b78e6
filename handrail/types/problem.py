"""The problem: what the policy is asked, what is accepted, and what the user already knows about solving it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One thing to solve.

    ``prompt`` is text or chat messages, ``answer`` what the verifier compares with, ``references`` worked solutions that
    end in the answer, ``plan`` how to go about it without giving values away, ``metadata`` everything else the user's row held,
    ``where`` the file and line it came from.
    """

    id: str
    prompt: str | list[Message]
    answer: str
    references: tuple[str, ...] = ()
    plan: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


def digest(problems: Sequence[Problem]) -> str:
    """A checksum of all that problems hold; two data sets with the same one need no new attempts."""
    rows = [
        [problem.id, problem.prompt, problem.answer, problem.references, problem.plan, problem.metadata]
        for problem in problems
    ]
    return hashlib.sha256(json.dumps(rows, default=_as_json, skipkeys=True).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """Metadata that JSON does not know, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return type(value).__name__ if repr(value).startswith("<") else str(value)
