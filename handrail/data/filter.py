"""Select training problems by the results of a probe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from handrail._util.errors import UserError
from handrail.data.config import Source
from handrail.types.problem import Problem, digest


def kept(problems: Sequence[Problem], source: Source, file: Path) -> list[Problem]:
    """Return the ``problems`` whose kind in the probe's ``file`` is in ``source.keep``. Raises UserError."""
    kinds = _kinds(file)
    checksums = [digest([problem]) for problem in problems]
    unknown = [
        problem.id for problem, checksum in zip(problems, checksums, strict=True) if checksum not in kinds
    ]
    if unknown:
        raise UserError(
            f"{file}: it has no result for {len(unknown)} of the {len(problems)} problems of {source.path} "
            f"in their present form, first {unknown[0]}; probe this source again, without --limit"
        )
    chosen = [
        problem
        for problem, checksum in zip(problems, checksums, strict=True)
        if kinds[checksum] in source.keep
    ]
    if not chosen:
        raise UserError(
            f"{file}: no problem of {source.path} is {' or '.join(source.keep)}; "
            "keep other kinds, or train on other problems"
        )
    return chosen


def _kinds(file: Path) -> dict[str, str]:
    """Map the checksum of each probed problem to its kind."""
    kinds = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.train.probe: {file} cannot be read: {error}") from error
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            kinds[row["problem"]] = "faulty" if row["faults"] else row["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}, line {number}: this is not a line of a probe's problems.jsonl; "
                "name the file that handrail probe wrote"
            ) from error
    return kinds
