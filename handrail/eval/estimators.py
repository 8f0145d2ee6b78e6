"""From graded attempts to figures, and how sure we are of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import bootstrap

from handrail.training.evaluate import wilson

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` problems with its interval; None where nothing is known of it."""

    mean: float
    low: float | None
    high: float | None
    n: int


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that of ``k`` attempts, drawn from ``n`` of which ``right`` are right, one is right at least.

    Unbiased for k independent attempts: 1 − C(n − right, k) / C(n, k) (arXiv 2107.03374, eq. 1). Needs k ≤ n.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def dead_at_k(rewards: Sequence[float], k: int) -> float:
    """The chance that ``k`` attempts, drawn without replacement from those that earned ``rewards``, all earn the same.

    Unbiased for k independent attempts: Σ C(count of r, k) / C(n, k) over the distinct rewards r. Needs k ≤ the number of rewards.
    """
    return sum(math.comb(count, k) for count in Counter(rewards).values()) / math.comb(len(rewards), k)


def maj_at_k(votes: Sequence[tuple[int, float]], silent: int, k: int) -> float:
    """The chance that the commonest answer is correct among ``k`` attempts drawn without replacement, ties split evenly.

    ``votes`` holds, for every distinct answer, how many attempts gave it and which share is correct; ``silent`` attempts gave none and
    do not vote. Exact: a sum over all draws, counted by the winner's votes, the number of answers that tie with it and the draws
    that the others use up. Needs k ≤ the number of attempts.
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


def _draws(counts: Sequence[int], most: int, room: int) -> dict[tuple[int, int], int]:
    """In how many ways answers given ``counts`` times are drawn at most ``most`` times each, by (attempts used, answers at ``most``)."""
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
    """The mean of one value a problem, with the interval of a bias-corrected, accelerated bootstrap over problems.

    Equal values, of which a bootstrap would say that nothing else was possible, get Wilson's interval if they are shares (0 to 1), and
    otherwise none. The same values and ``seed`` give the same interval.
    """
    values = [
        round(value, 12) for value in values
    ]  # so that equal shares, added up in another order, are equal
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        if not 0 <= mean <= 1:
            return Estimate(mean, None, None, len(values))
        return Estimate(mean, *wilson(mean, len(values), NormalDist().inv_cdf((1 + level) / 2)), len(values))
    found = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(values))


def ks(n: int) -> list[int]:
    """1, 2, 4, … and ``n``."""
    return sorted({*(1 << power for power in range(n.bit_length())), n})


def votes(answers: Sequence[str | None], rewards: Sequence[float]) -> tuple[list[tuple[int, float]], int]:
    """What ``maj_at_k`` takes: how often each answer was given and its mean reward, and the number of attempts without an answer."""
    earned: dict[str, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            earned.setdefault(answer, []).append(reward)
    return [(len(each), math.fsum(each) / len(each)) for each in earned.values()], sum(
        answer is None for answer in answers
    )
