"""What ``handrail check`` says of a data source."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator

from handrail.config import Config
from handrail.lengths import check_lengths
from handrail.policy.transformers import TransformersPolicy
from handrail.problems import Problem
from handrail.sources import Loaded, describe


def overview(loaded: Loaded, source: str) -> Iterator[str]:
    """What was understood, a fact a line."""
    found = describe(loaded.problems, source)
    yield f"{source}: {found.problems} problems, layout: {loaded.layout}"
    yield f"references: {found.with_references} problems have one ({found.references} in all)"
    yield f"plans: {found.with_plan}"
    keys = sorted({key for problem in loaded.problems for key in problem.metadata})
    yield f"metadata: {', '.join(keys) or 'none'}"
    if found.duplicate_ids:
        yield f"warning: {found.duplicates} problems repeat another's prompt, first {' and '.join(found.duplicate_ids)}"
    if found.contradiction_ids:
        yield f"warning: {found.contradictions} prompts have contradicting answers, first {' and '.join(found.contradiction_ids)}"
    if found.with_references == 0:
        yield "warning: no references, so no method but grpo has anything to guide with"


def as_seen(config: Config, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """The first problem as the model sees it, as (caption, text). Raises UserError if any problem exceeds the context."""
    policy = TransformersPolicy(config, Accelerator(cpu=True))
    first = problems[0]
    prompt = policy.encode_prompt(first)
    yield f"first problem ({first.id}) as {config.model.path} sees it, {len(prompt)} tokens:", policy.tokenizer.decode(prompt)
    for reference in first.references[:1]:
        tokens = policy.encode_completion(reference)
        yield f"its reference, {len(tokens)} tokens:", policy.tokenizer.decode(tokens)
    check_lengths(policy, problems)
    if policy.context:
        room = policy.context - max(len(policy.encode_prompt(problem)) for problem in problems)
        yield f"every prompt and reference fits the context of {policy.context} tokens; rollout.max_tokens may be up to {room}", ""
