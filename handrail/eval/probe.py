"""What ``handrail probe`` says before any training: which problems give signal, what is wrong with the data, and what to train with."""

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
from handrail.eval.attempts import Attempting, Attempts, claim
from handrail.eval.estimators import dead_at_k, ks, pass_at_k
from handrail.eval.evaluation import estimated, unverified, with_verdicts
from handrail.eval.faults import Reference, faults, references
from handrail.eval.recommend import SURPRISING, recommendation
from handrail.training.config import Config
from handrail.training.policies import load_policy
from handrail.types import Problem, digest
from handrail.verifiers.audit import other_verifiers, rejected_answers, spoils
from handrail.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class Probed:
    """One problem: its attempts (None where its prompt leaves no room for any), its references and its faults."""

    problem: Problem
    attempts: Attempts | None
    references: Sequence[Reference]
    faults: list[str]

    @property
    def kind(self) -> str:
        if self.attempts is None:
            return "not_sampled"
        right, wrong = self.attempts.right, self.attempts.correct.count(False)
        return "mixed" if right and wrong else "all_right" if right else "all_wrong" if wrong else "unverified"

    def line(self) -> str:
        """The problem as ``train`` reads it (``data.train.probe``) and as people may."""
        usual = [
            {
                "tokens": each.tokens,
                "reward": each.reward,
                "correct": each.correct,
                "logp": None if each.logp is None else round(fmean(each.logp), 4),
            }
            for each in self.references
        ]
        rewards = self.attempts.rewards if self.attempts else []
        row = {"id": self.problem.id, "kind": self.kind, "faults": self.faults, "rewards": rewards, "references": usual}
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
    """Attempts every problem of ``source`` ``rollouts`` times and writes ``attempts.jsonl``, ``problems.jsonl`` and ``probe.json``.

    Returns what probe.json holds. Goes on where it was stopped. Raises UserError.
    """
    problems = load_problems(source, config.data.columns)[:limit]
    policy = load_policy(config, accelerator(config.model.device))
    with VerifierPool(config.verifier) as verifier:
        graded = references(problems, policy, verifier)
        rejected = rejected_answers(problems, config.verifier, verifier) or []
        found = faults(problems, policy, graded, {problem.id for problem, _ in rejected})
        sampled = [problem for problem in problems if "prompt_too_long" not in found[problem.id]]
        if not sampled:
            raise UserError(
                f"{source}: no prompt and rollout.max_tokens = {config.rollout.max_tokens} fit the model's context of {policy.context}; "
                "lower rollout.max_tokens"
            )
        what = {"source": source, "limit": limit, "rollouts": rollouts, "seed": seed}
        claim(directory, config, what, {source: problems})
    # Another pool: whether a verifier only fails is judged by the latest that it graded, which here would be the references.
    with VerifierPool(config.verifier) as verifier:
        attempting = Attempting(config, policy, verifier, rollouts, seed)
        with locked(directory):
            attempts = {each.id: each for each in attempting.at(sampled, "probe", directory / "attempts.jsonl", progress)}
    probed = [Probed(problem, attempts.get(problem.id), graded.get(problem.id, []), found[problem.id]) for problem in problems]
    result = figures(probed, rollouts)
    if result["faults"].get("reference_rejected") or result["faults"].get("unverifiable"):
        result["other_verifiers"] = other_verifiers(problems, config.verifier)
    result["recommendation"] = recommendation(result)
    result["spoiled_by"] = spoiled_by(result)
    write_whole(directory / "problems.jsonl", "".join(each.line() for each in probed))
    write_whole(directory / "probe.json", json.dumps(result, indent=1) + "\n")
    return result


def figures(probed: Sequence[Probed], rollouts: int) -> dict[str, Any]:
    """Counts and estimates over the problems; see ``probe``."""
    tried = [each.attempts for each in probed if each.attempts]
    kinds = Counter(each.kind for each in probed)
    every = [reference for each in probed for reference in each.references]
    tokens = [logp for reference in every for logp in reference.logp or ()]
    stuck = [each for each in probed if each.kind == "all_wrong"]
    out: dict[str, Any] = {
        "problems": len(probed),
        "rollouts": rollouts,
        "kinds": {kind: kinds[kind] for kind in ("all_wrong", "mixed", "all_right", "unverified", "not_sampled")},
        "pass": {
            f"pass@{k}": estimated([pass_at_k(len(each.verified), each.right, k) for each in graded])
            for k in ks(rollouts)
            if (graded := with_verdicts(tried, k))
        },
        **unverified(tried),
        "groups": {str(size): groups(tried, size) for size in ks(rollouts) if size > 1},
        "cut_off": fmean(not attempt.finished for each in tried for attempt in each.attempts),
        "with_reference": sum(bool(each.references) for each in probed),
        "all_wrong_with_reference": sum(bool(usable(each)) for each in stuck),
        "faults": dict(Counter(fault for each in probed for fault in each.faults)),
    }
    if every:
        lengths = sorted(reference.tokens for reference in every)
        out["reference_tokens"] = {"median": median(lengths), "longest": lengths[-1]}
    if tokens:
        out["reference_probability"] = math.exp(fmean(tokens))
        out["surprising_tokens"] = fmean(logp < math.log(SURPRISING) for logp in tokens)
    return out


def spoiled_by(found: Mapping[str, Any]) -> list[str]:
    """The faults that would spoil a run, by the rule of ``handrail check``."""
    of = {"answer_rejected": found["problems"]}
    return [fault for fault, n in found["faults"].items() if spoils(fault, n, of.get(fault, found["with_reference"]))]


def usable(each: Probed) -> bool:
    """Whether it has a reference that the verifier accepts and the context holds."""
    return any(reference.correct and reference.logp is not None for reference in each.references)


def groups(tried: Sequence[Attempts], size: int) -> dict[str, Any]:
    """The shares of groups of ``size`` that are all wrong, all right and dead (``wasted``), and the rollouts of a pass in dead ones.

    Unbiased, from more rollouts than ``size``: the chance that ``size`` of them, drawn without replacement, all fail, all succeed, or all
    have the same reward. Unverified ones neither fail nor succeed; the shares are None if no problem has ``size`` verdicts.
    """
    counts = [(len(each.verified), each.right) for each in with_verdicts(tried, size)]
    failing = [1 - pass_at_k(n, right, size) for n, right in counts]
    succeeding = [1 - pass_at_k(n, n - right, size) for n, right in counts]
    wasted = [dead_at_k(each.rewards, size) for each in tried]
    return {
        "all_wrong": estimated(failing) if counts else None,
        "all_right": estimated(succeeding) if counts else None,
        "wasted": estimated(wasted),
        "wasted_rollouts": sum(wasted) * size,
    }
