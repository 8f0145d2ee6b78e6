"""The built-in task of reasoning-gym's GSM-Symbolic: whole templates held out, and a level for small models."""

from __future__ import annotations

import pytest

from handrail.errors import UserError
from handrail.problems import Problem
from handrail.sources import load_problems
from handrail.tasks.gsm import is_short


def templates(problems: list[Problem]) -> set[int]:
    return {problem.metadata["template"] for problem in problems}


@pytest.mark.parametrize("level", ["all", "short"])
def test_splits_share_no_template_and_no_prompt_comes_twice(level: str) -> None:
    train, test = (load_problems(f"task:gsm-symbolic?n=300&seed=4&split={split}&level={level}") for split in ("train", "test"))
    assert len(train) == len(test) == 300
    assert not templates(train) & templates(test)
    assert len({problem.prompt for problem in train + test}) == 600
    assert all(problem.references[0].splitlines()[-1].startswith("#### ") for problem in train + test)


def test_the_same_seed_gives_the_same_problems() -> None:
    sizes = ("n=5&seed=4", "n=50&seed=4", "n=50&seed=5")
    few, many, other = (load_problems(f"task:gsm-symbolic?level=short&{size}") for size in sizes)
    assert few == many[:5]
    assert not {problem.prompt for problem in many} & {problem.prompt for problem in other}


def test_short_problems_are_those_of_all_that_are_short() -> None:
    every = load_problems("task:gsm-symbolic?n=2000&seed=4")
    short = load_problems("task:gsm-symbolic?n=100&seed=4&level=short")
    expected = [problem for problem in every if is_short(problem.references[0])][:100]
    assert [problem.prompt for problem in short] == [problem.prompt for problem in expected]


@pytest.mark.parametrize(
    ("solution", "short"),
    [
        ("2 + 3 = 5 apples\n5 * 10 = 50\n#### 50", True),
        ("5 * 10 = 50.0\n#### 50", True),
        ("2 + 3 = 5 apples\n5 * 11 = 55\n#### 55", False),
        ("5 * 0.5 = 2.5\n2.5 * 2 = 5\n#### 5", False),
        ("1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n#### 4", True),
        ("1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n4 + 1 = 5\n#### 5", False),
        ("2 * 1,000 = 2,000\n2,000 / 1,000 = 2\n#### 2", False),
    ],
)
def test_short_is_of_three_steps_and_small_whole_numbers(solution: str, short: bool) -> None:
    assert is_short(solution) == short


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="level"):
        load_problems("task:gsm-symbolic?n=5&level=tiny")


@pytest.mark.parametrize("split", ["train", "test"])
def test_as_many_as_a_level_allows_are_there_and_more_are_refused(split: str) -> None:
    assert len(load_problems(f"task:gsm-symbolic?n=2000&level=short&split={split}")) == 2000
    with pytest.raises(UserError, match="2000|2,000|2001"):
        load_problems(f"task:gsm-symbolic?n=2001&level=short&split={split}")
