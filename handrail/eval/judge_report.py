"""Measure how well a step judge finds the first wrong step, on solutions in which that step is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from handrail._util.seeds import derive
from handrail.eval.corrupt import corrupt
from handrail.experts.judges import StepJudge, first_error
from handrail.experts.steps import split_steps
from handrail.training.evaluate import Accuracy
from handrail.types.problem import Problem


@dataclass(frozen=True)
class Labeled:
    """A solution; ``wrong`` is the index of its wrong step, ``original`` that step before the change."""

    problem: Problem
    steps: list[str]
    wrong: int | None = None
    original: str | None = None


def labeled(problems: Sequence[Problem], seed: int) -> list[Labeled]:
    """Return the first reference of every problem, unchanged and with one number in one step changed.

    The unchanged reference is assumed to be correct. Problems without a reference are skipped.
    """
    found = []
    for problem in problems:
        if not problem.references:
            continue
        steps = split_steps(problem.references[0])
        found.append(Labeled(problem, steps))
        changed = corrupt(steps, random.Random(derive("corrupt", seed, problem.id)))
        if changed:
            found.append(Labeled(problem, changed[0], changed[1], steps[changed[1]]))
    return found


def report(judge: StepJudge, labeled: Sequence[Labeled], threshold: float = 0.5) -> dict[str, Any]:
    """Return counts, shares with 95 % Wilson intervals (None if nothing is counted), and every failure.

    ``precision`` is the share of solutions in which the judge names the labeled step, among those in which
    it names any step; ``recall`` is that share among the wrong solutions. ``false_alarms`` is the share of
    correct solutions in which it names a step. ``not_judged`` is the share of all solutions in which no step
    has a score.
    """
    all_scores = judge.judge([(one.problem, one.steps) for one in labeled])
    named = [first_error(scores, threshold) if scores else None for scores in all_scores]
    failures = [_failure(one, step) for one, step in zip(labeled, named, strict=True) if step != one.wrong]
    pairs = [(one.wrong, step) for one, step in zip(labeled, named, strict=True)]
    return {
        "threshold": threshold,
        "right": sum(wrong is None for wrong, _ in pairs),
        "wrong": sum(wrong is not None for wrong, _ in pairs),
        "precision": _share([step == wrong for wrong, step in pairs if step is not None]),
        "recall": _share([step == wrong for wrong, step in pairs if wrong is not None]),
        "false_alarms": _share([step is not None for wrong, step in pairs if wrong is None]),
        "not_judged": _share([all(score is None for score in scores or []) for scores in all_scores]),
        "failures": failures,
    }


def _share(hits: Sequence[bool]) -> dict[str, float] | None:
    return asdict(Accuracy.of([float(hit) for hit in hits])) if hits else None


def _failure(one: Labeled, named: int | None) -> dict[str, Any]:
    kind = "false alarm" if one.wrong is None else "missed" if named is None else "misplaced"
    failure: dict[str, Any] = {"problem": one.problem.id, "kind": kind, "wrong": one.wrong, "named": named}
    if one.wrong is not None:
        failure |= {"wrong_step": one.steps[one.wrong], "original": one.original}
    if named is not None:
        failure["named_step"] = one.steps[named]
    return failure
