"""The problems of a step: fair shares, complete passes, and no dependence on anything but seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handrail import UserError
from handrail.data.sampler import ProblemSampler, apportion
from handrail.types.problem import Problem


def source(name: str, n: int) -> list[Problem]:
    return [Problem(f"{name}{number}", "?", "!") for number in range(n)]


def ids(schedule: ProblemSampler, *steps: int) -> list[str]:
    return [problem.id for step in steps for problem in schedule.problems(step)]


@pytest.mark.parametrize(
    ("shares", "seats", "quotas"),
    [
        ([1], 7, [7]),
        ([3, 1], 16, [12, 4]),
        ([1, 1, 1], 4, [2, 1, 1]),
        ([0.6, 0.3, 0.1], 8, [5, 2, 1]),
        ([2, 1], 4, [3, 1]),
    ],
)
def test_quotas_are_rounded_by_the_largest_remainder(
    shares: list[float], seats: int, quotas: list[int]
) -> None:
    assert apportion(shares, seats) == quotas


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_quotas_fill_the_step_and_are_within_one_of_their_share(shares: list[float], seats: int) -> None:
    exact = [share / sum(shares) * seats for share in shares]
    try:
        quotas = apportion(shares, seats)
    except UserError:
        assert min(exact) < 1  # only a source whose exact quota is below one problem may get none
    else:
        assert sum(quotas) == seats
        assert all(abs(quota - owed) < 1 + 1e-9 for quota, owed in zip(quotas, exact, strict=True))


def test_a_source_that_would_get_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="source 2 gets none of the 4 problems of a step"):
        apportion([100, 1], 4)


def test_every_problem_comes_once_in_each_pass() -> None:
    schedule = ProblemSampler(
        [source("a", 12), source("b", 4)], [3, 1], 8, seed=1
    )  # 6 and 2 a step: two steps are a pass
    everything = sorted(problem.id for problem in source("a", 12) + source("b", 4))
    passes = [ids(schedule, 2 * epoch + 1, 2 * epoch + 2) for epoch in range(3)]
    assert [sorted(each) for each in passes] == [everything] * 3
    halves = [frozenset(each[:8]) for each in passes]
    assert len(set(halves)) == 3, "each pass has its own order"


def test_a_pass_may_end_within_a_step() -> None:
    counts = Counter(ids(ProblemSampler([source("a", 5)], [1], 3, seed=1), 1, 2, 3, 4, 5))
    assert set(counts.values()) == {3} and len(counts) == 5


def test_a_source_smaller_than_its_quota_repeats_within_a_step() -> None:
    assert Counter(ids(ProblemSampler([source("a", 2)], [1], 6, seed=1), 1)) == {"a0": 3, "a1": 3}


@given(st.integers(), st.permutations(range(1, 9)))
def test_a_step_depends_only_on_the_seed_and_its_number(seed: int, order: list[int]) -> None:
    one, other = (ProblemSampler([source("a", 7), source("b", 3)], [2, 1], 6, seed) for _ in range(2))
    seen = {step: ids(one, step) for step in order}
    assert all(seen[step] == ids(other, step) for step in range(1, 9))


def test_another_seed_gives_another_order() -> None:
    assert len({tuple(ids(ProblemSampler([source("a", 50)], [1], 10, seed), 1)) for seed in range(20)}) == 20


def test_sources_are_mixed_within_a_step() -> None:
    schedule = ProblemSampler([source("a", 50), source("b", 50)], [1, 1], 10, seed=1)
    assert any([name[0] for name in ids(schedule, step)] != ["a"] * 5 + ["b"] * 5 for step in range(1, 4))
