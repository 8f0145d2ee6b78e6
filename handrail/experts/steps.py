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


CUT = "\ufffd"
"""What a character decodes to if some of its bytes are missing."""
STRIDE = 16


class Prefixes:
    """Texts of a completion's leading tokens, for finding the tokens of each step.

    The text of n tokens is decoded from at most the last 2·STRIDE of them, because decoding all of them for
    every step would take quadratic time.
    """

    def __init__(self, tokens: list[int], renderer: Renderer) -> None:
        self.tokens, self.renderer, self.stride = tokens, renderer, STRIDE
        end = next((place for place, token in enumerate(tokens) if token in renderer.ends), len(tokens))
        self.stable = ""
        """Text that no later token can change, as far as it is decoded."""
        self.known = [(0, 0, 0)]
        """After every STRIDE tokens: the first token to decode, and how many characters of its text and of
        ``stable`` precede what follows."""
        for n in range(STRIDE, end + 1, STRIDE):
            added = self._after(n)
            cut = 3 if added.endswith(3 * CUT) else len(added) - len(added.rstrip(CUT))  # of up to four bytes
            self.stable += added[: len(added) - cut]
            start = n - STRIDE
            self.known.append((start, len(renderer.text(tokens[start:n])) - cut, len(self.stable)))
        if self.text(len(tokens)) != renderer.text(tokens):  # a decoder that needs more than the last tokens
            self.stride, self.known = len(tokens) + 1, [(0, 0, 0)]

    def text(self, n: int) -> str:
        """Text of the first ``n`` tokens."""
        return self.stable[: self._from(n)[2]] + self._after(n)

    def count(self, text: str) -> int:
        """Number of leading tokens whose text is a prefix of ``text``; excludes a token that extends beyond
        it."""
        lengths = range(len(self.tokens) + 1)
        count = bisect_right(lengths, len(text), key=lambda n: len(self.text(n))) - 1
        while not text.startswith(self.text(count)):  # one character can consist of several tokens
            count -= 1
        return count

    def _from(self, n: int) -> tuple[int, int, int]:
        return self.known[min(n // self.stride, len(self.known) - 1)]

    def _after(self, n: int) -> str:
        start, skipped, _ = self._from(n)
        return self.renderer.text(self.tokens[start:n])[skipped:]
