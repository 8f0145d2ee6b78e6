"""The user's own judge, corrector and planner, by ``file.py:Name``: they work in training, and if they fail,
the run says so in one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from handrail import UserError, train
from handrail._util.imports import load_attribute
from handrail.experts.config import Role
from handrail.experts.registry import BUILT_IN, Experts
from tests.conftest import EASY, config

MINE = '''
from handrail.experts.correctors import Correction
from handrail.experts.steps import split_steps


def same(step, other):
    return step.strip(" ;") == other.strip(" ;")


class Judge:
    """Knows the one right derivation."""

    def judge(self, attempts):
        scores = []
        for problem, steps in attempts:
            right = split_steps(problem.references[0])
            scores.append([float(at < len(right) and same(step, right[at])) for at, step in enumerate(steps)])
        return scores


class Corrector:
    """Copies the rest of the derivation."""

    def correct(self, drafts, whole, attempt, seeds):
        assert whole and len(seeds) == len(set(seeds)) == len(drafts)
        rest = ["".join(split_steps(draft.reference)[len(draft.kept):]) for draft in drafts]
        return [Correction(text, complete=True) for text in rest]


class Planner:
    """The data's own plans."""

    def plans(self, pairs, seeds):
        assert len(seeds) == len(set(seeds)) == len(pairs)
        return [problem.plan for problem, reference in pairs]


class Raising:
    def judge(self, attempts):
        raise ValueError("no idea")

    def correct(self, drafts, whole, attempt, seeds):
        raise ValueError("no idea")

    def plans(self, pairs, seeds):
        raise ValueError("no idea")


class Short:
    """Leaves the last question out."""

    def judge(self, attempts):
        return [[1.0] * len(steps) for _, steps in attempts[:-1]]

    def correct(self, drafts, whole, attempt, seeds):
        return [None] * (len(drafts) - 1)

    def plans(self, pairs, seeds):
        return [None] * (len(pairs) - 1)


class Coarse:
    def judge(self, attempts):
        return [[1.0] * (len(steps) + 1) for _, steps in attempts]


class Mute:
    pass


class Demanding:
    def __init__(self, path):
        self.path = path
'''
HOT = {"max_tokens": 48, "group_size": 8, "temperature": 2.0}
"""A temperature at which rollouts fail after a right step."""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def run(role: Role, name: str, output: Path) -> list[dict[str, Any]]:
    """Return the metrics of two steps of a method that asks the expert."""
    if role == "planner":
        train(config(method={"name": "sort", "planner": name}), output)
    else:
        experts = {"judge": "reference", "corrector": "reference", role: name}
        method = {
            "name": "scope",
            **experts,
            "mode": "suffix",
            "min_correct_prefix": 0.0,
            "placing": "append",
        }
        train(config(method=method, data={"train": f"{EASY}&n=64"}, rollout=HOT), output)
    return lines(output / "metrics.jsonl")[1:]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_users_planner_trains_like_the_built_in_one(mine: Path, tmp_path: Path) -> None:
    own, column = (
        run("planner", name, tmp_path / str(place))
        for place, name in enumerate((f"{mine}:Planner", "column"))
    )
    assert own == column and own[0]["planner/asked"] > 0


@pytest.mark.parametrize(
    ("role", "name", "author"), [("judge", "Judge", "reference"), ("corrector", "Corrector", "teacher")]
)
def test_a_users_judge_and_corrector_repair_rollouts(
    role: Role, name: str, author: str, mine: Path, tmp_path: Path
) -> None:
    rows = run(role, f"{mine}:{name}", tmp_path / "run")
    assert (
        sum(row[f"{role}/asked"] for row in rows) > 0
        and sum(row.get("scope/repaired", 0) for row in rows) > 0
    )
    repaired = [
        row for row in lines(tmp_path / "run/samples.jsonl") if {"policy", author} <= set(row["author"])
    ]
    assert repaired and all(row["reward"] == 1 for row in repaired)


ROLES: tuple[Role, ...] = ("judge", "corrector", "planner")
VERBS = {"judge": "judge", "corrector": "correct", "planner": "plans"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("Raising", "the {role} {mine}:Raising fails: ValueError: no idea"),
        ("Short", "{mine}:Short gives "),
        ("Mute", "{mine}:Mute has no method {verb}, which every {role} needs"),
        ("Demanding", "{mine}:Demanding cannot be made without arguments: TypeError: "),
        ("Nobody", "{mine} has no 'Nobody'"),
    ],
)
def test_an_unusable_expert_is_named_in_one_sentence(
    role: Role, name: str, complaint: str, mine: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run(role, f"{mine}:{name}", tmp_path / "run")
    said = str(caught.value)
    assert complaint.format(role=role, mine=mine, verb=VERBS[role]) in said and "\n" not in said
    if name == "Short":
        assert "answers to" in said and "return one for each" in said
    at_once = name in ("Mute", "Demanding", "Nobody")  # before anything is sampled
    assert at_once == (not (tmp_path / "run/metrics.jsonl").exists())


def test_a_judge_that_scores_more_steps_than_there_are_is_named(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the judge .*mine.py:Coarse gives \d+ scores to \d+ steps; return one for each"
    ):
        run("judge", f"{mine}:Coarse", tmp_path / "run")


@pytest.mark.parametrize(
    ("role", "name", "hint"),
    [
        ("judge", "rule", "did you mean 'arithmetic'?"),
        ("judge", "refrence", "did you mean 'reference'?"),
        ("judge", "somebody", "there are: arithmetic, reference, prm, llm"),
        ("corrector", "polcy", "did you mean 'policy'?"),
        ("planner", "rules", "did you mean 'rule'?"),
        ("planner", "arithmetic", "there are: auto, column, rule, outline, policy, endpoint"),
    ],
)
def test_an_unknown_name_is_answered_with_a_similar_one(
    role: Role, name: str, hint: str, tmp_path: Path
) -> None:
    complaint = f"method.{role}: there is no {role} {name!r}; {hint}"
    with pytest.raises(UserError) as caught:
        Experts().check(role, name, f"method.{role}")
    assert str(caught.value) == complaint
    with pytest.raises(UserError) as caught:
        run(role, name, tmp_path / "run")
    assert str(caught.value) == complaint and not (tmp_path / "run").exists()


def test_experts_without_dependencies_can_be_opened_by_name() -> None:
    for role, names in BUILT_IN.items():
        for name in {*names} - {"prm", "llm", "policy", "model", "endpoint"}:
            Experts().check(role, name, f"method.{role}")


@pytest.mark.parametrize(
    ("role", "code", "sentence"),
    [
        (
            "judge",
            "def judge(self, attempts): return [0.5 for _ in attempts]",
            "return a list with a score for each",
        ),
        (
            "judge",
            "def judge(self, attempts): return [['good'] * len(s) for _, s in attempts]",
            "the score 'good'",
        ),
        (
            "corrector",
            "def correct(self, drafts, whole, attempt, seeds): return ['x' for _ in drafts]",
            "Correction",
        ),
        (
            "planner",
            "def plans(self, pairs, seeds): return [7 for _ in pairs]",
            "gives 7 for a plan; return a string",
        ),
    ],
)
def test_an_answer_of_the_wrong_form_is_reported_in_one_sentence(
    role: Role, code: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_text(f"class Odd:\n    {code}\n")
    with pytest.raises(UserError, match=rf"the {role} .*odd.py:Odd .*{sentence}"):
        run(role, f"{tmp_path}/odd.py:Odd", tmp_path / "run")


def test_a_file_is_imported_once_and_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """So a method and a term of one file share its classes, and objects of all of them can be pickled."""
    for number, directory in enumerate("ab"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "judge.py").write_text(f"class Judge:\n    number = {number}\n")
    first = load_attribute(str(tmp_path / "a/judge.py") + ":Judge", "experts.judge")
    other = load_attribute(str(tmp_path / "b/judge.py") + ":Judge", "experts.judge")
    assert load_attribute(str(tmp_path / "b/../a/judge.py") + ":Judge", "experts.judge") is first
    assert (first.number, other.number) == (0, 1)
    assert isinstance(pickle.loads(pickle.dumps(first())), first)
    assert isinstance(pickle.loads(pickle.dumps(other())), other)


def test_a_file_that_changed_is_imported_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Judge:\n    number = 1\n")
    assert load_attribute(f"{file}:Judge", "experts.judge").number == 1
    file.write_text("class Judge:\n    number = 10\n    raise ValueError\n")
    for _ in range(2):  # what failed halfway is not taken for imported
        with pytest.raises(UserError, match="mine.py cannot be imported: ValueError"):
            load_attribute(f"{file}:Judge", "experts.judge")
    file.write_text("class Judge:\n    number = 100\n")
    assert load_attribute(f"{file}:Judge", "experts.judge").number == 100
