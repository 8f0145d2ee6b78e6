"""What ``handrail check`` says of a data source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from handrail.data import contamination
from handrail.data.layouts import FIELDS
from handrail.data.load import Loaded, describe, load_problems
from handrail.training.config import Config
from handrail.types import Problem
from handrail.verifiers.audit import fitting_settings, place, rejected_answers, spoils
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import Verdict, VerifierPool

NAMED = 10
"""How many rows with the same fault are named."""
TRIED = 64
"""So many refused references are tried on other verifiers."""
LONG = 200
"""Characters of an answer from which on it looks like a worked solution: nothing that a policy writes would be equal to it."""


def overview(loaded: Loaded, source: str) -> Iterator[str]:
    """What was understood, a fact a line."""
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
        yield f"note: metadata, because the column map does not name them: {', '.join(ours)}"
    if long := [problem for problem in loaded.problems if len(problem.answer) > LONG]:
        yield f"warning: {len(long)} answers are longer than {LONG} characters, first {place(long[0])}: are they worked solutions?"
    if found.duplicate_ids:
        yield f"warning: {found.duplicates} problems repeat another's prompt, first {' and '.join(found.duplicate_ids)}"
    if found.contradiction_ids:
        yield f"warning: {found.contradictions} prompts have contradicting answers, first {' and '.join(found.contradiction_ids)}"
    if found.with_references == 0:
        yield "warning: no references, so no method but grpo has anything to guide with"


def judged(problems: Sequence[Problem], config: VerifierConfig) -> Iterator[str]:
    """What the verifier makes of every answer, and of the references, which ought to end in it. Raises UserError for no verifier."""
    flat = [(problem, text) for problem in problems for text in problem.references]
    with VerifierPool(config) as verifier:
        own = rejected_answers(problems, config, verifier)
        verdicts = verifier.grade(flat, answers=True)
    yield from _said_of_answers(own, problems, config.name)
    if not flat:
        return
    refused = [(item, verdict) for item, verdict in zip(flat, verdicts, strict=True) if verdict.correct is False]
    unverified = [(problem, verdict) for (problem, _), verdict in zip(flat, verdicts, strict=True) if verdict.correct is None]
    yield f"verifier {config.name!r}: it accepts {len(flat) - len(refused) - len(unverified)} of {len(flat)} references"
    if refused:
        severity = _severity("reference_rejected", refused, flat)
        (first, _), verdict = refused[0]
        read = "" if verdict.answer is None else f"; it reads {shortened(verdict.answer)} there"
        yield f"{severity}: the verifier refuses {len(refused)} references, first {place(first)} (answer {shortened(first.answer)}{read})"
        if fitting := fitting_settings([item for item, _ in refused[:TRIED]], config):
            yield f"  {fitting} would accept {'them' if len(refused) <= TRIED else f'the first {TRIED} of them'}"
        elif severity == "error":
            yield "  if they are right, tell the verifier where their answers stand: verifier.extract (handrail config verifier.extract)"
    if unverified:
        problem, verdict = unverified[0]
        severity = _severity("unverifiable", unverified, flat)
        yield f"{severity}: {len(unverified)} references are unverified, first {place(problem)}: {verdict.detail:.200}"


def _severity(fault: str, faulty: Sequence[object], of: Sequence[object]) -> str:
    return "error" if spoils(fault, len(faulty), len(of)) else "warning"


def _said_of_answers(rejected: Sequence[tuple[Problem, Verdict]] | None, problems: Sequence[Problem], name: str) -> Iterator[str]:
    if rejected is None:
        yield f"verifier {name!r}: the answers are not graded, because only the verifier knows how a completion gives one"
        return
    accepted = len(problems) - len(rejected)
    yield f"verifier {name!r}: it accepts {accepted} of {len(problems)} answers as the answer to their own problem"
    if rejected:
        severity = _severity("answer_rejected", rejected, problems)
        yield f"{severity}: no completion is correct for {len(rejected)} problems, whose own answer the verifier refuses:"
    for problem, verdict in rejected[:NAMED]:
        yield f"  {place(problem)} (answer {shortened(problem.answer)})" + (f": {verdict.detail:.200}" if verdict.detail else "")
    if len(rejected) > NAMED:
        yield f"  and {len(rejected) - NAMED} more"


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def overlap(problems: Sequence[Problem], against: str, columns: Mapping[str, str]) -> Iterator[str]:
    """Which problems of the source ``against`` stand in ``problems`` too."""
    test = load_problems(against, columns)
    warning = contamination.overlap(problems, test, against)
    yield f"error: {warning}" if warning else f"{against}: none of its {len(test)} problems is in here"


def as_seen(config: Config, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """The first problem as the model sees it, as (caption, text). Raises UserError if any problem exceeds the context."""
    # Not above: loading torch takes longer than everything that is checked without a model.
    from accelerate import Accelerator

    from handrail.training.lengths import fitting
    from handrail.training.policies import load_policy

    policy = load_policy(config, Accelerator(cpu=True))
    first = problems[0]
    prompt = policy.encode_prompt(first)
    yield f"first problem ({first.id}) as {config.model.path} sees it, {len(prompt)} tokens:", policy.tokenizer.decode(prompt)
    for reference in first.references[:1]:
        tokens = policy.encode_reference(first, reference)
        yield f"its reference, {len(tokens)} tokens:", policy.tokenizer.decode(tokens)
    problems, skipped = fitting(policy, problems, config.data.too_long)
    if skipped:
        yield f"warning: {len(skipped)} problems are too long and will be left out, first {skipped[0]}", ""
    if policy.context:
        room = policy.context - max(len(policy.encode_prompt(problem)) for problem in problems)
        what = f"every {'other ' if skipped else ''}prompt and reference fits the context of {policy.context} tokens"
        yield f"{what}; rollout.max_tokens may be up to {room}", ""
