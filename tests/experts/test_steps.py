from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handrail.experts.steps import split_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1 + 1 = 2 , 2 * 2 = 4 ; 4 - 1 = 3 # 4 3", ["1 + 1 = 2 , 2 * 2 = 4 ; ", "4 - 1 = 3 # 4 3"]),
        ("First.\n\nThen a\nb.\n\n\nDone.", ["First.\n\n", "Then a\nb.\n\n\n", "Done."]),
        ("He has 3.5.\nSo 4; not 5.\n#### 4\n", ["He has 3.5.\n", "So 4; not 5.\n", "#### 4\n"]),
        ("He has 3.5 kg. He eats 1. Left: 2.5.", ["He has 3.5 kg. ", "He eats 1. ", "Left: 2.5."]),
        ("\n\nFirst\n\nSecond\n\n", ["\n\nFirst\n\n", "Second\n\n"]),
        ("one step", ["one step"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_steps_end_at_the_coarsest_separator_in_the_solution(text: str, steps: list[str]) -> None:
    assert split_steps(text) == steps


def test_the_end_of_a_step_can_be_configured() -> None:
    assert split_steps("a -> b\n\nc -> d", r"-> ") == ["a -> ", "b\n\nc -> ", "d"]


@given(st.text(alphabet="ab1.;! \n\t", max_size=40), st.sampled_from([None, "x*", ";|", r"\s"]))
def test_joined_steps_give_the_solution_and_no_step_is_blank(text: str, end: str | None) -> None:
    steps = split_steps(text, end)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps)
