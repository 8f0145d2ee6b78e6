"""Test whether SORT's weights find the structure of a reference. For our tasks, the structure words are
known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from scipy.stats import mannwhitneyu
from torch import Tensor

from benchmarks.suite.suite import Cell, Suite, job
from handrail._util.processes import accelerator
from handrail.data.load import load_problems
from handrail.data.tasks import structure
from handrail.eval.estimators import Estimate, interval
from handrail.training.config import Config
from handrail.training.policies import load_policy
from handrail.types.problem import Problem

PROBLEMS = 50
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "p0 (α = 0)": lambda logp0, logp1: logp0,
    "w (α = ½)": lambda logp0, logp1: (logp0 + logp1) / 2,
    "p1 (α = 1)": lambda logp0, logp1: logp1,
    "p1 / p0": lambda logp0, logp1: logp1 - logp0,
}
"""Logarithm of a token's weight, from its log-probabilities without and with the plan; the last entry is the
effect of the plan alone."""


def auc(weights: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Probability that a positive token has a larger weight than a negative one; ties count half. None if
    there are tokens of only one kind."""
    ours = [weight for weight, is_positive in zip(weights, positive, strict=True) if is_positive]
    others = [weight for weight, is_positive in zip(weights, positive, strict=True) if not is_positive]
    return (
        float(mannwhitneyu(ours, others).statistic) / (len(ours) * len(others)) if ours and others else None
    )


def weights_of(suite: Suite) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``structure_found`` for every backbone and style of a suite, on its training problems; empty if
    these are not our tasks'."""
    sources = suite.base["data"]["train"]
    if not all("task:" in str(source) for source in ([sources] if isinstance(sources, str) else sources)):
        return {}
    out = {}
    for style in suite.styles:
        for backbone in suite.backbones:
            cell = Cell(
                "evidence",
                backbone,
                style,
                next(iter(suite.methods)),
                suite.seeds[0],
                suite.learning_rates[0],
            )
            out[f"{backbone}, {style}"] = structure_found(job(suite, cell, Path()).config, PROBLEMS)
    return out


def structure_found(config: Config, n: int) -> dict[str, dict[str, float]]:
    """Return weight -> AUC of the model's weights for finding structure words, the mean over references with
    its interval.

    The first ``n`` problems of each training source are scored. Words that introduce a step in the foreign
    style are left out, because they are neither structure nor result.
    """
    policy = load_policy(config, accelerator(config.model.device, config.model.dtype))
    problems = [problem for source in config.data.train for problem in load_problems(source.path)[:n]]
    completions = [policy.renderer.completion(problem.references[0], end=False) for problem in problems]
    without = policy.score([policy.renderer.prompt(problem) for problem in problems], completions)
    planned = policy.score(
        [policy.renderer.prompt(problem, problem.plan) for problem in problems], completions
    )
    return {
        name: asdict(_over(problems, [weigh(*pair) for pair in zip(without, planned, strict=True)]))
        for name, weigh in WEIGHTS.items()
    }


def _over(problems: Sequence[Problem], weights: Sequence[Tensor]) -> Estimate:
    found = []
    for problem, row in zip(problems, weights, strict=True):
        labels = structure(problem, problem.references[0])
        kept = [
            (weight, label) for weight, label in zip(row.tolist(), labels, strict=True) if label is not None
        ]
        area = auc([weight for weight, _ in kept], [label for _, label in kept])
        found += [] if area is None else [area]
    return interval(found)
