"""The penalty for overlong completions: by hand, beside other terms, and in a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from handrail import Author, Group, LocalEngine, UserError, train
from handrail.methods.terms import build_term
from handrail.types.trajectory import Trajectory
from tests.conftest import EASY, config
from tests.methods.terms.scripted import PROBLEM, grpo, verb
from tests.training.test_loop import lines


def of_length(tokens: int, reward: float = 1.0, author: Author = Author.POLICY) -> Trajectory:
    return replace(Trajectory.by(author, [1], [5] * tokens), reward=reward, correct=reward == 1)


@pytest.mark.parametrize(
    ("settings", "tokens", "expected"),
    [
        # 48 tokens at most, so the buffer is 9 by default.
        ({}, [1, 39, 40, 43, 48], [1, 1, 1 - 1 / 9, 1 - 4 / 9, 0]),
        ({"buffer": 16, "penalty": 0.5}, [32, 36, 40, 48], [1, 1 - 1 / 8, 3 / 4, 1 / 2]),
        ({"buffer": 100}, [1, 48], [1 - 53 / 100, 0]),  # longer than a completion: the shortest loses, too
    ],
)
def test_rewards_by_hand(
    settings: dict[str, float], tokens: list[int], expected: list[float], engine: LocalEngine
) -> None:
    assert engine.context(0, PROBLEM, "reward").max_tokens == 48
    term = build_term({"name": "overlong", **settings}, 1)
    group, counts = verb(term, "reward", Group(PROBLEM, [of_length(n) for n in tokens]), engine)
    assert group.rewards == pytest.approx(expected)
    assert counts["overlong/penalized"] == sum(reward < 1 for reward in expected)
    assert all(member.correct for member in group.trajectories)


def test_wrong_ones_lose_too_and_references_and_missing_verdicts_stay(engine: LocalEngine) -> None:
    members = [of_length(48, 0.0), of_length(48, 1.0, Author.REFERENCE), of_length(48, math.nan)]
    group, _ = verb(build_term({"name": "overlong"}, 1), "reward", Group(PROBLEM, members), engine)
    rewards = [member.reward for member in group.trajectories]
    assert rewards[:2] == [-1, 1] and math.isnan(rewards[2])


def test_repairs_and_replayed_answers_lose_what_a_rollout_of_their_length_does(engine: LocalEngine) -> None:
    def repair(own: int, others: int, reward: float) -> Trajectory:
        author = torch.tensor([Author.POLICY] * own + [Author.TEACHER] * others)
        return replace(of_length(own + others, reward), author=author)

    reference, replayed = (of_length(44, 1.0, author) for author in (Author.REFERENCE, Author.REPLAY))
    longer = of_length(90, 1.0, Author.REPLAY)  # harvested with a larger limit
    members = [repair(20, 24, 1.0), repair(40, 8, 0.0), replayed, reference, longer]  # the second was cut off
    group, counts = verb(build_term({"name": "overlong"}, 1), "reward", Group(PROBLEM, members), engine)
    # 48 tokens at most and a buffer of 9: 44 tokens are 5 above the 39 that cost nothing, and 48 are 9.
    assert group.rewards == pytest.approx([1 - 5 / 9, -1, 1 - 5 / 9, 1, 0])
    assert counts["overlong/penalized"] == 4


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["overlong", "fapo"], "put fapo before overlong, whose rewards it would overwrite"),
        (["overlong", "olr"], "put olr before overlong"),
        (["imentor", "overlong"], "with overlong, right answers can score below 1 too"),
    ],
)
def test_terms_that_would_undo_it_are_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        grpo(*({"name": name} for name in names))


def test_in_a_run_rewards_fall_and_accuracy_stays(tmp_path: Path) -> None:
    rows = []
    for name, terms in (("without", []), ("with", [{"name": "overlong", "buffer": 40}])):
        settings = config(
            data={"train": f"{EASY}&n=64"}, method={"name": "grpo", "terms": terms}, train={"steps": 1}
        )
        train(settings, tmp_path / name)
        rows.append(lines(tmp_path / name / "metrics.jsonl")[1])
    plain, fallen = rows
    assert fallen["overlong/penalized"] > 0 and fallen["correct"] == plain["correct"] > 0
    assert fallen["reward"] < plain["reward"] == plain["correct"]
