"""Is one run better than another? Paired over seeds and problems, with words that say no more than the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from handrail.eval.estimators import interval

Rewards = Mapping[int, Mapping[str, float]]
"""Seed -> problem -> its mean reward."""


@dataclass(frozen=True)
class Difference:
    """How much more of a held-out set ``a`` solves than ``b``: a mean of paired differences with its interval."""

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
            return f"{self.a} solves {'more' if self.low > 0 else 'less'} of {self.set} than {self.b}: {figures}; {seeds}."
        return f"{self.a} against {self.b} on {self.set}: no difference shown, {figures}; {seeds}."

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "words": self.words}


def paired(
    name: str, a: str, b: str, ours: Rewards, theirs: Rewards, level: float = 0.95, most: float = 1.0
) -> Difference:
    """The difference on the held-out set ``name``, over the seeds and problems that both have.

    Its interval is at each end the wider of two: a bootstrap over problems (of each problem's mean over seeds) and Student's over
    seeds, if there are several. Seeds train different models and problems differ in difficulty; neither interval covers both. The
    bootstrap also draws from two problems that nobody saw, one the largest difference there can be (``most``) for either side (after
    Agresti and Min, 2005): without them, a handful of problems that differ would pass for proof.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    problems = sorted(set.intersection(*(set(rewards[seed]) for seed in seeds for rewards in (ours, theirs))))
    per_problem = [
        fmean(ours[seed][problem] - theirs[seed][problem] for seed in seeds) for problem in problems
    ]
    per_seed = [fmean(ours[seed][problem] - theirs[seed][problem] for problem in problems) for seed in seeds]
    mean = fmean(per_seed)
    over_problems = interval([*per_problem, most, -most], level)
    assert over_problems.low is not None and over_problems.high is not None  # they differ by twice ``most``
    low, high = over_problems.low, over_problems.high
    if len(seeds) > 1:
        half = half_width(per_seed, level)
        low, high = min(low, mean - half), max(high, mean + half)
    return Difference(name, a, b, mean, max(low, -most), min(high, most), per_seed, len(problems))


def over_seeds(
    name: str, a: str, b: str, ours: Mapping[int, float], theirs: Mapping[int, float], level: float = 0.95
) -> Difference:
    """The difference of one figure a seed, with Student's interval over the seeds that both have; of one seed, none at all is known."""
    per_seed = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    half = half_width(per_seed, level) if len(per_seed) > 1 else float("inf")
    mean = fmean(per_seed)
    return Difference(name, a, b, mean, mean - half, mean + half, per_seed, 0)


def half_width(values: Sequence[float], level: float) -> float:
    """Half of Student's interval around the mean."""
    quantile: float = student.ppf((1 + level) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def against_first(rewards: Mapping[str, Mapping[str, Rewards]]) -> list[Difference]:
    """Every run against the first one on every set (run -> set -> rewards), at a level at which all intervals hold together with 95 %."""
    if not rewards:  # nothing is held out
        return []
    (first, base), *others = rewards.items()
    n = len(others) * len(base)
    return [
        paired(name, run, first, sets[name], base[name], 1 - 0.05 / n) for run, sets in others for name in base if base[name]
    ]  # fmt: skip


def verdict(
    differences: Sequence[Difference], ended_by: Mapping[str, set[str]], budget: str | None
) -> list[str]:
    """Sentences. ``ended_by`` says of every run what ended it, over its seeds; ``budget`` names the budget that was to, if one was."""
    sentences = [difference.words for difference in differences]
    if differences:
        n = len(differences)
        sentences.append(
            "Intervals are 95 %, over problems and seeds, paired."
            if n == 1
            else f"The {n} intervals hold together with 95 %, over problems and seeds, paired (Bonferroni)."
        )
    early = [run for run, ends in ended_by.items() if budget and ends != {budget}]
    if early:
        sentences.append(
            f"{' and '.join(early)} ended at train.steps with {budget} to spare, so the runs did not spend the same."
        )
    return sentences
