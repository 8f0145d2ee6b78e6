"""What ``handrail eval`` says of a model: pass@k, maj@k, length and diversity, each with its interval over problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from handrail.config import Config
from handrail.diversity import diversity, measures_of
from handrail.evidence.attempts import Attempting, Attempts, claim
from handrail.evidence.estimators import interval, ks, maj_at_k, pass_at_k, votes
from handrail.files import locked
from handrail.lengths import fitting
from handrail.policy.transformers import TransformersPolicy
from handrail.processes import accelerator
from handrail.progress import show
from handrail.sources import load_problems
from handrail.verifier_pool import VerifierPool


def evaluate_sets(
    config: Config,
    sets: Mapping[str, str],
    samples: int,
    seed: int,
    limit: int | None,
    directory: Path,
    progress: Callable[[str, int, int], None] = lambda name, done, n: None,
) -> dict[str, Any]:
    """``evaluation`` of every set (name -> source), by name; the attempts go to ``directory``. Raises UserError."""
    problems = {name: load_problems(source, config.data.columns)[:limit] for name, source in sets.items()}
    policy = TransformersPolicy(config, accelerator(config.model.device))
    for name, each in problems.items():
        problems[name], left_out = fitting(policy, each, config.data.too_long, references=False)
        if left_out:
            show(f"{name}: {len(left_out)} problems are too long and left out, first {left_out[0]}")
    with VerifierPool(config.verifier) as verifier:
        what = {"sets": dict(sets), "limit": limit, "samples": samples, "seed": seed}
        claim(directory, config, what, {sets[name]: each for name, each in problems.items()})
        attempting = Attempting(config, policy, verifier, samples, seed)
        with locked(directory):
            return {
                name: evaluation(attempting.at(each, name, directory / f"{name}.jsonl", partial(progress, name)))
                for name, each in problems.items()
            }


def evaluation(results: Sequence[Attempts]) -> dict[str, Any]:
    """Figures of one set. Each estimate is a mean over problems with a 95 % bootstrap interval.

    ``pass@k`` counts rewards of 1; ``reward`` is there where some are in between. ``maj@k`` is there where the verifier can say what a
    completion answers.
    """
    n = len(results[0].attempts)
    attempts = [attempt for result in results for attempt in result.attempts]
    out: dict[str, Any] = {"problems": len(results), "samples": n}
    if any(0 < attempt.reward < 1 for attempt in attempts):
        out["reward"] = estimated([sum(result.rewards) / n for result in results])
    for k in ks(n):
        out[f"pass@{k}"] = estimated([pass_at_k(n, result.right, k) for result in results])
    if any(attempt.answer is not None for attempt in attempts):
        counted = [votes([attempt.answer for attempt in result.attempts], result.rewards) for result in results]
        for k in ks(n)[1:]:
            out[f"maj@{k}"] = estimated([maj_at_k(*each, k) for each in counted])
    out["tokens"] = estimated([sum(attempt.tokens for attempt in result.attempts) / n for result in results])
    out["cut_off"] = estimated([sum(not attempt.finished for attempt in result.attempts) / n for result in results])
    out["unverified"] = sum(attempt.status not in ("ok", "cut off") for attempt in attempts)
    out |= diversity([measures_of([attempt.text for attempt in result.attempts], result.correct) for result in results]) if n > 1 else {}
    return out


def estimated(values: Sequence[float]) -> dict[str, float | None]:
    found = interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}
