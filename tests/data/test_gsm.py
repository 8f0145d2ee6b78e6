"""The built-in task gsm-symbolic: its held-out templates, and a level for small models."""

from __future__ import annotations

import pytest

from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.data.tasks.gsm import is_short
from handrail.types.problem import Problem


def templates(problems: list[Problem]) -> set[int]:
    return {problem.metadata["template"] for problem in problems}


@pytest.mark.parametrize("level", ["all", "short"])
def test_no_two_splits_share_a_prompt_and_new_templates_are_new(level: str) -> None:
    splits = ("train", "new-numbers", "new-templates")
    # Splits must not share prompts across seeds either.
    train, numbers, new = (
        load_problems(f"task:gsm-symbolic?n=200&seed={seed}&split={split}&level={level}")
        for seed, split in enumerate(splits)
    )
    assert not templates(train + numbers) & templates(new)
    assert len(templates(train) & templates(numbers)) > 5
    every = train + numbers + new
    assert len({problem.prompt for problem in every}) == len(every) == 600
    assert all(problem.references[0].splitlines()[-1].startswith("#### ") for problem in every)


def test_the_same_seed_gives_the_same_problems() -> None:
    sizes = ("n=5&seed=4", "n=50&seed=4", "n=50&seed=5")
    few, many, other = (load_problems(f"task:gsm-symbolic?level=short&{size}") for size in sizes)
    assert few == many[:5]
    assert not {problem.prompt for problem in many} <= {problem.prompt for problem in other}


def test_the_short_level_has_all_short_problems_and_no_others() -> None:
    every = load_problems("task:gsm-symbolic?n=2000&seed=4")
    expected = [problem.prompt for problem in every if is_short(problem.references[0])]
    short = load_problems(f"task:gsm-symbolic?n={len(expected)}&seed=4&level=short")
    assert [problem.prompt for problem in short] == expected and len(expected) > 10


@pytest.mark.parametrize(
    ("solution", "short"),
    [
        ("2 + 3 = 5 apples\n5 * 5 = 25\n#### 25", True),
        ("5 * 5 = 25.0\n#### 25", True),
        ("2 + 3 = 5 apples\n2 * 13 = 26\n#### 26", False),
        ("5 * 0.5 = 2.5\n2.5 * 2 = 5\n#### 5", False),
        ("1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n#### 4", True),
        ("1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n4 + 1 = 5\n#### 5", False),
        ("2 * 1,000 = 2,000\n2,000 / 1,000 = 2\n#### 2", False),
    ],
)
def test_short_problems_have_three_steps_and_small_whole_numbers(solution: str, short: bool) -> None:
    assert is_short(solution) == short


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="level"):
        load_problems("task:gsm-symbolic?n=5&level=tiny")


@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_a_level_has_its_maximum_number_of_problems(n: int) -> None:
    """A level draws a fixed number of candidates per problem, and this split and level keep the fewest."""
    assert len(load_problems(f"task:gsm-symbolic?n={n}&level=short&split=new-numbers")) == n


def test_a_level_refuses_more_than_its_maximum_number_of_problems() -> None:
    with pytest.raises(UserError, match="1000|1,000|1001"):
        load_problems("task:gsm-symbolic?n=1001&level=short")
