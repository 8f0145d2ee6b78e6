"""PACR: gains in the answer's likelihood, by hand, against plain forward passes, and at their edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from handrail import Author, Group, LocalEngine, TrainablePolicy, load_problems
from handrail.methods.requests import Request, Verify
from handrail.methods.terms import build_term
from handrail.methods.terms.step_tokens import discounted, number_steps, tokens_before
from tests.conftest import EASY
from tests.methods.terms.scripted import PROBLEM, advantages, close, member, queue, verb

FIRST, SECOND = (-3.0, -2.0, -2.5, -0.5), (-1.0, -0.8)


def test_discounted_gains_by_hand() -> None:
    gains = [1.0, -0.5, 2.0]
    assert discounted(gains, 1.0).tolist() == close([2.5, 1.5, 2.0], 1e-12)
    assert discounted(gains, 0.9).tolist() == close([2.17, 1.3, 2.0], 1e-12)


@pytest.mark.parametrize(
    ("gamma", "scaled"), [(0.9, [1.0, 0.5584, 0.9137, 0.0]), (1.0, [1.0, 0.5652, 0.7826, 0.0])]
)
def test_the_groups_steps_are_scaled_together(
    gamma: float, scaled: list[float], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    group = Group(PROBLEM, [member(policy, "77 ; 8 2 ; 70"), member(policy, "77 8").with_advantage(0.5)])
    term = build_term({"name": "pacr", "gamma": gamma}, 1)
    found, _ = verb(term, "credit", group, engine, queue(*FIRST, *SECOND))
    a, b, c, d = (0.1 * value for value in scaled)
    assert advantages(found) == [close([a, a, b, b, b, c]), close([0.5 + d] * 2)]
    doubled = build_term({"name": "pacr", "gamma": gamma, "outcome_coef": 2.0, "step_coef": 1.0}, 1)
    found, _ = verb(doubled, "credit", group, engine, queue(*FIRST, *SECOND))
    assert advantages(found)[1] == close([1.0 + scaled[3]] * 2)


def test_centred_and_sparse_variants(policy: TrainablePolicy, engine: LocalEngine) -> None:
    group = Group(PROBLEM, [member(policy, "77 ; 8 2 ; 70"), member(policy, "77 8")])
    centered = build_term({"name": "pacr", "step_coef": 1.0, "center": True}, 1)
    found, _ = verb(centered, "credit", group, engine, queue(*FIRST, *SECOND))
    mean = (2 * 1 + 3 * 0.5652 + 0.7826 + 0) / 8
    assert advantages(found)[0] == close([1 - mean] * 2 + [0.5652 - mean] * 3 + [0.7826 - mean])
    assert sum(map(sum, advantages(found))) == pytest.approx(0, abs=1e-6)
    sparse = build_term({"name": "pacr", "step_coef": 1.0, "values": "rollout"}, 1)
    found, _ = verb(sparse, "credit", group, engine, queue(*FIRST, *SECOND))
    assert advantages(found) == [[1.0] * 6, [0.0] * 2]


def test_equal_gains_give_nothing(policy: TrainablePolicy, engine: LocalEngine) -> None:
    group = Group(PROBLEM, [member(policy, "77 ; 8"), member(policy, "70")])
    found, _ = verb(
        build_term({"name": "pacr"}, 1), "credit", group, engine, queue(-2.0, -1.5, -1.0, -2.0, -1.5)
    )
    # g is .5 and .5, and .5: with γ = 1 the first step's G is 1.
    assert advantages(found)[0][0] > advantages(found)[0][-1] == advantages(found)[1][0] == 0
    flat = build_term({"name": "pacr", "gamma": 0.0, "center": True}, 1)
    found, _ = verb(flat, "credit", group, engine, queue(-2.0, -1.5, -1.0, -2.0, -1.5))
    assert not any(map(any, advantages(found)))


def test_a_rollout_without_a_verdict_is_neither_scored_nor_credited(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """Its gain of 9 would be the group's largest, and would halve the others."""
    unverified = member(policy, "77 8", math.nan, correct=None)
    group = Group(PROBLEM, [member(policy, "77"), unverified, member(policy, "8")])
    term = build_term({"name": "pacr", "step_coef": 1.0}, 1)
    found, _ = verb(term, "credit", group, engine, queue(-9.0, -4.5, -9.0, -9.0))
    assert advantages(found) == [[1.0], [0.0, 0.0], [0.0]]


def test_gains_are_those_of_plain_forward_passes(policy: TrainablePolicy, engine: LocalEngine) -> None:
    """The answer's log-probability behind the prompt, the first step, and the second up to the answer."""
    right = member(policy, "77 + 8 = 85 ; 85 * 2 = 70 # 70", 1.0, end=True)
    wrong = member(policy, "77 * 2 = 54 # 54", end=True)
    term = build_term({"name": "pacr", "answer_template": " # {answer}", "step_coef": 1.0}, 1)
    found, _ = verb(term, "credit", Group(PROBLEM, [right, wrong]), engine)
    answer = policy.renderer.completion(" # 70", end=False)

    def c(text: str) -> float:
        ids = right.prompt_ids + policy.renderer.completion(text, end=False) + answer
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        begin = len(ids) - len(answer)
        return sum(float(logits[at - 1, ids[at]]) for at in range(begin, len(ids)))

    gains = [c(text) for text in ("", "77 + 8 = 85 ;", "77 + 8 = 85 ; 85 * 2 = 70")]
    other = [c(text) for text in ("", "77 * 2 = 54")]
    # Returns telescope at γ = 1.
    returns = [gains[2] - gains[0], gains[2] - gains[1], other[1] - other[0]]
    low, high = min(returns), max(returns)
    scaled = [(value - low) / (high - low) for value in returns]
    expected = [[scaled[0]] * 6 + [scaled[1]] * 8, [scaled[2]] * len(wrong)]
    assert advantages(found) == [close(row, 1e-4) for row in expected]


def test_the_answer_is_likelier_after_the_right_steps(policy: TrainablePolicy, engine: LocalEngine) -> None:
    """The backbone knows the rules of these problems, so the last right step leads to the answer."""
    term = build_term({"name": "pacr", "answer_template": " # {answer}", "step_coef": 1.0, "gamma": 0.0}, 1)
    likelier = 0
    for problem in load_problems(f"{EASY}&n=20"):
        right = replace(member(policy, problem.references[0]), prompt_ids=policy.renderer.prompt(problem))
        steps, number = number_steps(right, policy.renderer, None)
        if len(steps) > 1:
            found, _ = verb(term, "credit", Group(problem, [right]), engine)
            likelier += advantages(found)[0][-1] == 1.0  # the largest gain of all steps
        else:
            likelier += 1
    assert likelier >= 18


def test_steps_tokens_and_the_answer(policy: TrainablePolicy) -> None:
    whole = member(policy, "77 + 8 = 85 ; 85 * 2 = 70 # 70", end=True)
    steps, number = number_steps(whole, policy.renderer, None)
    assert steps == ["77 + 8 = 85 ; ", "85 * 2 = 70 # 70"] and number.tolist() == [0] * 6 + [1] * 8
    assert tokens_before(" # ", steps, whole, policy.renderer) == 11
    assert tokens_before("54", steps, whole, policy.renderer) == 13  # all but the end
    unmarked = member(policy, "77 8", end=True)
    assert number_steps(unmarked, policy.renderer, None)[1].tolist() == [0, 0, 0]
    empty = member(policy, "", end=True)
    assert number_steps(empty, policy.renderer, None)[0] == [""]


def test_the_answer_that_a_rollout_gives_is_cut_whether_right_or_wrong(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """Without words before the answer; rewards that another term has set stay as they are."""
    right = member(policy, "77 + 8 = 85 ; 85 * 2 = 70 # 70", 1.0, end=True)
    wrong = member(policy, "77 * 2 = 54 # 54", -1.0, end=True)
    term, scored = build_term({"name": "pacr"}, 1), []

    def answer(request: Request) -> Any:
        if isinstance(request, Verify):
            return engine.verify([(request.problem, request.trajectory)], answers=request.answer)[0]
        scored.append(len(request.prompt_ids) - len(right.prompt_ids))  # type: ignore[attr-defined]
        return torch.zeros(1)

    read, _ = verb(term, "guide", Group(PROBLEM, [right, wrong]), engine, answer)
    assert [each.answer for each in read.trajectories] == ["70", "54"] and read.rewards == [1.0, -1.0]
    verb(term, "credit", read, engine, answer)
    assert scored == [0, 6, 12, 0, 6]  # up to "#", which the template does not name
    led = build_term({"name": "pacr", "answer_template": " # {answer}"}, 1)
    assert verb(led, "guide", Group(PROBLEM, [right]), engine, queue())[0].trajectories[0].answer is None


def test_edges_have_a_defined_result_and_a_count(policy: TrainablePolicy, engine: LocalEngine) -> None:
    term = build_term({"name": "pacr"}, 1)
    long = member(policy, "77 8")
    long = replace(long, prompt_ids=[5] * int(policy.context or 0)).with_advantage(0.5)
    found, counts = verb(term, "credit", Group(PROBLEM, [long, member(policy, "77")]), engine)
    assert advantages(found)[0] == [0.5, 0.5] and counts["pacr/too_long"] == counts["pacr/scored"] == 1
    found, counts = verb(term, "credit", Group(replace(PROBLEM, answer=""), [long]), engine)
    assert advantages(found) == [[0.5, 0.5]] and counts["pacr/no_answer"] == 1
    foreign = replace(member(policy, "77 8"), author=torch.tensor([int(Author.REFERENCE)] * 2))
    found, _ = verb(term, "credit", Group(PROBLEM, [foreign.with_advantage(0.5)]), engine, queue())
    assert advantages(found) == [[0.5, 0.5]]
    found, _ = verb(term, "credit", Group(PROBLEM, [member(policy, "", end=True)]), engine)
    assert advantages(found) == [[0.0]] and not math.isnan(advantages(found)[0][0])
