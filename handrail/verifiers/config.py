"""Settings of the verifier."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from handrail._util.section import Section


class VerifierConfig(Section):
    """The verifier, which grades completions."""

    name: str = "math"
    """``math``, ``exact``, ``normalised``, ``reasoning-gym``, ``task`` (built-in tasks), or your own
    ``module:function`` or ``file.py:function``."""
    extract: str | None = None
    """Regular expression that finds the answer in a completion: the verifier sees the first group of the last
    match."""
    timeout: float = Field(5.0, gt=0, le=86_400)
    """Seconds for one verdict; a worker that takes longer is killed, and its completion is unverified and
    earns nothing."""
    memory_gib: float = Field(4.0, ge=0.05)
    """Memory of one worker, in GiB; a completion that needs more gets no verdict."""
    workers: int = Field(2, ge=1)
    """Processes that grade in parallel."""
    correct_from: float = Field(1.0, gt=0, le=1)
    """A completion is correct if its score is at least this; below it is wrong, whatever it is paid."""
    partial_credit: bool | None = None
    """Pay the score itself instead of 1 for correct and 0 for wrong; by default on, except for
    ``reasoning-gym`` and ``task``, whose scorers may give a wrong answer a hundredth."""

    @field_validator("extract")
    @classmethod
    def _has_a_group(cls, extract: str | None) -> str | None:
        if extract is None:
            return None
        if not extract:
            raise ValueError("it is empty, which would grade every completion as wrong; write a pattern, or leave it out")
        try:
            groups = re.compile(extract).groups
        except re.error as error:
            raise ValueError(f"{extract!r} is not a regular expression: {error}") from None
        if not groups:
            raise ValueError(f"{extract!r} has no group; put the part that is the answer in parentheses, as in '#### (.+)'")
        return extract
