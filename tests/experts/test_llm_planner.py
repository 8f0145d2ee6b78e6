"""The language-model planner with a real server: its prompt, the plan in its answer, and detection of
leaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from handrail._util.errors import Paused
from handrail.experts.config import EndpointConfig
from handrail.experts.endpoint import Endpoint
from handrail.experts.planners import leaks
from handrail.experts.planners.llm import LONGEST_PLAN, EndpointPlanner
from handrail.types.problem import Problem
from tests.openai_server import EMPTY, Messages, OpenAiServer, Reply

REFERENCE = "3 boxes of 12 hold 3 * 12 = 36 eggs. Without the 5 broken ones, 36 - 5 = 31 are left. #### 31"
PROBLEM = Problem(
    "1", "Tom has 3 boxes of 12 eggs, of which 5 are broken. How many are left?", "31", (REFERENCE,)
)
CHAT = Problem(
    "2", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 7 - 5?"}], "2"
)
PLAN = "1. Find how many eggs the boxes hold, by multiplying.\n2. Subtract the broken ones."


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    """A server with a plan for the first attempt at the problem, a better one for the second, and none for
    the chat."""
    with OpenAiServer(answer) as running:
        yield running


def answer(messages: Messages) -> str | Reply:
    asked = messages[-1]["content"]
    if "Be brief.\n\nWhat is 7 - 5?" in asked:
        return EMPTY if "silence" in asked else "<think>2 it is" if "thought" in asked else "blah " * 100_000
    assert str(PROBLEM.prompt) in asked and REFERENCE in asked
    return f"<think>The answer is 31.</think>\n{PLAN}\n"


@contextmanager
def planner(server: OpenAiServer, tmp_path: Path) -> Iterator[EndpointPlanner]:
    config = EndpointConfig(
        base_url=server.url, model="m", api_key_env="NO_SUCH_KEY", cache=str(tmp_path / "cache"), retries=0
    )
    with closing(Endpoint(config)) as endpoint:
        yield EndpointPlanner(endpoint)


def test_a_plan_comes_from_a_problem_and_its_reference(server: OpenAiServer, tmp_path: Path) -> None:
    with planner(server, tmp_path) as writer:
        plans = writer.plans(
            [(CHAT, "silence"), (PROBLEM, REFERENCE), (CHAT, "thought"), (CHAT, "7 - 5 = 2")]
        )
    assert plans[:3] == [None, PLAN, None]
    assert plans[3] is not None and len(plans[3]) <= LONGEST_PLAN
    assert not leaks(PLAN, PROBLEM)


def test_a_planner_that_answers_only_with_reasoning_is_named_and_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [(Problem(str(number), f"{number} + 1?", ""), REFERENCE) for number in range(10)]
    thought = "<think>I would add"
    with OpenAiServer(lambda messages: thought) as server, planner(server, tmp_path) as writer:
        with pytest.raises(Paused, match="10 questions in a row.*cannot be read: '<think>I would add'"):
            writer.plans(pairs)
        assert writer.endpoint.take_counts()["endpoint/unreadable"] == 10
    assert any("cannot be read: '<think>I would add'" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "told", ["In the end, 31 are left.", "1. Note that there are 36 eggs.\n2. Subtract."]
)
def test_a_plan_that_gives_a_value_away_is_detected(tmp_path: Path, told: str) -> None:
    with OpenAiServer(lambda messages: told) as server, planner(server, tmp_path) as writer:
        (plan,) = writer.plans([(PROBLEM, REFERENCE)])
    assert plan == told and leaks(plan, PROBLEM)


def test_another_attempt_may_get_another_plan(tmp_path: Path) -> None:
    said = iter(["The answer is 31.", PLAN])
    with OpenAiServer(lambda messages: next(said)) as server, planner(server, tmp_path) as writer:
        plans = [writer.plans([(PROBLEM, REFERENCE)], attempt=attempt)[0] for attempt in (0, 1, 0)]
        assert [request.body["temperature"] for request in server.requests] == [0.0, 1.0]
    assert [plan is not None and leaks(plan, PROBLEM) for plan in plans] == [True, False, True]
