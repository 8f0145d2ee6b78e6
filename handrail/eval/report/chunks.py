"""Compress samples.jsonl into one chunk per step, which the page unpacks when the user selects the step."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from handrail.eval.report.read import Row, rows

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
MEMBER = ("role", "reward", "correct", "finished", "author", "advantage", "gradient_weight", "judged", "hint")
RENAMED = {"origin": "author", "credit": "advantage", "weight": "gradient_weight"}
"""Old keys of samples.jsonl."""


@dataclass(frozen=True)
class Chunk:
    """The trajectories of one run and step.

    ``data`` is JSON, gzipped, in base64. ``signal`` is True if any of their tokens was trained on.
    """

    run: int
    step: int
    data: str
    signal: bool


def chunks(run: int, file: Path) -> Iterator[Chunk]:
    """Yield a chunk for every step in ``file``."""
    for step, lines in groupby(map(current, rows(file)), key=lambda row: row["step"]):
        found = list(lines)
        text = json.dumps(problems(found), separators=(",", ":"))
        data = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
        yield Chunk(run, step, data, any(row["gradient_weight"] for row in found))


def current(row: Row) -> Row:
    """Return a row by today's names, whichever version wrote it."""
    row = {RENAMED.get(key, key): value for key, value in row.items()}
    return {**row, "role": "imitated"} if row["role"] == "demonstration" else row


def problems(lines: list[Row]) -> list[dict[str, Any]]:
    """Group the trajectories of a step by problem and prompt."""
    spaces = any("Ġ" in token or "Ċ" in token for row in lines for token in row["tokens"])
    out = []
    for _, group in groupby(lines, key=lambda row: (row["problem"], row.get("prompt"))):
        members = list(group)
        head = {
            "id": members[0]["problem"],
            **{key: members[0].get(key) for key in ("prompt", "answer", "plan")},
        }
        out.append({**head, "members": [member(row, spaces) for row in members]})
    return out


def member(row: Row, byte_level: bool) -> dict[str, Any]:
    texts: dict[str, Any] = {
        key: [readable(token, byte_level) for token in row[key]]
        for key in ("tokens", "targets")
        if key in row
    }
    return {**texts, **{key: row[key] for key in MEMBER if key in row}}


def readable(token: str, byte_level: bool) -> str:
    """Return the text of a token.

    Byte-level vocabularies write a letter for each byte, and SentencePiece writes ▁ for a space.
    """
    if byte_level and all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token).decode("utf-8", errors="backslashreplace")
    return token.replace("▁", " ")
