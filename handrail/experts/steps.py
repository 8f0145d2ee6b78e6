"""Steps of solutions: the unit that judges score and correctors replace."""

from __future__ import annotations

import re
from bisect import bisect_right

from handrail.models.renderer import Renderer

# The first of these patterns that occurs in a solution ends its steps: blank line, line, semicolon, sentence.
ENDS = (r"\n[ \t]*\n\s*", r"\n\s*", r" ?;\s+", r"(?<=[^\d\s])[.!?]\s+|(?<=\d)\.\s+(?=[A-Z])")


def split_steps(text: str, end: str | None = None) -> list[str]:
    """Split ``text`` into steps that include their endings, so that they join to ``text`` again.

    ``end``: regular expression of step endings.
    """
    for pattern in [end] if end else ENDS:
        places = [match.end() for match in re.finditer(pattern, text) if match.end() > match.start()]
        if any(text[place:].strip() for place in places):
            return _merge_empty([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return [text] if text.strip() else []


def _merge_empty(pieces: list[str]) -> list[str]:
    """Merge pieces of whitespace into the preceding step, or into the first one."""
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


def count_prefix_tokens(tokens: list[int], text: str, renderer: Renderer) -> int:
    """Number of leading ``tokens`` whose text is a prefix of ``text``; excludes a token that extends beyond
    it."""
    count = bisect_right(range(len(tokens) + 1), len(text), key=lambda n: len(renderer.text(tokens[:n]))) - 1
    while not text.startswith(renderer.text(tokens[:count])):  # one character can consist of several tokens
        count -= 1
    return count
