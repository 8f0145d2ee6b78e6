"""Cached answers: right completions of another checkpoint with their log-probabilities, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from handrail._util.errors import UserError
from handrail._util.files import text_of

if TYPE_CHECKING:
    from handrail.types.trajectory import Group  # imports torch


@dataclass(frozen=True)
class Answer:
    """A completion that the verifier accepted; ``logp``: the log-probability of each token when sampled."""

    tokens: list[int]
    logp: list[float]
    text: str

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logp):
            raise ValueError("it has not as many log-probabilities as tokens")


@dataclass(frozen=True)
class Answers:
    """A line of the file: a problem's answers, none if no attempt at it was right."""

    id: str
    answers: list[Answer]


LINE = TypeAdapter(Answers)


def read_answers(path: str, field: str) -> dict[str, list[Answer]]:
    """Read a file that ``handrail harvest`` wrote: problem id -> answers.

    Raises UserError, naming ``field``, if there is no such file, or the line that is malformed.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; write one with `handrail harvest`")
    advice = "name a file that `handrail harvest` wrote"
    lines = text_of(file, f"{advice} as {field}").splitlines()
    if header(lines) is None:
        raise UserError(f"{field}: the first line of {path} does not say how it was made; {advice}")
    out = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            found = LINE.validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {error.errors()[0]['msg']}; harvest it anew") from error
        out[found.id] = found.answers
    return out


def header(lines: Sequence[str]) -> dict[str, Any] | None:
    """Return what the first of the file's ``lines`` says about how it was made; None if it says nothing."""
    with suppress(ValueError):
        said = json.loads(lines[0] if lines else "")
        return said if isinstance(said, dict) and "answers" not in said else None
    return None


def write_answers(rows: Iterable[Answers]) -> str:
    """The lines of ``rows``."""
    return "".join(
        json.dumps({"id": row.id, "answers": [vars(answer) for answer in row.answers]}) + "\n" for row in rows
    )


def right(group: Group, keep: int | None = None) -> Answers:
    """The first ``keep`` right rollouts of a group; all by default."""
    found = [member for member in group.rollouts if member.correct][:keep]
    return Answers(
        group.problem.id,
        [Answer(each.tokens, each.column("sampling_logp").tolist(), each.text) for each in found],
    )
