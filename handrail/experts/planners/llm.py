"""A language model as planner."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.experts.conversations import plan_conversation, spoken
from handrail.experts.endpoint import Endpoint
from handrail.types.problem import Problem

LONGEST_PLAN = 4000


class EndpointPlanner:
    """Asks for plans. What comes back may give the answer away: whoever uses a plan asks ``planner.leaks`` first."""

    def __init__(self, endpoint: Endpoint, max_tokens: int = 2048) -> None:
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def plans(
        self, pairs: Sequence[tuple[Problem, str]], seeds: Sequence[int] = (), attempt: int = 0
    ) -> list[str | None]:
        """A plan for each problem with its reference, None where there is none. Further attempts are sampled, to differ."""
        temperature = 1.0 if attempt else 0.0
        asked = [plan_conversation(*pair) for pair in pairs]
        readers = [_read_plan] * len(asked)
        return self.endpoint.ask_and_read(asked, readers, self.max_tokens, temperature, attempt)


def _read_plan(answer: str) -> str | None:
    """The plan, cut to LONGEST_PLAN; None if the answer has nothing besides its reasoning."""
    return spoken(answer)[:LONGEST_PLAN].strip() or None
