"""ProRAG: z-scores of a judge's scores over the tokens of a group, by hand and at their edges."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from handrail import Author, Group, LocalEngine, TrainablePolicy
from handrail.methods.base import Method, Term
from handrail.methods.terms import build_term
from tests.methods.terms.scripted import PROBLEM, Answer, advantages, close, grpo, member, queue, verb


def credited(
    term: Method[Any] | Term, group: Group, engine: LocalEngine, answer: Answer | None = None
) -> tuple[Group, Counter[str]]:
    """The group after the two verbs of the term, alone or under GRPO, and what they count."""
    judge = term.terms[0] if isinstance(term, Method) else term
    judged, counts = verb(judge, "guide", group, engine, answer)
    found, more = verb(term, "credit", judged, engine, answer)
    return found, counts + more


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def group(policy: TrainablePolicy, *rewards: float) -> Group:
    """Three and one token in two steps, and two tokens in one."""
    return Group(
        PROBLEM,
        [member(policy, text, reward) for text, reward in zip(("77 8 ; 9", "77 8"), rewards, strict=True)],
    )


SCORES = ([sigmoid(2), sigmoid(-1)], [sigmoid(0)])


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [((3.0, 1.0), (0.9914, 0.2314, -0.8957)), ((1.0, 1.0), (0.2843, -0.4757, -0.1887))],
)
def test_by_hand_on_top_of_grpo(
    rewards: tuple[float, float], expected: tuple[float, ...], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    found, _ = credited(grpo({"name": "prorag"}), group(policy, *rewards), engine, queue(*SCORES))
    a, b, c = expected
    assert advantages(found) == [close([a, a, a, b]), close([c, c])]
    assert found.has_signal  # also if all rewards are equal


@pytest.mark.parametrize(
    ("form", "z"), [(None, (0.9478, -1.5856, -0.6289)), ("7|;", (0.5605, -2.2168, 0.2677))]
)
def test_the_form_of_a_step_counts(
    form: str | None, z: tuple[float, ...], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    term = build_term({"name": "prorag", "beta": 1.0, "step_form": form}, 1)
    found, counts = credited(term, group(policy, 0.0, 0.0), engine, queue(*SCORES))
    assert advantages(found) == [close([z[0]] * 3 + [z[1]]), close([z[2]] * 2)]
    assert counts["prorag/invalid_steps"] == (form is not None)


@pytest.mark.parametrize(
    ("scores", "unscored", "unjudged"),
    [
        (([0.3, 0.3], [0.3]), 0, 0),
        (([None, None], [0.3]), 2, 0),
        ((None, None), 3, 2),
        (([0.1, None], None), 2, 1),
    ],
)
def test_equal_and_missing_scores_change_nothing(
    scores: Any, unscored: int, unjudged: int, policy: TrainablePolicy, engine: LocalEngine
) -> None:
    found, counts = credited(
        build_term({"name": "prorag"}, 1), group(policy, 0.0, 0.0), engine, queue(*scores)
    )
    assert not any(map(any, advantages(found)))
    assert (counts["prorag/unscored_steps"], counts["prorag/not_judged"]) == (unscored, unjudged)
    assert counts["prorag/judged"] == 2 - unjudged


def test_a_step_without_a_score_enters_no_statistic(policy: TrainablePolicy, engine: LocalEngine) -> None:
    term = build_term({"name": "prorag", "beta": 1.0}, 1)
    found, _ = credited(term, group(policy, 0.0, 0.0), engine, queue([0.9, None], [0.1]))
    # mean .58 over five tokens, deviation .3919
    assert advantages(found) == [close([0.8165] * 3 + [0.0]), close([-1.2247] * 2)]


def test_a_rollout_without_a_verdict_is_neither_judged_nor_credited(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """Scores .9 and .1 of one token each: mean .5 and deviation .4, so z is 1 and −1."""
    unverified = member(policy, "77 8", math.nan, correct=None)
    term = build_term({"name": "prorag", "beta": 1.0}, 1)
    whole = Group(PROBLEM, [member(policy, "77"), unverified, member(policy, "8")])
    found, _ = credited(term, whole, engine, queue([0.9], [0.1]))
    assert advantages(found) == [close([1.0]), [0.0, 0.0], close([-1.0])]


def test_a_single_token_and_others_tokens(policy: TrainablePolicy, engine: LocalEngine) -> None:
    term = build_term({"name": "prorag", "beta": 1.0}, 1)
    lone = Group(PROBLEM, [member(policy, "77")])
    assert advantages(credited(term, lone, engine, queue([0.9]))[0]) == [[0.0]]
    repaired = replace(member(policy, "77 8 ; 9"), author=torch.tensor([0, 0, 0, int(Author.TEACHER)]))
    found, _ = credited(
        term, Group(PROBLEM, [repaired, member(policy, "77")]), engine, queue([0.9, 0.0], [0.1])
    )
    # The teacher's token is in no statistic: mean .7 over four tokens, deviation .3464.
    assert advantages(found) == [close([0.5774] * 3 + [0.0]), close([-1.7321])]


def test_the_real_judge_tells_a_false_step(policy: TrainablePolicy, engine: LocalEngine) -> None:
    members = [member(policy, text, 1.0) for text in ("77 + 8 = 85 ; # 70", "77 + 8 = 86 ; # 70")]
    found, _ = credited(grpo({"name": "prorag"}), Group(PROBLEM, members), engine)
    # The judge has nothing to say of the last step: z is 1 and −1 on the first, 0 on it.
    assert advantages(found) == [close([0.3] * 6 + [0.0] * 2), close([-0.3] * 6 + [0.0] * 2)]
