"""Estimators against closed forms, enumeration and simulation."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from handrail.eval.estimators import (
    dead_at_k,
    difficulty,
    free_energy,
    interval,
    ks,
    maj_at_k,
    pass_at_k,
    pick_at_k,
    routed,
    votes,
)
from handrail.training.evaluate import wilson


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(8, 0, 4) == 0 and pass_at_k(8, 8, 1) == 1
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of 6 pairs contain the correct attempt
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 2, 3) == 1


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased() -> None:
    """The expectation over binomial attempts is exactly 1 − (1 − p)^k."""
    n, p = 10, 0.17
    for k in (1, 3, 10):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_maj_at_k_by_hand() -> None:
    # The pairs of (a, a, b) are aa, ab and ab; a wins aa and half of each tie.
    assert maj_at_k([(2, 1.0), (1, 0.0)], 0, 2) == pytest.approx(2 / 3)
    assert maj_at_k([(2, 1.0), (1, 0.0)], 0, 3) == 1
    assert maj_at_k([(1, 1.0), (2, 0.0)], 0, 3) == 0
    # Attempts without an answer do not vote: of a and two of these, a wins whenever it is drawn.
    assert maj_at_k([(1, 1.0)], 2, 2) == pytest.approx(2 / 3)
    assert maj_at_k([], 3, 2) == 0


@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_all_draws(answers: list[str | None], data: st.DataObject) -> None:
    rewards = {"a": 1.0, "b": 0.25, "c": 0.0, "d": 1.0, None: 0.0}
    k = data.draw(st.integers(1, len(answers)))
    total, draws = Fraction(0), 0
    for drawn in combinations(answers, k):
        counts = Counter(answer for answer in drawn if answer is not None)
        winners = [answer for answer in counts if counts[answer] == max(counts.values())]
        total += Fraction(sum(rewards[answer] for answer in winners)) / len(winners) if winners else 0
        draws += 1
    assert maj_at_k(*votes(answers, [rewards[answer] for answer in answers]), k) == pytest.approx(
        float(total / draws)
    )


def test_dead_at_k_by_hand() -> None:
    assert dead_at_k([0, 0, 0.1, 0.1, 0.1, 1], 2) == pytest.approx((1 + 3 + 0) / 15)
    assert dead_at_k([0.1, 0.1, 0.1], 3) == 1
    for right in range(7):  # with rewards of 0 and 1, a dead draw is all wrong or all right
        alike = (1 - pass_at_k(6, right, 3)) + (1 - pass_at_k(6, 6 - right, 3))
        assert dead_at_k([1] * right + [0] * (6 - right), 3) == pytest.approx(alike)


def test_votes() -> None:
    assert votes(["5", None, "4", "5"], [1, 0, 0, 0.5]) == ([(2, 0.75), (1, 0)], 1)


def test_ks() -> None:
    assert [ks(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_an_interval_of_equal_values_has_a_width() -> None:
    assert (interval([0.0] * 50).low, interval([0.0] * 50).high) == pytest.approx(wilson(0, 50))
    assert (interval([1.0] * 50).low, interval([1.0] * 50).high) == pytest.approx(wilson(1, 50))
    assert (interval([3.0, 3.0]).low, interval([3.0, 3.0]).high) == (None, None)
    added = [(0.1 + 0.2 + 0.3) / 3] * 7 + [(0.3 + 0.2 + 0.1) / 3]  # equal except for the order of addition
    assert (interval(added).low, interval(added).high) == pytest.approx(wilson(0.2, 8))


def test_an_interval_depends_only_on_values_and_seed() -> None:
    values = [0, 0.5, 1, 0.25] * 8
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)


@pytest.mark.parametrize("n", [2, 7, 60, 700])
def test_the_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).beta(0.3, 2, n).round(6)
    rng = np.random.default_rng(3)
    wanted = bootstrap((values,), np.mean, n_resamples=2000, confidence_level=0.9, method="BCa", rng=rng)
    found = interval(values.tolist(), 0.9, seed=3)
    ends = wanted.confidence_interval
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-12, abs=1e-12)


def test_the_interval_of_many_problems_needs_little_memory() -> None:
    values = np.random.default_rng(0).integers(0, 2, 20_000).astype(float).tolist()
    tracemalloc.start()
    try:
        found = interval(values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # n values squared would be 3 GB; one batch is 2**20 places and as many values of 8 bytes.
    assert peak < 40 * 2**20
    assert found.low is not None and found.high is not None
    half = 1.96 * 0.5 / math.sqrt(20_000)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_coverage_of_the_bootstrap(level: float) -> None:
    """The interval has its nominal coverage on 60 problems of very different difficulty."""
    draw = np.random.default_rng(5)
    truth, covered, trials = 0.25, 0, 400  # the mean of Beta(1, 3)
    for trial in range(trials):
        found = interval(list(draw.binomial(8, draw.beta(1, 3, 60)) / 8), level, seed=trial)
        covered += found.low is not None and found.high is not None and found.low <= truth <= found.high
    # Allow three standard errors of a share of 400, and one point that a bootstrap over 60 problems may miss.
    slack = 3 * math.sqrt(level * (1 - level) / trials)
    assert level - slack - 0.01 <= covered / trials <= level + slack


def test_difficulty_is_that_of_the_least_likely_tenth_of_the_tokens() -> None:
    assert difficulty([-0.01] * 9 + [-0.5] + [-0.1] * 9 + [-1.0], 40) == pytest.approx(1 - math.exp(-0.75))
    assert difficulty([-0.01] * 9 + [-0.5] + [-0.1] * 8 + [-1.0], 40) == pytest.approx(1 - math.exp(-1.0))
    assert difficulty([-0.2, -0.1], 3) == pytest.approx(1 - math.exp(-0.2))
    assert difficulty([-0.2], 0) is None


def test_free_energy_by_hand() -> None:
    assert free_energy([-0.1, -0.2, -0.3], 12) == pytest.approx(0.050556, abs=1e-6)
    assert free_energy([-0.2] * 3, 12) == pytest.approx(0.05)
    assert free_energy([-0.05, -0.05, -1.1], 12) == pytest.approx(0.120417, abs=1e-6)
    assert free_energy([-0.1], 0) is None


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_pick_at_k_is_the_mean_over_all_draws(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    first = [correct[min(draw)] for draw in combinations(range(len(correct)), k)]
    assert pick_at_k(correct, k) == pytest.approx(sum(first) / len(first))


def test_routing_asks_for_as_many_attempts_as_the_first_finds_needed() -> None:
    """Half of the problems easy, 30 % medium (from 0.3 on) and 20 % hard: 2.3 attempts."""
    difficulties = [0.0] * 4 + [0.29, 0.3, 0.5, 0.69, 0.7, 1.0]
    assert routed([True] * 10, difficulties) == pytest.approx((1.0, 2.3))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.5, 0.9])), min_size=6, max_size=7))
def test_routing_is_the_mean_over_all_first_attempts_and_draws(attempts: list[tuple[bool, float]]) -> None:
    found = []
    for first, (_, unsure) in enumerate(attempts):
        others = [rank for rank in range(len(attempts)) if rank != first]
        draws = [*combinations(others, {0.1: 0, 0.5: 1, 0.9: 5}[unsure])]
        found.append(sum(attempts[min(first, *draw, first)][0] for draw in draws) / len(draws))
    correct, difficulties = zip(*attempts, strict=True)
    assert routed(correct, difficulties)[0] == pytest.approx(sum(found) / len(found))
