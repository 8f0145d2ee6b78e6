"""A language model behind an endpoint as step judge."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.experts.conversations import count_right_steps, judge_conversation
from handrail.experts.endpoint import Endpoint
from handrail.experts.judges import Scores
from handrail.types.problem import Problem


class LlmJudge:
    """Ask for the first wrong step; steps score 1 before it, 0 at it, None after it.

    ``max_tokens``: limit of the answer, including reasoning. Answers that name no step are counted as
    ``endpoint/unreadable``.
    """

    def __init__(self, endpoint: Endpoint, max_tokens: int = 2048) -> None:
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        answers = iter(
            self.endpoint.ask(
                [judge_conversation(*attempt) for attempt in attempts if attempt[1]], self.max_tokens
            )
        )
        return [self._scores(next(answers), len(steps)) if steps else [] for _, steps in attempts]

    def _scores(self, answer: str | None, steps: int) -> Scores | None:
        if answer is None:
            return None
        right = count_right_steps(answer, steps)
        if right is None:
            self.endpoint.counts["endpoint/unreadable"] += 1
            return None
        return ([1.0] * right + [0.0] + [None] * steps)[:steps]
