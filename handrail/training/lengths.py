"""Whether problems fit the model's context, found out before the first step."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import cached_assets_path

from handrail._util.errors import UserError
from handrail._util.files import write_whole
from handrail._util.progress import show
from handrail.types.problem import Problem

if TYPE_CHECKING:
    from handrail.models.hf import TransformersPolicy
    from handrail.models.renderer import Renderer

LONG = 3_000_000
"""Characters that take seconds to tokenise: more are counted aloud, and the counts are kept for the next start."""
BATCH = 128
SAY_EVERY = 15.0
"""Seconds between lines of progress."""


@dataclass(frozen=True)
class TooLong:
    """A problem that exceeds the context, and by what."""

    problem: Problem
    what: str

    def __str__(self) -> str:
        return f"{self.problem.where or f'problem {self.problem.id}'}, {self.what}"


def fitting(
    policy: TransformersPolicy,
    problems: Sequence[Problem],
    on_too_long: Literal["refuse", "skip"] = "refuse",
    references: bool = True,
) -> tuple[list[Problem], list[TooLong]]:
    """The problems that fit the model's context, and those that are skipped. Raises UserError if one is to be refused, or none fits."""
    found = too_long(policy, problems, references)
    if found and (on_too_long == "refuse" or len(found) == len(problems)):
        raise UserError(
            f"too long for the model's context of {policy.context} tokens: {len(found)} of {len(problems)} problems, first {found[0]}; "
            "shorten them, lower rollout.max_tokens"
            + (', or leave them out with data.too_long = "skip"' * (len(found) < len(problems)))
        )
    left_out = {id(each.problem) for each in found}
    return [problem for problem in problems if id(problem) not in left_out], found


def too_long(
    policy: TransformersPolicy, problems: Sequence[Problem], references: bool = True
) -> list[TooLong]:
    """The problems whose prompt or, if they count, one of whose references exceeds the model's context.

    Raises UserError for a prompt or reference that cannot be used.
    """
    prompts = [len(policy.encode_prompt(problem)) for problem in problems]
    context, room = policy.context, policy.rollout.max_tokens
    if context is None:
        return []
    found = {
        place: f"field prompt: its {prompt} tokens and rollout.max_tokens = {room} make {prompt + room}"
        for place, prompt in enumerate(prompts)
        if prompt + room > context
    }
    pairs = [
        (place, text)
        for place, problem in enumerate(problems)
        if references and place not in found
        for text in problem.references
    ]
    lengths = reference_lengths(policy.renderer, [(problems[place], text) for place, text in pairs])
    for (place, _), length in zip(pairs, lengths, strict=True):
        if prompts[place] + length > context:
            what = f"field reference: its {length} tokens and the prompt's {prompts[place]} make {prompts[place] + length}"
            found.setdefault(place, what)
    return [TooLong(problems[place], found[place]) for place in sorted(found)]


def reference_lengths(renderer: Renderer, references: Sequence[tuple[Problem, str]]) -> list[int]:
    """Tokens of each reference, its end token included. Much text is counted once and the counts are kept in the cache of Hugging Face.

    Raises UserError for a reference that cannot be used.
    """
    cleaned = [(problem, renderer.clean(problem, text)) for problem, text in references]
    characters = sum(len(text) for _, text in cleaned)
    if characters < LONG or not renderer.tokenizer.is_fast:
        return _counted(renderer, cleaned)
    file = _cache(renderer, cleaned)
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if len(kept) == len(cleaned):
            return [int(length) for length in kept]
    show(
        f"counting the tokens of {len(cleaned)} references, {characters / 1e6:.0f} million characters, to see that they fit the model"
    )
    counted = _counted(renderer, cleaned)
    with suppress(OSError):  # a cache that cannot be written is none
        write_whole(file, json.dumps(counted))
    return counted


def _cache(renderer: Renderer, cleaned: Sequence[tuple[Problem, str]]) -> Path:
    """The file for the counts of exactly these texts by exactly this tokenizer."""
    told = [
        renderer.tokenizer.backend_tokenizer.to_str(),
        renderer.embeddings,
        sorted(renderer.ends),
        *(text for _, text in cleaned),
    ]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Path(cached_assets_path("handrail", "lengths")) / f"{key}.json"


def _counted(renderer: Renderer, cleaned: Sequence[tuple[Problem, str]]) -> list[int]:
    counted: list[int] = []
    said = time.monotonic()
    for at in range(0, len(cleaned), BATCH):
        batch = cleaned[at : at + BATCH]
        for (problem, _), tokens in zip(
            batch, _encoded(renderer.tokenizer, [text for _, text in batch]), strict=True
        ):
            renderer.check_reference(problem, tokens)
            counted.append(len(tokens) + 1)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            show(f"counting tokens: {len(counted)} of {len(cleaned)} references")
    return counted


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokenizer.encode("", add_special_tokens=False)  # undoes what earlier calls set, such as a truncation
    return [
        encoding.ids
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
