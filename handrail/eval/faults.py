"""Find faults in training data, problem by problem, before a model attempts them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

from handrail._util.files import write_whole
from handrail.eval.recommend import SURPRISING
from handrail.models.hf import TransformersPolicy
from handrail.types.problem import Problem
from handrail.verifiers.pool import VerifierPool

FAULTS = {
    "answer_rejected": "the verifier refuses the problem's own answer",
    "reference_rejected": "the verifier refuses the problem's own reference",
    "unverifiable": "the verifier reaches no verdict on the problem's own reference",
    "prompt_too_long": "the prompt and rollout.max_tokens exceed the context",
    "reference_too_long": "the prompt and the reference exceed the context",
    "reference_over_max_tokens": "the reference is longer than rollout.max_tokens, the limit of a rollout",
    "duplicate": "an earlier problem has the same prompt",
    "contradiction": "another problem has the same prompt and a different answer",
}


@dataclass(frozen=True)
class Reference:
    """A worked solution as the model sees it.

    ``logp`` is its log-probability, the sum over its tokens; None if the prompt and the reference exceed the
    context, or before ``with_log_probabilities``. ``surprising`` is the number of tokens with a probability
    below SURPRISING. ``correct`` is the verifier's verdict, None if the reference is unverified.
    """

    tokens: int
    reward: float
    correct: bool | None
    logp: float | None
    surprising: int = 0


def references(
    problems: Sequence[Problem], policy: TransformersPolicy, verifier: VerifierPool
) -> dict[str, list[Reference]]:
    """Grade the references of every problem; return them by the problem's id, without log-probabilities."""
    flat = [(problem, text) for problem in problems for text in problem.references]
    completions = [policy.renderer.reference(problem, text) for problem, text in flat]
    said = [
        (problem, policy.renderer.text(completion))
        for (problem, _), completion in zip(flat, completions, strict=True)
    ]
    out: dict[str, list[Reference]] = defaultdict(list)
    for (problem, _), completion, verdict in zip(said, completions, verifier.grade(said), strict=True):
        out[problem.id].append(Reference(len(completion), verdict.reward, verdict.correct, None))
    return out


def with_log_probabilities(
    problems: Sequence[Problem],
    graded: Mapping[str, Sequence[Reference]],
    policy: TransformersPolicy,
    file: Path,
) -> dict[str, list[Reference]]:
    """Score the ``graded`` references of every problem; return them by the problem's id.

    ``file`` keeps the scores, so that a probe that is continued does not compute them again.
    """
    flat = [(problem, text) for problem in problems for text in problem.references]
    scores = _read_scores(file, [problem.id for problem, _ in flat])
    if not scores:
        scores = _score(flat, policy)
        rows = (
            {"id": problem.id, "logp": logp, "surprising": surprising}
            for (problem, _), (logp, surprising) in zip(flat, scores, strict=True)
        )
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    rest = iter(scores)
    out: dict[str, list[Reference]] = defaultdict(list)
    for problem in problems:
        for reference in graded.get(problem.id, []):
            logp, surprising = next(rest)
            out[problem.id].append(replace(reference, logp=logp, surprising=surprising))
    return out


def _read_scores(file: Path, ids: Sequence[str]) -> list[tuple[float | None, int]]:
    """Read the scores that ``file`` keeps; none if it is missing, damaged or of other problems."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if [row["id"] for row in rows] == list(ids):
            return [(row["logp"], row["surprising"]) for row in rows]
    return []


def _score(flat: Sequence[tuple[Problem, str]], policy: TransformersPolicy) -> list[tuple[float | None, int]]:
    """Return ``logp`` and ``surprising`` of each reference, see ``Reference``."""
    prompts = [policy.renderer.prompt(problem) for problem, _ in flat]
    completions = [policy.renderer.reference(problem, text) for problem, text in flat]
    context = policy.context or float("inf")
    fits = [
        len(prompt) + len(completion) <= context
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    found = iter(policy.score([*compress(prompts, fits)], [*compress(completions, fits)]))
    return [summed(next(found).tolist()) if ok else (None, 0) for ok in fits]


def summed(logp: Sequence[float]) -> tuple[float, int]:
    """Return the sum of a reference's log-probabilities and the number of its surprising tokens.

    Those of all tokens would need gigabytes.
    """
    return math.fsum(logp), sum(each < math.log(SURPRISING) for each in logp)


def faults(
    problems: Sequence[Problem],
    policy: TransformersPolicy,
    graded: Mapping[str, Sequence[Reference]],
    rejected: Set[str],
) -> dict[str, list[str]]:
    """Return the faults of each problem by its id.

    ``rejected`` holds the ids of the problems whose own answer the verifier refuses.
    """
    context, room = policy.context or float("inf"), policy.rollout.max_tokens
    answers: dict[str, set[str]] = defaultdict(set)
    for problem in problems:
        answers[json.dumps(problem.prompt)].add(problem.answer)
    seen: set[str] = set()
    out = {}
    for problem in problems:
        prompt, mine, asked = (
            len(policy.renderer.prompt(problem)),
            graded.get(problem.id, []),
            json.dumps(problem.prompt),
        )
        found = {
            "answer_rejected": problem.id in rejected,
            "reference_rejected": any(reference.correct is False for reference in mine),
            "unverifiable": any(reference.correct is None for reference in mine),
            "prompt_too_long": prompt + room > context,
            "reference_too_long": any(prompt + reference.tokens > context for reference in mine),
            "reference_over_max_tokens": any(reference.tokens > room for reference in mine),
            "duplicate": asked in seen,
            "contradiction": len(answers[asked]) > 1,
        }
        seen.add(asked)
        out[problem.id] = [fault for fault, there in found.items() if there]
    return out
