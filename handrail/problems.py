"""The problem: what the policy is asked, what is accepted, and what the user already knows about solving it."""

from __future__ import annotations

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
