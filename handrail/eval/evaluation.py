"""The figures of ``handrail eval``: pass@k, maj@k, length and diversity, with intervals over problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from handrail._util.files import locked
from handrail._util.processes import accelerator
from handrail._util.progress import show
from handrail.data.load import load_problems
from handrail.eval.attempts import Attempt, Attempts, AttemptSampler, claim
from handrail.eval.estimators import CALLS, interval, ks, maj_at_k, pass_at_k, pick_at_k, routed, votes
from handrail.training.config import Config
from handrail.training.diversity import diversity, measures_of
from handrail.training.lengths import split_by_length
from handrail.training.policies import load_policy
from handrail.verifiers.pool import VerifierPool


def evaluate_sets(
    config: Config,
    sets: Mapping[str, str],
    samples: int,
    seed: int,
    limit: int | None,
    directory: Path,
    progress: Callable[[str, float, int], None] = lambda name, done, n: None,
) -> dict[str, Any]:
    """Evaluate every set (name -> source) and return the figures by name. Raises UserError.

    The attempts are saved in ``directory``.
    """
    problems = {name: load_problems(source, config.data.columns)[:limit] for name, source in sets.items()}
    policy = load_policy(config, accelerator(config.model.device, config.model.dtype))
    for name, each in problems.items():
        problems[name], left_out = split_by_length(policy, each, config.data.too_long, references=False)
        if left_out:
            show(f"{name}: {len(left_out)} problems are too long and are left out, first {left_out[0]}")
    with VerifierPool(config.verifier) as verifier:
        what = {"sets": dict(sets), "limit": limit, "samples": samples, "seed": seed}
        claim(directory, config, what, {sets[name]: each for name, each in problems.items()})
        sampler = AttemptSampler(config, policy, verifier, samples, seed)
        with locked(directory):
            return {
                name: evaluation(
                    sampler.sample(each, name, directory / f"{name}.jsonl", partial(progress, name))
                )
                for name, each in problems.items()
            }


def evaluation(results: Sequence[Attempts]) -> dict[str, Any]:
    """Compute the figures of one set; each estimate is a mean over problems with a 95 % bootstrap interval.

    ``pass@k``, ``maj@k`` and ``reward`` are computed from attempts with a verdict, without the problems that
    have fewer than k of them. ``reward`` is included if some rewards are between 0 and 1, and ``maj@k`` if
    the verifier can read the answer of a completion. ``pick@k``: the answer of least free energy is right.
    ``routed``: the same, of as many attempts as the first one asks for, which are ``routed_attempts``.
    """
    n = len(results[0].attempts)
    attempts = [attempt for result in results for attempt in result.attempts]
    out: dict[str, Any] = {"problems": len(results), "samples": n}
    if any(0 < attempt.reward < 1 for attempt in attempts):
        out["reward"] = estimate(
            [fmean(each.reward for each in result.verified) for result in results if result.verified]
        )
    for k in ks(n):
        if graded := with_verdicts(results, k):
            out[f"pass@{k}"] = estimate(
                [pass_at_k(len(result.verified), result.right, k) for result in graded]
            )
    if any(attempt.answer is not None for attempt in attempts):
        for k in ks(n)[1:]:
            if graded := with_verdicts(results, k):
                out[f"maj@{k}"] = estimate([maj_at_k(*_votes(result), k) for result in graded])
    if any(attempt.energy is not None for attempt in attempts):
        for k in ks(n)[1:]:
            if graded := with_verdicts(results, k):
                out[f"pick@{k}"] = estimate([pick_at_k(_correct(_by_energy(result)), k) for result in graded])
    if any(attempt.difficulty is not None for attempt in attempts) and (
        graded := with_verdicts(results, max(CALLS))
    ):
        found = [routed(_correct(each), _difficulties(each)) for each in map(_by_energy, graded)]
        out["routed"], out["routed_attempts"] = map(estimate, zip(*found, strict=True))
    out["tokens"] = estimate([sum(attempt.tokens for attempt in result.attempts) / n for result in results])
    out["cut_off"] = estimate(
        [sum(not attempt.finished for attempt in result.attempts) / n for result in results]
    )
    out |= unverified(results)
    out |= (
        diversity(
            [measures_of([attempt.text for attempt in result.attempts], result.correct) for result in results]
        )
        if n > 1
        else {}
    )
    return out


def with_verdicts(results: Sequence[Attempts], k: int) -> list[Attempts]:
    """Return the results with a verdict on at least ``k`` attempts."""
    return [result for result in results if len(result.verified) >= k]


def _by_energy(result: Attempts) -> list[Attempt]:
    """The attempts with a verdict, the least free energy first."""
    return sorted(result.verified, key=lambda each: inf if each.energy is None else each.energy)


def _correct(attempts: Sequence[Attempt]) -> list[bool]:
    return [each.correct is True for each in attempts]


def _difficulties(attempts: Sequence[Attempt]) -> list[float]:
    """An attempt without text has the greatest."""
    return [1.0 if each.difficulty is None else each.difficulty for each in attempts]


def _votes(result: Attempts) -> tuple[list[tuple[int, float]], int]:
    return votes(
        [each.answer for each in result.verified], [float(each.correct is True) for each in result.verified]
    )


def unverified(results: Sequence[Attempts]) -> dict[str, Any]:
    """Count the attempts without a verdict; ``first_unverified`` says why the first of them has none."""
    found = [(result.id, each) for result in results for each in result.attempts if each.correct is None]
    if not found:
        return {"unverified": 0}
    name, first = found[0]
    return {
        "unverified": len(found),
        "first_unverified": " ".join(f"{name} ({first.status}): {first.detail:.200}".split()),
    }


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of the values with its interval."""
    found = interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}
