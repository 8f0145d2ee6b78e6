from __future__ import annotations

from fractions import Fraction

import pytest

from handrail.experts.judges.reference import ReferenceJudge, aligned, result
from handrail.types.problem import Problem

REFERENCE = "3 + 4 = 7\n7 * 2 = 1,400 cents\nSo 14.\n#### 14"


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("7 * 2 = 1,400 cents", 1400),
        ("14.0.", 14),
        ("x = 0.50", Fraction(1, 2)),
        ("none", None),
        ("= 1234567", 1234567),
        ("x = -5", -5),
        ("= -$5", -5),
        ("8 - 5", 5),
        ("(3) - 5", 5),
        ("9" * 200, None),
    ],
)
def test_the_result_of_a_step_is_the_last_number_in_it(step: str, number: int | None) -> None:
    assert result(step) == number


@pytest.mark.parametrize(
    ("steps", "scores"),
    [
        (["makes 7", "so 1400", "14"], [1, 1, 1]),
        (["makes 7", "so 1300", "14"], [1, 0, 1]),
        (["let me see", "so 1400", "makes 7"], [None, 1, 0]),
        (["14", "14", "14"], [1, 1, 0]),
        ([], []),
    ],
)
def test_a_step_is_right_if_its_result_comes_next_in_the_reference(
    steps: list[str], scores: list[float | None]
) -> None:
    assert ReferenceJudge().judge([(Problem("p", "", "14", (REFERENCE,)), steps)]) == [scores]


def test_an_attempt_is_judged_by_the_reference_that_it_follows_longest() -> None:
    problem = Problem("p", "", "14", (REFERENCE, "2 * 3 = 6\n6 + 8 = 14"))
    assert ReferenceJudge().judge([(problem, ["so 6", "then 15"]), (problem, ["7", "6"])]) == [[1, 0], [1, 0]]
    assert ReferenceJudge().judge([(Problem("q", "", "14"), ["so 6"])]) == [None]


def test_alignment_goes_forward_only() -> None:
    reference = REFERENCE.split("\n")
    assert [
        aligned(kept, reference) for kept in ([], ["7"], ["1400"], ["1400", "7"], ["14", "14"], ["9"])
    ] == [0, 1, 2, 2, 4, 0]
