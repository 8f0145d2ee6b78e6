"""Check before the first step that all problems fit the model's context."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import cached_assets_path

from handrail._util.digests import digest_items
from handrail._util.errors import UserError
from handrail._util.files import write_whole
from handrail._util.progress import show
from handrail.types.problem import Problem

if TYPE_CHECKING:
    from handrail.models.hf import TransformersPolicy
    from handrail.models.renderer import Renderer

LONG = 3_000_000
"""Number of characters above which tokenizing takes seconds: progress is shown and the counts are cached."""
BATCH = 128
SAY_EVERY = 15.0
"""Seconds between progress lines."""


@dataclass(frozen=True)
class TooLong:
    """A problem that exceeds the context, and the reason."""

    problem: Problem
    what: str

    def __str__(self) -> str:
        return f"{self.problem.where or f'problem {self.problem.id}'}, {self.what}"


def split_by_length(
    policy: TransformersPolicy,
    problems: Sequence[Problem],
    on_too_long: Literal["refuse", "skip"] = "refuse",
    references: bool = True,
) -> tuple[list[Problem], list[TooLong]]:
    """Return the problems that fit the model's context, and those that do not.

    Raises UserError if any does not and ``on_too_long`` is "refuse", or if none fits.
    """
    found = find_too_long(policy, problems, references)
    if found and (on_too_long == "refuse" or len(found) == len(problems)):
        raise UserError(
            f"too long for the model's context of {policy.context} tokens: {len(found)} of {len(problems)} "
            f"problems, first {found[0]}; shorten them, lower rollout.max_tokens"
            + (', or leave them out with data.too_long = "skip"' * (len(found) < len(problems)))
        )
    left_out = {id(each.problem) for each in found}
    return [problem for problem in problems if id(problem) not in left_out], found


def find_too_long(
    policy: TransformersPolicy, problems: Sequence[Problem], references: bool = True
) -> list[TooLong]:
    """Find the problems that exceed the model's context with their prompt and a completion or reference.

    ``references``: True if references count. Raises UserError for an unusable prompt or reference.
    """
    prompts = [len(policy.renderer.prompt(problem)) for problem in problems]
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
            sum_ = prompts[place] + length
            what = f"field reference: its {length} tokens and the prompt's {prompts[place]} make {sum_}"
            found.setdefault(place, what)
    return [TooLong(problems[place], found[place]) for place in sorted(found)]


def reference_lengths(renderer: Renderer, references: Sequence[tuple[Problem, str]]) -> list[int]:
    """Count the tokens of each reference, including its end token; counts of large data are cached on disk.

    Raises UserError for an unusable reference.
    """
    cleaned = [(problem, renderer.clean(problem, text)) for problem, text in references]
    characters = sum(len(text) for _, text in cleaned)
    if characters < LONG or not renderer.tokenizer.is_fast:
        return _count(renderer, cleaned)
    file = _cache_file(renderer, cleaned)
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if len(kept) == len(cleaned):
            return [int(length) for length in kept]
    show(
        f"counting the tokens of {len(cleaned)} references, {characters / 1e6:.0f} million characters, "
        "to check that they fit the model"
    )
    counted = _count(renderer, cleaned)
    with suppress(OSError):  # the cache is optional
        write_whole(file, json.dumps(counted))
    return counted


def _cache_file(renderer: Renderer, cleaned: Sequence[tuple[Problem, str]]) -> Path:
    """Cache file whose name identifies exactly these texts and this tokenizer."""
    tokenizer = [
        renderer.tokenizer.backend_tokenizer.to_str(),
        renderer.embeddings,
        sorted(renderer.ends),
    ]
    key = digest_items(chain(tokenizer, (text for _, text in cleaned)))
    return Path(cached_assets_path("handrail", "lengths")) / f"{key}.json"


def _count(renderer: Renderer, cleaned: Sequence[tuple[Problem, str]]) -> list[int]:
    counted: list[int] = []
    said = time.monotonic()
    for at in range(0, len(cleaned), BATCH):
        batch = cleaned[at : at + BATCH]
        encoded = _encode(renderer.tokenizer, [text for _, text in batch])
        for (problem, _), tokens in zip(batch, encoded, strict=True):
            renderer.check_reference(problem, tokens)
            counted.append(len(tokens) + 1)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            show(f"counting tokens: {len(counted)} of {len(cleaned)} references")
    return counted


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokenizer.encode("", add_special_tokens=False)  # resets options of earlier calls, such as truncation
    return [
        encoding.ids
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
