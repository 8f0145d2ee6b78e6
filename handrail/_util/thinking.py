"""What a model thinks, between ``<think>`` and ``</think>``, is no answer."""

from __future__ import annotations

import re

THINKING = re.compile(r"</?think>")


def answer_start(text: str) -> int:
    """Return the index after the last ``</think>``, or 0 if there is none.

    If the text ends inside ``<think>``, it has no answer, and the index is its length.
    """
    *_, last = [None, *THINKING.finditer(text)]
    if last is None:
        return 0
    return last.end() if last.group() == "</think>" else len(text)


def after_thinking(text: str) -> str:
    """Return the part of a text that answers: what follows ``answer_start``."""
    return text[answer_start(text) :]
