"""Check that a verifier suits the data: it must accept the problems' own answers and references."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from statistics import fmean

from handrail.types.problem import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import Verdict, VerifierPool, unreached

TOLERATED = 0.05
"""The share of answers or references that a verifier may refuse without spoiling a run."""
SPOILING = {"answer_rejected": TOLERATED, "reference_rejected": TOLERATED, "unverifiable": TOLERATED}
"""The faults that spoil a run if more than this share of the problems has them. Other faults are reported
too, but affect only the problems that have them."""

OWN_ANSWER = {"math": r"\boxed{%s}", "exact": "%s", "normalized": "%s", "reasoning-gym": "%s", "task": "# %s"}
"""A completion with nothing but the answer, in the form that each built-in verifier expects."""
GENERAL_VERIFIERS = ("math", "exact", "normalized")
Graded = tuple[Problem, str]
"""A problem and a completion."""


def rejected_answers(
    problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool
) -> list[tuple[Problem, Verdict]] | None:
    """Return the problems whose own answer the verifier refuses, so that no completion can be correct.

    Returns None if the verifier is the user's own or has an ``extract``, because the form in which it expects
    an answer is then unknown.
    """
    form = OWN_ANSWER.get(config.name)
    if form is None or config.extract is not None:
        return None
    verdicts = verifier.grade([(problem, form % problem.answer) for problem in problems])
    return [
        (problem, verdict) for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.correct
    ]


def other_verifiers(problems: Sequence[Problem], config: VerifierConfig) -> dict[str, float]:
    """Return the share of references that each other general verifier accepts, without ``extract``."""
    flat = [(problem, text) for problem in problems for text in problem.references]
    others = [name for name in GENERAL_VERIFIERS if name != config.name]
    return {name: _accepted(flat, config, name=name) for name in others}


def fitting_settings(refused: Sequence[Graded], config: VerifierConfig) -> str | None:
    """Return settings, as in a configuration, of a verifier that accepts what this one refuses.

    Returns None if no verifier accepts all but TOLERATED of the refused references.
    """
    tried = [
        {"name": name} for name in GENERAL_VERIFIERS if name != config.name or config.extract is not None
    ]
    if mark := _mark(refused):
        tried.append({"name": "exact", "extract": f"{mark}(.+)$"})
    fitting = (settings for settings in tried if _accepted(refused, config, **settings) >= 1 - TOLERATED)
    written = (", ".join(f"verifier.{key} = '{value}'" for key, value in found.items()) for found in fitting)
    return next(written, None)


def _accepted(items: Sequence[Graded], config: VerifierConfig, **settings: str) -> float:
    other = VerifierConfig.model_validate({"workers": config.workers, "timeout": config.timeout, **settings})
    with VerifierPool(other) as pool:
        return fmean(verdict.correct is True for verdict in pool.grade(items))


def _mark(items: Sequence[Graded]) -> str:
    """Return the word before the answer at the end of every reference, as a regular expression.

    It is empty if the references have no such word in common.
    """
    before = [text.rstrip().removesuffix(problem.answer.strip()) for problem, text in items]
    common = os.path.commonprefix([text[::-1] for text in before])[::-1]
    word = re.search(r"\S*\s*$", common.rpartition("\n")[2])
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", word[0]) if word and word[0].strip() else ""


def refusal(problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool) -> str | None:
    """Return a warning if the verifier does not suit the problems.

    It must accept every problem's own answer, and accept or at least grade all but TOLERATED of the
    references.
    """
    flat = [(problem, text) for problem in problems for text in problem.references[:1]]
    graded = [(problem, verdict) for (problem, _), verdict in zip(flat, verifier.grade(flat), strict=True)]
    refused = [problem for problem, verdict in graded if verdict.correct is False]
    unverified = [pair for pair in graded if pair[1].correct is None]
    own = rejected_answers(problems, config, verifier)
    found = []
    if own:
        found.append(
            f"{len(own)} of the first {len(problems)} answers as the answer to their own problem, "
            f"first {place(own[0][0])}"
        )
    if spoils("reference_rejected", len(refused), len(flat)):
        every = ", so nothing can be learned from them" if len(refused) == len(flat) else ""
        found.append(f"{len(refused)} of the first {len(flat)} references, first {place(refused[0])}{every}")
    said = [f"the verifier refuses {' and '.join(found)}"] if found else []
    if spoils("unverifiable", len(unverified), len(flat)):
        share = f"{len(unverified)} of the first {len(flat)} references"
        said.append(f"the verifier reaches no verdict on {share}, first on {unreached(*unverified[0]):.200}")
    return f"{'; '.join(said)}; see handrail check" if said else None


def spoils(fault: str, faulty: int, of: int) -> bool:
    """True if ``fault`` in ``faulty`` of ``of`` answers, references or problems would spoil a run."""
    return fault in SPOILING and faulty > SPOILING[fault] * of


def place(problem: Problem) -> str:
    """Return the file and line of a problem, or its id."""
    return problem.where or problem.id
