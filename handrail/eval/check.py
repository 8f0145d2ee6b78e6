"""The report of ``handrail check`` on a data source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from handrail.data import contamination
from handrail.data.layouts import FIELDS
from handrail.data.load import Loaded, describe, load_problems
from handrail.training.config import Config
from handrail.types.problem import Problem
from handrail.verifiers.audit import fitting_settings, place, rejected_answers, spoils
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import Verdict, VerifierPool

NAMED = 10
"""The most rows to list for one fault."""
TRIED = 64
"""The most refused references to try on other verifiers."""
WITHOUT_REFERENCES = ("grpo", "autonpo", "dmpo", "npo", "stride", "tgpo")
"""Methods that need no reference, listed here because importing them takes longer than a whole check."""
LONG = 200
"""Characters beyond which an answer looks like a worked solution, which no completion would equal."""


def overview(loaded: Loaded, source: str) -> Iterator[str]:
    """Yield how the source was read, one fact per line."""
    found = describe(loaded.problems, source)
    yield f"{source}: {found.problems} problems, layout: {loaded.layout}"
    if loaded.note:
        yield loaded.note
    if loaded.fields:
        yield f"fields: {loaded.fields}"
    yield f"references: {found.with_references} problems have one ({found.references} in all)"
    yield f"plans: {found.with_plan}"
    keys = sorted({key for problem in loaded.problems for key in problem.metadata})
    yield f"metadata: {', '.join(keys) or 'none'}"
    if loaded.layout == "column map" and (ours := [key for key in keys if key in FIELDS]):
        yield f"note: kept as metadata, because the column map does not name them: {', '.join(ours)}"
    if long := [problem for problem in loaded.problems if len(problem.answer) > LONG]:
        first = place(long[0])
        yield (
            f"warning: {len(long)} answers are longer than {LONG} characters, first {first}: "
            "are they worked solutions?"
        )
    if found.duplicate_ids:
        pair = " and ".join(found.duplicate_ids)
        yield f"warning: {found.duplicates} problems repeat another's prompt, first {pair}"
    if found.contradiction_ids:
        pair = " and ".join(found.contradiction_ids)
        yield f"warning: {found.contradictions} prompts have contradicting answers, first {pair}"
    if found.with_references == 0:
        yield f"warning: no references, which methods other than {', '.join(WITHOUT_REFERENCES)} learn from"


def grade(problems: Sequence[Problem], config: VerifierConfig) -> Iterator[str]:
    """Yield the verifier's results on every answer, and on the references, which should end in the answer.

    Raises UserError if the verifier cannot be used.
    """
    flat = [(problem, text) for problem in problems for text in problem.references]
    with VerifierPool(config) as verifier:
        own = rejected_answers(problems, config, verifier)
        verdicts = verifier.grade(flat, answers=True)
    yield from _answer_lines(own, problems, config.name)
    if not flat:
        return
    refused = [
        (item, verdict) for item, verdict in zip(flat, verdicts, strict=True) if verdict.correct is False
    ]
    unverified = [
        (problem, verdict)
        for (problem, _), verdict in zip(flat, verdicts, strict=True)
        if verdict.correct is None
    ]
    accepted = len(flat) - len(refused) - len(unverified)
    yield f"verifier {config.name!r}: it accepts {accepted} of {len(flat)} references"
    if refused:
        severity = _severity("reference_rejected", refused, flat)
        (first, _), verdict = refused[0]
        read = "" if verdict.answer is None else f"; it reads {shorten(verdict.answer)} there"
        said = f"{place(first)} (answer {shorten(first.answer)}{read})"
        yield f"{severity}: the verifier refuses {len(refused)} references, first {said}"
        if fitting := fitting_settings([item for item, _ in refused[:TRIED]], config):
            which = "them" if len(refused) <= TRIED else f"the first {TRIED} of them"
            yield f"  {fitting} would accept {which}"
        elif severity == "error":
            yield (
                "  if they are right, tell the verifier where to find the answer: verifier.extract "
                "(handrail config verifier.extract)"
            )
    if unverified:
        problem, verdict = unverified[0]
        severity = _severity("unverifiable", unverified, flat)
        said = f"{place(problem)}: {verdict.detail:.200}"
        yield f"{severity}: {len(unverified)} references are unverified, first {said}"


def _severity(fault: str, faulty: Sequence[object], of: Sequence[object]) -> str:
    return "error" if spoils(fault, len(faulty), len(of)) else "warning"


def _answer_lines(
    rejected: Sequence[tuple[Problem, Verdict]] | None, problems: Sequence[Problem], name: str
) -> Iterator[str]:
    if rejected is None:
        yield (
            f"verifier {name!r}: the answers are not graded, "
            "because only the verifier knows how a completion states its answer"
        )
        return
    accepted = len(problems) - len(rejected)
    yield (
        f"verifier {name!r}: it accepts {accepted} of {len(problems)} answers "
        "as the answer to their own problem"
    )
    if rejected:
        severity = _severity("answer_rejected", rejected, problems)
        yield (
            f"{severity}: no completion can be correct for {len(rejected)} problems, "
            "because the verifier refuses their own answer:"
        )
    for problem, verdict in rejected[:NAMED]:
        detail = f": {verdict.detail:.200}" if verdict.detail else ""
        yield f"  {place(problem)} (answer {shorten(problem.answer)}){detail}"
    if len(rejected) > NAMED:
        yield f"  and {len(rejected) - NAMED} more"


def shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def overlap(problems: Sequence[Problem], against: str, columns: Mapping[str, str]) -> Iterator[str]:
    """Yield whether problems of the source ``against`` are among ``problems``."""
    test = load_problems(against, columns)
    warning = contamination.overlap(problems, test, against)
    yield f"error: {warning}" if warning else f"{against}: none of its {len(test)} problems is in this source"


def preview(config: Config, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Yield the first problem as the model sees it, as (caption, text).

    Raises UserError if any problem exceeds the context.
    """
    # Imported here, because importing torch takes longer than all checks that need no model.
    from accelerate import Accelerator

    from handrail.training.lengths import split_by_length
    from handrail.training.policies import load_policy

    policy = load_policy(config, Accelerator(cpu=True))
    first = problems[0]
    prompt = policy.renderer.prompt(first)
    yield (
        f"first problem ({first.id}) as {config.model.path} sees it, {len(prompt)} tokens:",
        policy.tokenizer.decode(prompt),
    )
    for reference in first.references[:1]:
        tokens = policy.renderer.reference(first, reference)
        yield f"its reference, {len(tokens)} tokens:", policy.tokenizer.decode(tokens)
    problems, skipped = split_by_length(policy, problems, config.data.too_long)
    if skipped:
        yield f"warning: {len(skipped)} problems are too long and will be left out, first {skipped[0]}", ""
    if policy.context:
        room = policy.context - max(len(policy.renderer.prompt(problem)) for problem in problems)
        every = "every other" if skipped else "every"
        what = f"{every} prompt and reference fits the context of {policy.context} tokens"
        yield f"{what}; rollout.max_tokens may be up to {room}", ""
