"""A solution as steps: the unit that judges score and correctors replace."""

from __future__ import annotations

import re
from bisect import bisect_right

from handrail.models.renderer import Renderer

# The first of these that a solution contains ends its steps: a blank line, a line, a semicolon, a sentence.
ENDS = (r"\n[ \t]*\n\s*", r"\n\s*", r" ?;\s+", r"(?<=[^\d\s])[.!?]\s+|(?<=\d)\.\s+(?=[A-Z])")


def split_steps(text: str, end: str | None = None) -> list[str]:
    """The steps of ``text``, each with what ends it, so that they join to ``text`` again; ``end`` is a regular expression."""
    for pattern in [end] if end else ENDS:
        places = [match.end() for match in re.finditer(pattern, text) if match.end() > match.start()]
        if any(text[place:].strip() for place in places):
            return _merge_empty([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return [text] if text.strip() else []


def _merge_empty(pieces: list[str]) -> list[str]:
    """White space alone is no step: it belongs to the step before it, or to the first."""
    steps: list[str] = []
    lead = ""
    for piece in pieces:
        if piece.strip():
            steps.append(lead + piece)
            lead = ""
        elif steps:
            steps[-1] += piece
        else:
            lead += piece
    return steps


def spelt(tokens: list[int], text: str, renderer: Renderer) -> int:
    """How many of ``tokens`` spell a beginning of ``text``; a token that reaches beyond it is not counted."""
    count = bisect_right(range(len(tokens) + 1), len(text), key=lambda n: len(renderer.text(tokens[:n]))) - 1
    while not text.startswith(renderer.text(tokens[:count])):  # a character may be spelt by several tokens
        count -= 1
    return count
