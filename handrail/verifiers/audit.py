"""Whether a verifier suits the data: what it makes of their answers and of their references."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from statistics import fmean

from handrail.types import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import Verdict, VerifierPool, unreached

TOLERATED = 0.05
"""The share of answers or references that a verifier may refuse before a run would be spoiled."""
SPOILING = {"answer_rejected": TOLERATED, "reference_rejected": TOLERATED, "unverifiable": TOLERATED}
"""The faults that spoil a run if a larger share has them. The others are said, but cost a run no more than what they are in."""

OWN_ANSWER = {"math": r"\boxed{%s}", "exact": "%s", "normalised": "%s", "reasoning-gym": "%s", "task": "# %s"}
"""A completion that says nothing but the answer, as each built-in verifier reads it."""
GENERAL_VERIFIERS = ("math", "exact", "normalised")
Graded = tuple[Problem, str]
"""A problem and a completion."""


def rejected_answers(problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool) -> list[tuple[Problem, Verdict]] | None:
    """The problems whose own answer the verifier does not take for correct, so that nothing earns anything on them.

    None if the verifier is the user's own or has an ``extract``: only they know how an answer is to be written.
    """
    form = OWN_ANSWER.get(config.name)
    if form is None or config.extract is not None:
        return None
    verdicts = verifier.grade([(problem, form % problem.answer) for problem in problems])
    return [(problem, verdict) for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.correct]


def other_verifiers(problems: Sequence[Problem], config: VerifierConfig) -> dict[str, float]:
    """What share of the references each other general verifier accepts, as it is without ``extract``."""
    flat = [(problem, text) for problem in problems for text in problem.references]
    others = [name for name in GENERAL_VERIFIERS if name != config.name]
    return {name: _accepted(flat, config, name=name) for name in others}


def fitting_settings(refused: Sequence[Graded], config: VerifierConfig) -> str | None:
    """Settings of a verifier that accepts the references that this one refuses, as a configuration writes them; None if none does."""
    tried = [{"name": name} for name in GENERAL_VERIFIERS if name != config.name or config.extract is not None]
    if mark := _mark(refused):
        tried.append({"name": "exact", "extract": f"{mark}(.+)$"})
    fitting = (settings for settings in tried if _accepted(refused, config, **settings) >= 1 - TOLERATED)
    return next((", ".join(f"verifier.{key} = '{value}'" for key, value in settings.items()) for settings in fitting), None)


def _accepted(items: Sequence[Graded], config: VerifierConfig, **settings: str) -> float:
    other = VerifierConfig.model_validate({"workers": config.workers, "timeout": config.timeout, **settings})
    with VerifierPool(other) as pool:
        return fmean(verdict.correct is True for verdict in pool.grade(items))


def _mark(items: Sequence[Graded]) -> str:
    """The word before the answer that ends every reference, as a regular expression; empty if they have none in common."""
    before = [text.rstrip().removesuffix(problem.answer.strip()) for problem, text in items]
    common = os.path.commonprefix([text[::-1] for text in before])[::-1]
    word = re.search(r"\S*\s*$", common.rpartition("\n")[2])
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", word[0]) if word and word[0].strip() else ""


def refusal(problems: Sequence[Problem], config: VerifierConfig, verifier: VerifierPool) -> str | None:
    """A warning if the verifier refuses a problem's own answer, or more than TOLERATED of the references, or cannot grade those."""
    flat = [(problem, text) for problem in problems for text in problem.references[:1]]
    graded = [(problem, verdict) for (problem, _), verdict in zip(flat, verifier.grade(flat), strict=True)]
    refused = [problem for problem, verdict in graded if verdict.correct is False]
    unverified = [pair for pair in graded if pair[1].correct is None]
    own = rejected_answers(problems, config, verifier)
    found = []
    if own:
        found.append(f"{len(own)} of the first {len(problems)} answers as the answer to their own problem, first {place(own[0][0])}")
    if spoils("reference_rejected", len(refused), len(flat)):
        every = ", so nothing can be learnt from them" if len(refused) == len(flat) else ""
        found.append(f"{len(refused)} of the first {len(flat)} references, first {place(refused[0])}{every}")
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
