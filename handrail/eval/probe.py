"""``handrail probe``: find which problems give a signal, which have faults, and what to train with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from handrail._util.errors import UserError
from handrail._util.files import locked, write_whole
from handrail._util.processes import accelerator
from handrail.data.load import load_problems
from handrail.eval.attempts import Attempts, AttemptSampler, claim
from handrail.eval.estimators import dead_at_k, ks, pass_at_k
from handrail.eval.evaluation import estimate, unverified, with_verdicts
from handrail.eval.faults import Reference, faults, references, with_log_probabilities
from handrail.eval.recommend import recommendation
from handrail.training.config import Config
from handrail.training.policies import load_policy
from handrail.types.problem import Problem, digest
from handrail.verifiers.audit import other_verifiers, rejected_answers, spoils
from handrail.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class ProbedProblem:
    """A problem with its attempts (None if its prompt leaves no room for any), references and faults."""

    problem: Problem
    attempts: Attempts | None
    references: Sequence[Reference]
    faults: list[str]

    @property
    def kind(self) -> str:
        if self.attempts is None:
            return "not_sampled"
        right, wrong = self.attempts.right, self.attempts.correct.count(False)
        return (
            "mixed" if right and wrong else "all_right" if right else "all_wrong" if wrong else "unverified"
        )

    def line(self) -> str:
        """Return the line of ``problems.jsonl``, which ``train`` reads if it is a source's ``probe``."""
        usual = [
            {
                "tokens": each.tokens,
                "reward": each.reward,
                "correct": each.correct,
                "logp": None if each.logp is None else round(each.logp / each.tokens, 4),
            }
            for each in self.references
        ]
        rewards = self.attempts.rewards if self.attempts else []
        row = {
            "id": self.problem.id,
            "kind": self.kind,
            "faults": self.faults,
            "rewards": rewards,
            "references": usual,
        }
        return json.dumps({**row, "problem": digest([self.problem])}) + "\n"


def probe(
    config: Config,
    source: str,
    rollouts: int,
    seed: int,
    limit: int | None,
    directory: Path,
    progress: Callable[[float, int], None] = lambda done, n: None,
) -> dict[str, Any]:
    """Attempt every problem of ``source`` ``rollouts`` times, and return the content of ``probe.json``.

    Writes ``references.jsonl``, ``attempts.jsonl``, ``problems.jsonl`` and ``probe.json``; continues a probe
    that was stopped. Raises UserError.
    """
    problems = load_problems(source, config.data.columns)[:limit]
    policy = load_policy(config, accelerator(config.model.device, config.model.dtype))
    with VerifierPool(config.verifier) as verifier:
        graded = references(problems, policy, verifier)
        rejected = rejected_answers(problems, config.verifier, verifier) or []
        found = faults(problems, policy, graded, {problem.id for problem, _ in rejected})
        sampled = [problem for problem in problems if "prompt_too_long" not in found[problem.id]]
        if not sampled:
            raise UserError(
                f"{source}: no prompt leaves room for rollout.max_tokens = {config.rollout.max_tokens} "
                f"in the model's context of {policy.context}; lower rollout.max_tokens"
            )
        what = {"source": source, "limit": limit, "rollouts": rollouts, "seed": seed}
        claim(directory, config, what, {source: problems})
    # A new pool, because a pool decides by its latest verdicts whether the verifier fails, and those of the
    # first pool are on references.
    with VerifierPool(config.verifier) as verifier:
        sampler = AttemptSampler(config, policy, verifier, rollouts, seed)
        with locked(directory):
            graded = with_log_probabilities(problems, graded, policy, directory / "references.jsonl")
            attempts = {
                each.id: each
                for each in sampler.sample(sampled, "probe", directory / "attempts.jsonl", progress)
            }
    probed = [
        ProbedProblem(problem, attempts.get(problem.id), graded.get(problem.id, []), found[problem.id])
        for problem in problems
    ]
    result = figures(probed, rollouts)
    if result["faults"].get("reference_rejected") or result["faults"].get("unverifiable"):
        result["other_verifiers"] = other_verifiers(problems, config.verifier)
    result["recommendation"] = recommendation(result)
    result["spoiled_by"] = spoiled_by(result)
    write_whole(directory / "problems.jsonl", "".join(each.line() for each in probed))
    write_whole(directory / "probe.json", json.dumps(result, indent=1) + "\n")
    return result


def figures(probed: Sequence[ProbedProblem], rollouts: int) -> dict[str, Any]:
    """Compute the counts and estimates over the problems."""
    tried = [each.attempts for each in probed if each.attempts]
    kinds = Counter(each.kind for each in probed)
    every = [reference for each in probed for reference in each.references]
    scored = [(each, each.logp) for each in every if each.logp is not None]
    stuck = [each for each in probed if each.kind == "all_wrong"]
    out: dict[str, Any] = {
        "problems": len(probed),
        "rollouts": rollouts,
        "kinds": {
            kind: kinds[kind] for kind in ("all_wrong", "mixed", "all_right", "unverified", "not_sampled")
        },
        "pass": {
            f"pass@{k}": estimate([pass_at_k(len(each.verified), each.right, k) for each in graded])
            for k in ks(rollouts)
            if (graded := with_verdicts(tried, k))
        },
        **unverified(tried),
        "groups": {str(size): groups(tried, size) for size in ks(rollouts) if size > 1},
        "cut_off": fmean(not attempt.finished for each in tried for attempt in each.attempts),
        "with_reference": sum(bool(each.references) for each in probed),
        "all_wrong_with_reference": sum(has_usable_reference(each) for each in stuck),
        "faults": dict(Counter(fault for each in probed for fault in each.faults)),
    }
    if every:
        lengths = sorted(reference.tokens for reference in every)
        out["reference_tokens"] = {"median": median(lengths), "longest": lengths[-1]}
    if scored:
        tokens = sum(each.tokens for each, _ in scored)
        out["reference_probability"] = math.exp(math.fsum(logp for _, logp in scored) / tokens)
        out["surprising_tokens"] = sum(each.surprising for each, _ in scored) / tokens
    return out


def spoiled_by(found: Mapping[str, Any]) -> list[str]:
    """Return the faults that would spoil a run, by the same rule as ``handrail check``."""
    of = {"answer_rejected": found["problems"]}
    return [
        fault
        for fault, n in found["faults"].items()
        if spoils(fault, n, of.get(fault, found["with_reference"]))
    ]


def has_usable_reference(each: ProbedProblem) -> bool:
    """True if the verifier accepts one of the problem's references and it fits the context."""
    return any(reference.correct and reference.logp is not None for reference in each.references)


def groups(tried: Sequence[Attempts], size: int) -> dict[str, Any]:
    """Estimate what share of groups of ``size`` are all wrong, all right or dead.

    A group is dead (``wasted``) if all its rewards are equal; ``wasted_rollouts`` counts the rollouts of one
    pass in dead groups. The estimates are unbiased: each is the probability that ``size`` of a problem's
    rollouts, drawn without replacement, all fail, all succeed, or all have the same reward. Unverified
    rollouts neither fail nor succeed; the first two shares are None if no problem has ``size`` verdicts.
    """
    counts = [(len(each.verified), each.right) for each in with_verdicts(tried, size)]
    failing = [1 - pass_at_k(n, right, size) for n, right in counts]
    succeeding = [1 - pass_at_k(n, n - right, size) for n, right in counts]
    wasted = [dead_at_k(each.rewards, size) for each in tried]
    return {
        "all_wrong": estimate(failing) if counts else None,
        "all_right": estimate(succeeding) if counts else None,
        "wasted": estimate(wasted),
        "wasted_rollouts": sum(wasted) * size,
    }
