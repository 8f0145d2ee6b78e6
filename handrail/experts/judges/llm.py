"""A language model behind an endpoint as step judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from handrail.experts.conversations import count_right_steps, judge_conversation
from handrail.experts.endpoint import Endpoint
from handrail.experts.judges import Scores
from handrail.types.problem import Problem


class LlmJudge:
    """Ask for the first wrong step; steps score 1 before it, 0 at it, None after it.

    ``max_tokens`` is for the answer with its reasoning. An answer that names no step is unreadable.
    """

    def __init__(self, endpoint: Endpoint, max_tokens: int = 2048) -> None:
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        asked = [attempt for attempt in attempts if attempt[1]]
        questions = [judge_conversation(*attempt) for attempt in asked]
        readers = [partial(count_right_steps, steps=len(steps)) for _, steps in asked]
        right = iter(self.endpoint.ask_and_read(questions, readers, self.max_tokens))
        return [_scores(next(right), len(steps)) if steps else [] for _, steps in attempts]


def _scores(right: int | None, steps: int) -> Scores | None:
    return None if right is None else ([1.0] * right + [0.0] + [None] * steps)[:steps]
