"""The steps of a completion and the tokens of each: what terms that credit steps share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from handrail.experts.steps import Prefixes, split_steps
from handrail.methods.requests import Score, Verify, gather
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Group, Trajectory


def own(member: Trajectory) -> Tensor:
    """Mask of the tokens that the policy wrote, bool [T]."""
    return member.author == Author.POLICY


def written(group: Group) -> list[Trajectory]:
    """Trajectories of the baseline with a known reward and at least one token that the policy wrote."""
    return [member for member in group.baseline if not math.isnan(member.reward) and own(member).any()]


async def answered(group: Group) -> Group:
    """Return the group with the answers that the verifier reads in those trajectories."""
    members = written(group)
    read = await gather(*(Verify(group.problem, member, answer=True) for member in members))
    # A method or term may have changed the reward, which the verifier sets again.
    told = [replace(member, answer=found.answer) for member, found in zip(members, read, strict=True)]
    return group.swap_all(members, told)


def number_steps(member: Trajectory, renderer: Renderer, end: str | None) -> tuple[list[str], Tensor]:
    """Split the text into steps, and number the step of every token from 0, int64 [T].

    A text without marks of steps is one step; an end token belongs to the last one.
    """
    steps = split_steps(member.text, end) or [member.text]
    prefixes = Prefixes(member.tokens, renderer)
    ends = [prefixes.count(text) for text in accumulate(steps[:-1])]
    return steps, (torch.arange(len(member))[:, None] >= torch.tensor(ends)).sum(1)


def tokens_before(mark: str, steps: list[str], member: Trajectory, renderer: Renderer) -> int:
    """Number of tokens before the last ``mark`` in the last step; without a mark, the number of tokens before
    the end tokens."""
    cut = member.text.rfind(mark, len(member.text) - len(steps[-1]))
    count = Prefixes(member.tokens, renderer).count(member.text if cut < 0 else member.text[:cut])
    while count and member.tokens[count - 1] in renderer.ends:
        count -= 1
    return count


def bounds(mark: str, steps: list[str], number: Tensor, member: Trajectory, renderer: Renderer) -> list[int]:
    """Number of tokens before each step, and before the ``mark`` in the last one (see ``tokens_before``).

    ``steps`` and ``number``: as ``number_steps`` returns them.
    """
    starts = [int((number < k).sum()) for k in range(len(steps))]
    return [*starts, max(starts[-1], tokens_before(mark, steps, member, renderer))]


async def likelihoods(answer: list[int], member: Trajectory, ends: Sequence[int], mean: bool) -> Tensor:
    """Sum or ``mean`` of log π over the answer's tokens after the prompt and the member's first tokens, as
    many as each of ``ends`` says: float64 [len(ends)]."""
    prefixes = [[*member.prompt_ids, *member.tokens[:end]] for end in ends]
    scored = await gather(*(Score(prefix, torch.tensor(answer)) for prefix in prefixes))
    return torch.stack([each.double().mean() if mean else each.double().sum() for each in scored])


def with_bonuses(
    group: Group, members: Sequence[Trajectory], bonuses: Sequence[Tensor | float], weight: float = 1.0
) -> Group:
    """Make the advantage A of the tokens that the policy wrote in ``members`` ``weight``·A plus the bonus, a
    number or one for each token [T]."""

    def raised(member: Trajectory, bonus: Tensor | float) -> Trajectory:
        advantage = member.column("advantage")
        own_advantage = weight * advantage + bonus
        return member.with_columns(advantage=torch.where(own(member), own_advantage, advantage).float())

    return group.swap_all(members, list(map(raised, members, bonuses)))


def discounted(gains: list[float], gamma: float) -> Tensor:
    """Σ_(t≥k) γ^(t−k)·g_t for every k, float64."""
    found = [*accumulate(gains[::-1], lambda later, gain: gain + gamma * later)][::-1]
    return torch.tensor(found, dtype=torch.float64)
