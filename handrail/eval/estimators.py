"""Estimators of figures from graded attempts, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pvariance

import numpy as np
from scipy.special import ndtr, ndtri

from handrail.training.evaluate import wilson

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**20
"""Maximum number of values that are drawn at once, so that memory does not grow with the problems."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` problems with its interval; the ends are None if unknown."""

    mean: float
    low: float | None
    high: float | None
    n: int


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimate the probability that at least one of ``k`` attempts is correct.

    The estimate uses ``n`` ≥ k attempts of which ``right`` are correct, and is unbiased if attempts are
    independent: 1 − C(n − right, k) / C(n, k) (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def dead_at_k(rewards: Sequence[float], k: int) -> float:
    """Estimate the probability that ``k`` attempts all earn the same reward.

    The estimate uses the ``rewards`` of n ≥ k attempts, and is unbiased if attempts are independent:
    Σ C(count of r, k) / C(n, k) over the distinct rewards r.
    """
    return sum(math.comb(count, k) for count in Counter(rewards).values()) / math.comb(len(rewards), k)


def maj_at_k(votes: Sequence[tuple[int, float]], silent: int, k: int) -> float:
    """Compute the probability that the most common answer of ``k`` attempts is correct.

    The attempts are drawn without replacement. Ties are split evenly. ``votes`` holds, for every distinct
    answer, how many attempts gave it and what share of them is correct; ``silent`` attempts gave no answer
    and do not vote. The result is exact: a sum over all draws, grouped by the winner's votes, the number of
    answers that tie with it, and the draws used by the other answers. Needs k ≤ the number of attempts.
    """
    total = 0.0
    for place, (count, reward) in enumerate(votes):
        if not reward:
            continue
        others = [other for index, (other, _) in enumerate(votes) if index != place]
        for most in range(1, min(count, k) + 1):
            for (used, tied), ways in _draws(others, most, k - most).items():
                rest = k - most - used
                total += reward / (tied + 1) * math.comb(count, most) * ways * math.comb(silent, rest)
    return total / math.comb(sum(count for count, _ in votes) + silent, k)


def free_energy(logp: Sequence[float], characters: int, coefficient: float = 1.0) -> float | None:
    """Compute (−Σ log p + λ·Var(−log p)) per character of an answer (ODAR, arXiv 2602.23681; secondary).

    The variance is that of the population; λ = ``coefficient`` is not published. None for an empty text.
    """
    if not characters:
        return None
    return (-math.fsum(logp) + coefficient * pvariance(logp)) / characters


def difficulty(logp: Sequence[float], characters: int) -> float | None:
    """Compute how unsure an answer is where it is least sure: 1 minus the geometric mean of the probabilities
    of the least likely tenth of its tokens.

    Our own estimate; ODAR's is not published. A wrong step shows in a few tokens, and a mean over all of them
    hides it (as in DeepConf, arXiv 2508.15260). None for an empty text.
    """
    if not characters:
        return None
    return 1 - math.exp(fmean(sorted(logp)[: max(1, len(logp) // 10)]))


def pick_at_k(correct: Sequence[bool], k: int) -> float:
    """Compute the probability that the preferred one of ``k`` attempts is correct.

    ``correct`` holds all n ≥ k attempts, the most preferred first; k are drawn without replacement. Exact:
    the attempt of rank r from 0 is the preferred one of C(n − r − 1, k − 1) of the C(n, k) draws.
    """
    n = len(correct)
    ways = sum(math.comb(n - rank - 1, k - 1) for rank, right in enumerate(correct) if right)
    return ways / math.comb(n, k)


CALLS = (1, 2, 6)
"""Attempts at an easy, a medium and a hard problem (ODAR)."""


def routed(correct: Sequence[bool], difficulties: Sequence[float]) -> tuple[float, float]:
    """Compute what it brings to try again only if the first attempt finds the problem difficult.

    ``correct`` and ``difficulties``, in [0, 1], hold all n ≥ 6 attempts, the most preferred first. The first
    attempt is any of them. If its difficulty is below 0.3, it is the answer; below 0.7, the preferred one of
    it and another is; else the preferred one of six. Returns the probability that the answer is correct, and
    the mean number of attempts; both exact.

    The thresholds and numbers are ODAR's (arXiv 2602.23681; secondary).
    """
    n, total, called = len(correct), 0.0, 0
    for first, difficulty in enumerate(difficulties):
        k = CALLS[(difficulty >= 0.3) + (difficulty >= 0.7)]
        ways = correct[first] * math.comb(n - 1 - first, k - 1)
        if k > 1:  # a better one is the best of the k - 1 others
            ways += sum(math.comb(n - rank - 2, k - 2) for rank, right in enumerate(correct[:first]) if right)
        total += ways / math.comb(n - 1, k - 1)
        called += k
    return total / n, called / n


def _draws(counts: Sequence[int], most: int, room: int) -> dict[tuple[int, int], int]:
    """Count the ways to draw answers that were given ``counts`` times, each at most ``most`` times.

    The ways are counted by (attempts drawn, answers drawn exactly ``most`` times); at most ``room`` are
    drawn.
    """
    ways = {(0, 0): 1}
    for count in counts:
        grown: dict[tuple[int, int], int] = {}
        for (used, tied), times in ways.items():
            for drawn in range(min(count, most, room - used) + 1):
                key = used + drawn, tied + (drawn == most)
                grown[key] = grown.get(key, 0) + times * math.comb(count, drawn)
        ways = grown
    return ways


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Estimate:
    """Compute the mean of one value per problem, with a bias-corrected, accelerated bootstrap over problems.

    If all values are equal, a bootstrap interval would have no width; the interval is then Wilson's if the
    values are shares (0 to 1), and None otherwise. The same values and ``seed`` give the same interval.
    """
    # Rounded, so that equal shares that were added up in different orders are equal.
    values = [round(value, 12) for value in values]
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        if not 0 <= mean <= 1:
            return Estimate(mean, None, None, len(values))
        return Estimate(mean, *wilson(mean, len(values), NormalDist().inv_cdf((1 + level) / 2)), len(values))
    low, high = _bca(np.asarray(values), level, np.random.default_rng(seed))
    return Estimate(mean, low, high, len(values))


def _bca(values: np.ndarray, level: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return the ends of the bias-corrected, accelerated bootstrap interval of the mean of ``values`` [n].

    The formulas are eq. 14.10 and 14.15 of Efron and Tibshirani, An Introduction to the Bootstrap (1993). The
    numbers are those of ``scipy.stats.bootstrap``, whose jackknife needs n² numbers; that of a mean is in
    closed form, because leaving out a value moves the mean by its distance to it over n − 1.
    """
    n = len(values)
    at_once = max(1, DRAWN_AT_ONCE // n)
    counts = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = np.concatenate([values[rng.integers(0, n, (count, n))].mean(axis=-1) for count in counts])
    mean = values.mean()
    bias = ndtri(((means < mean).mean() + (means <= mean).mean()) / 2)
    distances = values - mean
    acceleration = (distances**3).sum() / (6 * (distances**2).sum() ** 1.5)
    shifted = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(means, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def ks(n: int) -> list[int]:
    """Return 1, 2, 4, … and ``n``."""
    return sorted({*(1 << power for power in range(n.bit_length())), n})


def votes(answers: Sequence[str | None], rewards: Sequence[float]) -> tuple[list[tuple[int, float]], int]:
    """Return the arguments of ``maj_at_k``.

    They are how often each answer was given with its mean reward, and the number of attempts without an
    answer.
    """
    earned: dict[str, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            earned.setdefault(answer, []).append(reward)
    silent = sum(answer is None for answer in answers)
    return [(len(each), math.fsum(each) / len(each)) for each in earned.values()], silent
