"""Diversity of a group's completions: each measure is a pure function that returns None if it is
undefined."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from sacrebleu.metrics.bleu import BLEU

from handrail.experts.planners import CALCULATOR_NOTE, NUMBER
from handrail.experts.steps import split_steps
from handrail.types.trajectory import Group

ORDERS = range(1, 5)
MOST_COMPARED = 16
# The symbols of a step, that is, all but its words; a lone letter is a variable.
SYMBOL = re.compile(rf"{NUMBER.pattern}|\\[a-z]+|(?<![a-z'’])[a-z](?![a-z])|[-−+*×·/÷^!%=<>≤≥≠()]")
NAMES = ("distinct_4", "one_minus_self_bleu", "distinct_first_steps", "correct_derivations")


def diversity(measured: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of each measure over the groups in which it is defined; None if there is no such group."""
    out: dict[str, float | None] = {}
    for name in NAMES:
        values = [value for values in measured if (value := values[name]) is not None]
        out[f"diversity/{name}"] = math.fsum(values) / len(values) if values else None
    return out


def measures(group: Group, step_end: str | None = None) -> dict[str, float | None]:
    """Compute every measure on a group's rollouts; ``step_end`` is the regular expression that ends a
    step."""
    return measures_of(
        [rollout.text for rollout in group.rollouts],
        [rollout.correct for rollout in group.rollouts],
        step_end,
    )


def measures_of(
    texts: Sequence[str], correct: Sequence[bool | None], step_end: str | None = None
) -> dict[str, float | None]:
    """Compute every measure on completions of one problem."""
    steps = [split_steps(text, step_end) for text in texts]
    values = (
        distinct_n(texts),
        self_bleu_diversity(texts),
        distinct_prefixes(steps),
        distinct_derivations(texts, correct, step_end),
    )
    return dict(zip(NAMES, values, strict=True))


def distinct_n(texts: Sequence[str], n: int = 4) -> float | None:
    """Ratio of distinct to all word n-grams of the group (arXiv 1510.03055); None also if no text has n
    words."""
    grams = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if len(texts) > 1 and grams else None


def self_bleu_diversity(texts: Sequence[str]) -> float | None:
    """1 − mean sentence BLEU of every text against every other, after self-BLEU (arXiv 1802.01886).

    Uses sacrebleu's BLEU on whitespace-separated words, with effective order and exponential smoothing; the
    BLEU of equal texts is 1. Of more than 16 texts, the first 16 are compared, because the time grows with
    the square of their number.
    """
    texts = texts[:MOST_COMPARED]
    if len(texts) < 2:
        return None
    times = Counter(tuple(text.split()) for text in texts)
    found = {words: [multiset(ngrams(words, n)) for n in ORDERS] for words in times}
    similar = [float(n * (n - 1)) for n in times.values()]
    for a, b in combinations(times, 2):
        shared = [len(one & other) for one, other in zip(found[a], found[b], strict=True)]
        there = bleu(shared, len(a), len(b))
        back = there if len(a) == len(b) else bleu(shared, len(b), len(a))
        similar.append(times[a] * times[b] * (there + back))
    return max(0.0, 1 - math.fsum(similar) / (len(texts) * (len(texts) - 1)))


def distinct_prefixes(steps: Sequence[Sequence[str]], k: int = 1) -> float | None:
    """Ratio of distinct first ``k`` steps to completions, ignoring whitespace and step endings."""
    prefixes = {tuple(map(normal, each[:k])) for each in steps}
    return len(prefixes) / len(steps) if len(steps) > 1 else None


def distinct_derivations(
    texts: Sequence[str], correct: Sequence[bool | None], step_end: str | None = None
) -> int | None:
    """Number of distinct derivations among the correct completions."""
    right = {
        derivation(text, step_end) for text, is_correct in zip(texts, correct, strict=True) if is_correct
    }
    return len(right) if len(texts) > 1 else None


def derivation(text: str, step_end: str | None = None) -> tuple[str, ...]:
    """Numbers, variables and signs of the steps with an equals sign; if no step has one, all normalized
    steps.

    Two derivations are thus equal if they differ only in words, case, layout or a separate step for the
    answer.
    """
    steps = [step.casefold() for step in split_steps(CALCULATOR_NOTE.sub("", text), step_end)]
    said = [symbol.replace(",", "") for step in steps if "=" in step for symbol in SYMBOL.findall(step)]
    return tuple(said or map(normal, steps))


def normal(step: str) -> str:
    return " ".join(step.split()).rstrip(" .;")


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def multiset(grams: Sequence[tuple[str, ...]]) -> set[object]:
    """Number repeated n-grams, so that set intersection counts each as often as both sides contain it."""
    distinct: set[object] = set(grams)
    if len(distinct) == len(grams):
        return distinct
    return distinct.union((gram, i) for gram, times in Counter(grams).items() for i in range(1, times))


def bleu(shared: Sequence[int], length: int, reference_length: int) -> float:
    """Sentence BLEU in [0, 1], given the number of shared n-grams of a text and its single reference."""
    possible = [max(0, length + 1 - n) for n in ORDERS]
    score = BLEU.compute_bleu(
        [*shared], possible, length, reference_length, smooth_method="exp", effective_order=True
    ).score
    return float(score) / 100
