"""Corruption: exactly one number of one step changes, and keeps its notation."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handrail.eval.corrupt import another, corrupt
from handrail.experts.planners import NUMBER

STEPS = ["He buys 3 hats at $12.50.\n", "They cost 3 * $12.50 = $37.50.\n", "Nothing here.\n", "#### 1,250"]
written = (
    st.integers(0, 10**12).map(str)
    | st.integers(1000, 10**12).map("{:,}".format)
    | st.decimals(0, 10**6, allow_nan=False, allow_infinity=False, places=2).map(str)
)


@settings(deadline=None)
@given(written, st.integers(0, 2**32))
def test_another_number_has_another_value_and_the_same_form(number: str, seed: int) -> None:
    other = another(number, random.Random(seed))
    assert NUMBER.fullmatch(other)
    assert float(other.replace(",", "")) != float(number.replace(",", ""))
    assert len(other.partition(".")[2]) == len(number.partition(".")[2])
    assert re.fullmatch(
        r"(0|[1-9]\d{0,2}(,\d{3})*)" if "," in number else r"0|[1-9]\d*", other.partition(".")[0]
    )


@settings(deadline=None)
@given(st.lists(st.text(alphabet="a1 2.,$\n", max_size=20), max_size=5), st.integers(0, 2**32))
def test_one_number_in_one_step_changes(steps: list[str], seed: int) -> None:
    found = corrupt(steps, random.Random(seed))
    if found is None:
        assert not any(NUMBER.search(step) for step in steps)
        return
    changed, index = found
    assert len(changed) == len(steps)
    assert [place for place, (new, old) in enumerate(zip(changed, steps, strict=True)) if new != old] == [
        index
    ]
    assert re.sub(r"[\d.,]", "", changed[index]) == re.sub(r"[\d.,]", "", steps[index])


def test_every_number_is_chosen_equally_often() -> None:
    rng = random.Random(0)
    counts = Counter(found[1] for _ in range(3000) if (found := corrupt(STEPS, rng)))
    assert [round(counts[index] / 500) for index in range(4)] == [2, 3, 0, 1]


def test_corruption_depends_only_on_the_seed_and_does_not_change_its_input() -> None:
    before = list(STEPS)
    assert corrupt(STEPS, random.Random(5)) == corrupt(STEPS, random.Random(5))
    assert before == STEPS


@pytest.mark.parametrize("steps", [[], ["no number"], ["9" * 5000]])
def test_a_solution_without_numbers_is_not_corrupted(steps: list[str]) -> None:
    assert corrupt(steps, random.Random(0)) is None
