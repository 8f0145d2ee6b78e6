from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from handrail.experts.config import EndpointConfig
from handrail.experts.correctors import Correction, Draft, PolicyCorrector, ReferenceCorrector
from handrail.experts.correctors.llm import EndpointCorrector
from handrail.experts.endpoint import Endpoint
from handrail.models.hf import TransformersPolicy
from handrail.types.problem import Problem
from handrail.types.trajectory import Author
from tests.openai_server import OpenAiServer

PROBLEM = Problem("p", "How many?", "14")
REFERENCE = "He has 3 + 4 = 7 apples.\n7 * 2 = 1,400 cents.\nSo 14.\n#### 14"


def corrected(kept: list[str], whole: bool = False, reference: str | None = REFERENCE) -> Correction | None:
    (correction,) = ReferenceCorrector().correct([Draft(PROBLEM, kept, reference)], whole, 0)
    return correction


@pytest.mark.parametrize(
    ("kept", "next_step"),
    [
        (["3 + 4 = 7\n\n"], "7 * 2 = 1,400 cents."),
        (["Let me see.\n\n", "3 + 4 makes 7.0\n\n"], "7 * 2 = 1,400 cents."),
        (["Let me see.\n\n"], "He has 3 + 4 = 7 apples."),
        (["3 + 4 = 7\n\n", "that is 1400\n\n"], "So 14."),
        (["it is 1400\n\n", "7 of them\n\n"], "So 14."),
    ],
)
def test_the_reference_corrector_continues_after_the_last_result_reached(
    kept: list[str], next_step: str
) -> None:
    assert corrected(kept) == Correction(next_step + "\n\n", complete=False, author=Author.REFERENCE)


def test_the_last_step_and_a_whole_suffix_are_marked_complete() -> None:
    assert corrected(["a 7\n", "b 1400\n", "c 14\n"]) == Correction(
        "#### 14", complete=True, author=Author.REFERENCE
    )
    rest = Correction("7 * 2 = 1,400 cents.\nSo 14.\n#### 14", complete=True, author=Author.REFERENCE)
    assert corrected(["a 7\n"], whole=True) == rest
    assert corrected(["7\n", "1400\n", "14\n", "14\n"]) is None
    assert corrected(["7\n"], reference=None) is None


def test_a_policy_with_the_reference_in_its_prompt_continues_the_attempt_by_one_step(
    policy: TransformersPolicy,
) -> None:
    problem = Problem("q", "20 K0 3 K0 2 ?", "46 96", plan=None)  # the rule K0 means: add, then add
    draft = Draft(problem, ["20 + 3 = 23 , 23 + 3 = 26 ; "], "add then add\nadd then add")
    unguided = Draft(problem, draft.kept, None)
    one, nothing = PolicyCorrector(policy, shown=True, max_tokens=24).correct(
        [draft, unguided], False, 0, [1, 2]
    )
    assert (
        one == Correction("26 + 2 = 28 , 28 + 2 = 30 # 26 30", complete=True, author=Author.TEACHER)
        and nothing is None
    )
    (short,) = PolicyCorrector(policy, shown=False, max_tokens=3).correct([unguided], False, 0, [1])
    assert short is None
    three = Draft(Problem("r", "20 K0 3 K0 2 K0 5 ?", ""), draft.kept)
    (step,) = PolicyCorrector(policy, shown=False, max_tokens=24).correct([three], False, 0, [1])
    assert step == Correction("26 + 2 = 28 , 28 + 2 = 30 ;", complete=False)


def test_an_unreadable_correction_from_an_endpoint_is_counted_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drafts = [Draft(PROBLEM, ["3 + 4 = 7\n"]), Draft(PROBLEM, ["Let me see.\n"])]
    with OpenAiServer(
        lambda messages: "<think>hm" if "Let me see." in messages[-1]["content"] else "7 * 2 = 14\n#### 14"
    ) as server:
        cache = str(tmp_path / "cache")
        config = EndpointConfig(base_url=server.url, model="m", api_key_env="NO_SUCH_KEY", cache=cache)
        with closing(Endpoint(config)) as endpoint:
            corrections = EndpointCorrector(endpoint, shown=False).correct(drafts, False, 0)
            counts = endpoint.take_counts()
    assert corrections == [Correction("7 * 2 = 14\n", complete=False), None]
    assert counts["endpoint/unreadable"] == 1
    assert sum("cannot be read: '<think>hm'" in text for text in caplog.messages) == 1
