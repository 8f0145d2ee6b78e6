"""Find faults in training data, problem by problem, before a model attempts them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

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
    context. ``surprising`` is the number of tokens with a probability below SURPRISING. ``correct`` is the
    verifier's verdict, None if the reference is unverified.
    """

    tokens: int
    reward: float
    correct: bool | None
    logp: float | None
    surprising: int = 0


def references(
    problems: Sequence[Problem], policy: TransformersPolicy, verifier: VerifierPool
) -> dict[str, list[Reference]]:
    """Grade and score the references of every problem; return them by the problem's id."""
    flat = [(problem, text) for problem in problems for text in problem.references]
    prompts = [policy.renderer.prompt(problem) for problem, _ in flat]
    completions = [policy.renderer.reference(problem, text) for problem, text in flat]
    context = policy.context or float("inf")
    fits = [
        len(prompt) + len(completion) <= context
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    scored = [place for place, ok in enumerate(fits) if ok]
    scores = iter(
        policy.score([prompts[place] for place in scored], [completions[place] for place in scored])
    )
    out: dict[str, list[Reference]] = defaultdict(list)
    said = [
        (problem, policy.renderer.text(completion))
        for (problem, _), completion in zip(flat, completions, strict=True)
    ]
    for (problem, _), completion, ok, verdict in zip(
        said, completions, fits, verifier.grade(said), strict=True
    ):
        reference = Reference(len(completion), verdict.reward, verdict.correct, None)
        out[problem.id].append(with_scores(reference, next(scores).tolist()) if ok else reference)
    return out


def with_scores(reference: Reference, logp: Sequence[float]) -> Reference:
    """Set what is kept of the log-probability of each token: all of them would need gigabytes."""
    surprising = sum(each < math.log(SURPRISING) for each in logp)
    return replace(reference, logp=math.fsum(logp), surprising=surprising)


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
