"""FAPO: rewards of right, flawed and wrong rollouts, by hand and with a real judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from handrail import Author, Group, LocalEngine, TrainablePolicy
from handrail.methods.terms import build_term
from tests.methods.terms.scripted import PROBLEM, advantages, close, grpo, member, queue, verb


@pytest.mark.parametrize(
    ("clean", "flawed", "wrong", "expected"),
    [
        (3, 1, 4, (1.1351, 0.1261, -0.8828)),
        (5, 1, 2, (0.6821, -0.4093, -1.5007)),
        (0, 2, 2, (None, 0.8659, -0.8659)),
    ],
)
def test_advantages_by_hand(
    clean: int,
    flawed: int,
    wrong: int,
    expected: tuple[float, ...],
    policy: TrainablePolicy,
    engine: LocalEngine,
) -> None:
    rewards = [1.0] * (clean + flawed) + [0.0] * wrong
    group = Group(PROBLEM, [member(policy, "77", reward) for reward in rewards])
    term = build_term({"name": "fapo"}, 1)
    answers = queue(*[[1.0]] * clean, *[[0.0]] * flawed)  # only right rollouts are judged
    judged, counts = verb(term, "reward", group, engine, answers)
    assert [each.reward for each in judged.trajectories] == [1.0] * clean + [0.0] * flawed + [-1.0] * wrong
    assert (counts["fapo/judged"], counts["fapo/flawed"]) == (clean + flawed, flawed)
    found = [row[0] for row in advantages(grpo().advantages(judged))]
    kinds = [expected[0]] * clean + [expected[1]] * flawed + [expected[2]] * wrong
    assert found == close(kinds)
    assert judged.all_wrong is False and judged.mixed


def test_a_judge_that_fails_a_missing_verdict_and_a_reference(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    right, unverified = member(policy, "77", 1.0), member(policy, "77", math.nan, correct=None)
    reference = replace(member(policy, "77", 1.0), author=torch.tensor([int(Author.REFERENCE)]))
    wrong_reference = replace(reference, reward=0.0, correct=False)
    group = Group(PROBLEM, [right, unverified, reference, wrong_reference])
    judged, counts = verb(build_term({"name": "fapo"}, 1), "reward", group, engine, queue(None))
    rewards = [each.reward for each in judged.trajectories]
    assert rewards[0] == 1.0 and math.isnan(rewards[1]) and rewards[2:] == [1.0, -1.0]
    assert (counts["fapo/judged"], counts["fapo/not_judged"]) == (1, 1)


@pytest.mark.parametrize(
    ("authors", "reward"),
    [
        ((Author.REPLAY, Author.REPLAY), 0.0),
        ((Author.POLICY, Author.TEACHER), 0.0),
        ((Author.POLICY, Author.REFERENCE), 0.0),
        ((Author.REFERENCE, Author.ENVIRONMENT), 1.0),
    ],
)
def test_repairs_and_replayed_answers_are_judged_like_rollouts(
    authors: tuple[Author, Author], reward: float, policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """The judge finds the only step wrong; it is asked unless all trained tokens are a reference's."""
    added = replace(member(policy, "77 8", 1.0), author=torch.tensor([int(each) for each in authors]))
    term = build_term({"name": "fapo"}, 1)
    found, counts = verb(term, "reward", Group(PROBLEM, [added]), engine, queue([0.0]))
    assert found.rewards == [reward] and counts["fapo/judged"] == (reward == 0)


def test_with_the_real_judge_and_under_luffy(policy: TrainablePolicy, engine: LocalEngine) -> None:
    """A wrong reference earns what a wrong rollout earns, although the method adds it later."""
    texts = ("77 + 8 = 85 ; 85 * 2 = 70 # 70", "77 + 8 = 86 ; 86 * 2 = 70 # 70", "# 71")
    problem = replace(PROBLEM, references=("77 # 71",))
    method = grpo({"name": "fapo"}, name="luffy")
    (graded,) = engine.reward(method, [Group(problem, [member(policy, text) for text in texts])])
    assert [each.reward for each in graded.trajectories] == [1.0, 0.0, -1.0]
    assert graded.trajectories[1].judged == [("77 + 8 = 86 ; ", 0.0), ("86 * 2 = 70 # 70", None)]
    ((mixed,),) = engine.guide(method, [graded])
    assert [each.reward for each in mixed.trajectories] == [1.0, 0.0, -1.0, -1.0]
