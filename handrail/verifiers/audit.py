"""Whether a verifier suits the data: what it makes of their answers and of their references."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.types import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import Verdict, VerifierPool, unreached

TOLERATED = 0.05
"""The share of answers or references that a verifier may refuse before a run would be spoiled."""
SPOILING = {"answer_rejected": TOLERATED, "reference_rejected": TOLERATED, "unverifiable": TOLERATED}
"""The faults that spoil a run if a larger share has them. The others are said, but cost a run no more than what they are in."""

OWN_ANSWER = {"math": r"\boxed{%s}", "exact": "%s", "normalised": "%s", "reasoning-gym": "%s", "task": "# %s"}
"""A completion that says nothing but the answer, as each built-in verifier reads it."""


def rejected_answers(
    problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool
) -> list[tuple[Problem, Verdict]] | None:
    """The problems whose own answer the verifier does not take for correct, so that nothing earns anything on them.

    None if the verifier is the user's own or has an ``extract``: only they know how an answer is to be written.
    """
    form = OWN_ANSWER.get(config.name)
    if form is None or config.extract is not None:
        return None
    verdicts = verifier.grade([(problem, form % problem.answer) for problem in problems])
    return [
        (problem, verdict) for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.correct
    ]


def refusal(problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool) -> str | None:
    """A warning if the verifier refuses a problem's own answer, or more than TOLERATED of the references, or cannot grade those."""
    flat = [(problem, text) for problem in problems for text in problem.references[:1]]
    graded = [(problem, verdict) for (problem, _), verdict in zip(flat, verifier.grade(flat), strict=True)]
    refused = [problem for problem, verdict in graded if verdict.correct is False]
    unverified = [pair for pair in graded if pair[1].correct is None]
    own = rejected_answers(problems, config, verifier)
    found = []
    if own:
        found.append(
            f"{len(own)} of the first {len(problems)} answers as the answer to their own problem, first {place(own[0][0])}"
        )
    if spoils("reference_rejected", len(refused), len(flat)):
        found.append(f"{len(refused)} of the first {len(flat)} references, first {place(refused[0])}")
    said = [f"the verifier refuses {' and '.join(found)}"] if found else []
    if spoils("unverifiable", len(unverified), len(flat)):
        share = f"{len(unverified)} of the first {len(flat)} references"
        said.append(f"the verifier reaches no verdict on {share}, first on {unreached(*unverified[0]):.200}")
    return f"{'; '.join(said)}; see handrail check" if said else None


def spoils(fault: str, faulty: int, of: int) -> bool:
    """Whether ``faulty`` of ``of`` answers, references or problems with ``fault`` would spoil a run."""
    return fault in SPOILING and faulty > SPOILING[fault] * of


def place(problem: Problem) -> str:
    return problem.where or problem.id
