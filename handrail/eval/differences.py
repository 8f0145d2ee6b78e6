"""Compare runs by paired differences over seeds and problems, in words that claim no more than figures do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from handrail.eval.estimators import interval

Rewards = Mapping[int, Mapping[str, float]]
"""Map seed -> problem -> its mean reward."""


@dataclass(frozen=True)
class Difference:
    """How much more of a held-out set ``a`` solves than ``b``: a mean of paired differences with interval."""

    set: str
    a: str
    b: str
    mean: float
    low: float
    high: float
    per_seed: list[float]
    problems: int

    @property
    def words(self) -> str:
        figures = f"{100 * self.mean:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        agreeing = sum(each * self.mean > 0 for each in self.per_seed)
        n = len(self.per_seed)
        seeds = "one seed, others may differ" if n == 1 else f"the same way on {agreeing} of {n} seeds"
        if self.low > 0 or self.high < 0:
            more = "more" if self.low > 0 else "less"
            return f"{self.a} solves {more} of {self.set} than {self.b}: {figures}; {seeds}."
        return f"{self.a} against {self.b} on {self.set}: no difference shown, {figures}; {seeds}."

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "words": self.words}


def paired(
    name: str, a: str, b: str, ours: Rewards, theirs: Rewards, level: float = 0.95, most: float = 1.0
) -> Difference:
    """Compute the difference on the held-out set ``name``, over the seeds and problems that both runs have.

    At each end, the interval is the wider of two: a bootstrap over problems (each problem's mean over seeds)
    and, if there are several seeds, Student's over seeds. Both are needed, because seeds train different
    models and problems differ in difficulty. The bootstrap includes two imaginary problems, with the largest
    possible difference (``most``) in favor of either side (after Agresti and Min, 2005). Without them, a
    handful of problems that differ would count as proof.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    problems = sorted(set.intersection(*(set(rewards[seed]) for seed in seeds for rewards in (ours, theirs))))
    per_problem = [
        fmean(ours[seed][problem] - theirs[seed][problem] for seed in seeds) for problem in problems
    ]
    per_seed = [fmean(ours[seed][problem] - theirs[seed][problem] for problem in problems) for seed in seeds]
    mean = fmean(per_seed)
    over_problems = interval([*per_problem, most, -most], level)
    # The values differ, at least by the two imaginary ones, so there is an interval.
    assert over_problems.low is not None and over_problems.high is not None
    low, high = over_problems.low, over_problems.high
    if len(seeds) > 1:
        half = half_width(per_seed, level)
        low, high = min(low, mean - half), max(high, mean + half)
    return Difference(name, a, b, mean, max(low, -most), min(high, most), per_seed, len(problems))


def over_seeds(
    name: str, a: str, b: str, ours: Mapping[int, float], theirs: Mapping[int, float], level: float = 0.95
) -> Difference:
    """Compute the difference of one figure per seed, with Student's interval over the common seeds.

    With a single common seed, the interval is infinite.
    """
    per_seed = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    half = half_width(per_seed, level) if len(per_seed) > 1 else float("inf")
    mean = fmean(per_seed)
    return Difference(name, a, b, mean, mean - half, mean + half, per_seed, 0)


def half_width(values: Sequence[float], level: float) -> float:
    """Return half the width of Student's interval around the mean."""
    quantile: float = student.ppf((1 + level) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def against_first(rewards: Mapping[str, Mapping[str, Rewards]]) -> list[Difference]:
    """Compare every run with the first on every set (run -> set -> rewards).

    The level of each interval is chosen so that all hold jointly with 95 % confidence (Bonferroni).
    """
    if not rewards:
        return []
    (first, base), *others = rewards.items()
    pairs = [
        (name, run, sets[name])
        for run, sets in others
        for name in base
        if name in sets and comparable(sets[name], base[name])
    ]
    return [paired(name, run, first, ours, base[name], 1 - 0.05 / len(pairs)) for name, run, ours in pairs]


def comparable(ours: Rewards, theirs: Rewards) -> bool:
    """True if both runs have a verdict on a problem in every seed that both have."""
    seeds = ours.keys() & theirs.keys()
    return bool(seeds) and bool(
        set.intersection(*(set(run[seed]) for seed in seeds for run in (ours, theirs)))
    )


def verdict(
    differences: Sequence[Difference], ended_by: Mapping[str, set[str]], budget: str | None
) -> list[str]:
    """Put the result of a comparison into sentences.

    ``ended_by`` maps every run to what ended it, over its seeds. ``budget`` is the unit of the budget that
    should have ended the runs, if there is one.
    """
    sentences = [difference.words for difference in differences]
    if differences:
        n = len(differences)
        paired_over = "over problems and seeds, paired"
        sentences.append(
            f"The interval holds with 95 % confidence, {paired_over}."
            if n == 1
            else f"The {n} intervals hold jointly with 95 % confidence, {paired_over} (Bonferroni)."
        )
    early = [run for run, ends in ended_by.items() if budget and ends != {budget}]
    if early:
        sentences.append(
            f"{' and '.join(early)} reached train.steps before the budget of {budget} was spent, "
            "so the runs did not all spend the same."
        )
    return sentences
