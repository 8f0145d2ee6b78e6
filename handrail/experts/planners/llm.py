"""A language model behind an endpoint as planner."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.experts.conversations import plan_conversation, strip_reasoning
from handrail.experts.endpoint import Endpoint
from handrail.types.problem import Problem

LONGEST_PLAN = 4000


class EndpointPlanner:
    """Ask for plans. They may leak the answer: check them with ``planners.leaks``."""

    def __init__(self, endpoint: Endpoint, max_tokens: int = 2048) -> None:
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def plans(
        self, pairs: Sequence[tuple[Problem, str]], seeds: Sequence[int] = (), attempt: int = 0
    ) -> list[str | None]:
        """Make a plan for each (problem, reference), or None.

        Further attempts are sampled, so that they differ.
        """
        temperature = 1.0 if attempt else 0.0
        asked = [plan_conversation(*pair) for pair in pairs]
        readers = [_read_plan] * len(asked)
        return self.endpoint.ask_and_read(asked, readers, self.max_tokens, temperature, attempt)


def _read_plan(answer: str) -> str | None:
    """The plan, cut to LONGEST_PLAN; None if the answer has nothing besides its reasoning."""
    return strip_reasoning(answer)[:LONGEST_PLAN].strip() or None
