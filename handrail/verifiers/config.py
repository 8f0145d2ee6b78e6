"""Settings of the verifier."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from handrail._util.section import Section


class VerifierConfig(Section):
    """The verifier, which grades completions."""

    name: str = "math"
    """``math``, ``exact``, ``normalized``, ``reasoning-gym``, ``task`` (built-in tasks), or your own
    ``module:function`` or ``file.py:function``."""
    extract: str | None = None
    """Regular expression for the answer in a completion: the verifier sees only the first group of the last
    match."""
    timeout: float = Field(5.0, gt=0, le=86_400)
    """Seconds for one verdict; a verifier process that takes longer is killed, and the completion is
    unverified: neither correct nor wrong."""
    memory_gib: float = Field(4.0, ge=0.05)
    """Memory limit of one verifier process, in GiB; a completion that needs more gets no verdict."""
    workers: int = Field(2, ge=1)
    """Verifier processes that grade in parallel, beside each process that trains; Ray's ``--workers`` are
    the processes that train."""
    correct_from: float = Field(1.0, gt=0, le=1)
    """The lowest score of a correct completion; a lower score is wrong, whatever its reward."""
    partial_credit: bool | None = None
    """Use the score as the reward instead of 1 for correct and 0 for wrong (default: on, except for
    ``reasoning-gym`` and ``task``, whose scorers may give a wrong answer 0.01)."""

    @field_validator("extract")
    @classmethod
    def _has_a_group(cls, extract: str | None) -> str | None:
        if extract is None:
            return None
        if not extract:
            raise ValueError(
                "it is empty, which would grade every completion as wrong; write a pattern, or leave it out"
            )
        try:
            groups = re.compile(extract).groups
        except re.error as error:
            raise ValueError(f"{extract!r} is not a regular expression: {error}") from None
        if not groups:
            raise ValueError(
                f"{extract!r} has no group; put the part that is the answer in parentheses, as in '#### (.+)'"
            )
        return extract
