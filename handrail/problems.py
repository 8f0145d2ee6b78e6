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
    """A checksum of what problems ask and accept; two data sets with the same one need no new attempts."""
    rows = [[problem.id, problem.prompt, problem.answer, problem.references, problem.plan] for problem in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
