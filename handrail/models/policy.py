"""Protocol through which models are used: generate and score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from handrail._util.errors import UserError
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Group, Trajectory


class Policy(Protocol):
    """A language model that completes prompts and scores completions.

    Derive from it a policy that cannot score, such as a server's, or whose context length is unknown.
    """

    renderer: Renderer

    @property
    def context(self) -> int | None:
        """Maximum sequence length of the model in tokens; None if unknown."""
        return None

    @property
    def max_tokens(self) -> int:
        """Length limit of a completion, by default."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """Sample one completion per prompt, with its log-probabilities.

        ``max_tokens``: length limit of all completions, or one for each prompt.

        A completion depends only on its prompt and its seed, not on the rest of the batch.
        """
        ...

    def score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute log π of each completion's tokens, float32 [len(completion)], without gradient.

        ``model``: "policy", or "reference" for the policy before training. ``targets``: tokens to score in
        place of each completion's own, which are still what the model reads. Raises UserError if it cannot
        score as that model.
        """
        raise UserError(f"{type(self).__name__} cannot score completions; choose a method that only samples")

    def top_tokens(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        vocabulary: int | None = None,
    ) -> list[Tensor]:
        """Find the likeliest token at every position of each completion, int64 [len(completion)].

        ``vocabulary``: only ids below it are considered.
        """
        raise UserError(f"{type(self).__name__} has no likeliest tokens; choose a model that runs here")


def limits_of(
    policy: Policy, prompts: Sequence[list[int]], max_tokens: int | Sequence[int] | None
) -> Sequence[int]:
    """Return the length limit for each prompt; ``max_tokens`` as for ``Policy.generate``."""
    limits = policy.max_tokens if max_tokens is None else max_tokens
    return [limits] * len(prompts) if isinstance(limits, int) else limits


def room(policy: Policy, prompt: Sequence[int], wanted: int) -> int:
    """Number of tokens, at most ``wanted``, that fit the context after ``prompt``; below 1 if none does."""
    return wanted if policy.context is None else min(wanted, policy.context - len(prompt))


def generate_within_context(
    policy: Policy, prompts: Sequence[list[int]], seeds: Sequence[int], max_tokens: int | None = None
) -> list[Trajectory | None]:
    """Sample as ``Policy.generate``, no further than the context; None after a prompt that leaves no room."""
    limits = [
        room(policy, prompt, limit)
        for prompt, limit in zip(prompts, limits_of(policy, prompts, max_tokens), strict=True)
    ]
    able = [place for place, limit in enumerate(limits) if limit > 0]
    out: list[Trajectory | None] = [None] * len(prompts)
    sampled = policy.generate(
        [prompts[place] for place in able],
        [seeds[place] for place in able],
        [limits[place] for place in able],
    )
    for place, completion in zip(able, sampled, strict=True):
        out[place] = completion
    return out


def with_old_logp(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """Set ``old_logp`` of the policy's tokens to its log-probabilities, where it is unknown."""
    wanted = [
        member for group in groups for member in group.trajectories if (member.author == Author.POLICY).any()
    ]
    scored = policy.score(
        [member.prompt_ids for member in wanted],
        [member.token_ids for member in wanted],
        targets=[member.predicted for member in wanted],
    )
    found = {id(member): logp for member, logp in zip(wanted, scored, strict=True)}

    def with_old(member: Trajectory) -> Trajectory:
        if id(member) not in found:
            return member
        known = member.column("old_logp")  # values set by a method stay
        ours = (member.author == Author.POLICY) & known.isnan()
        return member.with_columns(old_logp=torch.where(ours, found[id(member)], known))

    return [group.map(with_old) for group in groups]
