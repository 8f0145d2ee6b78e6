"""Preferences between steps: the best alternative to a step, pairs of trajectories, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from handrail.experts.correctors import Correction, Draft, bare
from handrail.experts.questions import JudgeQuestion
from handrail.methods.context import Context
from handrail.methods.linearize import linearized
from handrail.methods.requests import Ask, Score, gather
from handrail.types.trajectory import Group, Trajectory


async def best_alternative(
    draft: Draft, own: str, written: Sequence[Correction | None], judge: str, step_end: str | None
) -> tuple[Correction | None, float]:
    """The correction that the judge scores highest, except the own step, and its score; None and 0 if it
    scores none."""
    found = {bare(each.text).strip(): each for each in written if each is not None}
    found.pop(bare(own).strip(), None)
    found.pop("", None)
    questions = [JudgeQuestion(draft.problem, [*draft.kept, each.text], step_end) for each in found.values()]
    scores = await gather(*(Ask(judge, question) for question in questions))
    rated = [(score[-1], -place) for place, score in enumerate(scores) if score and score[-1] is not None]
    if not rated:
        return None, 0.0
    score, place = max(rated)
    return list(found.values())[-place], score


async def pair(chosen: Trajectory, rejected: Trajectory, ctx: Context) -> list[Trajectory]:
    """Both trajectories outside the baseline, with columns for ``preference``: ``pair``, 1 and -1 from where
    they differ, and ``ref_logp``, each token's log-probability before training."""
    shared = min(len(chosen), len(rejected))
    same = int((chosen.token_ids[:shared] == rejected.token_ids[:shared]).long().cumprod(0).sum())

    async def marked(member: Trajectory, side: float) -> Trajectory:
        ref_logp = await Score(member.prompt_ids, member.token_ids, model="reference")
        step = torch.zeros(len(member))
        step[same:] = side
        shown = ctx.renderer.text(member.tokens)
        return replace(member, in_baseline=False, text=shown).with_columns(pair=step, ref_logp=ref_logp)

    return [await marked(chosen, 1.0), await marked(rejected, -1.0)]


async def preferring(group: Group, beta: float, coefficient: float) -> Group:
    """The group with the gradient of ``coefficient`` times the mean preference over its pairs, if any."""
    members = [member for member in group.imitated if "pair" in member.columns]
    if not members:
        return group
    return await linearized(group, members, lambda sides, logps: coefficient * preference(sides, logps, beta))


def preference(members: Sequence[Trajectory], logps: Sequence[Tensor], beta: float) -> Tensor:
    """Mean of log σ(β·(Δ⁺ − Δ⁻)) over pairs, whose members stand next to each other; Δ = Σ log π − log π_ref
    over the tokens of the step."""
    gains = torch.stack(
        [
            (member.column("pair") * (logp - member.column("ref_logp"))).sum()
            for member, logp in zip(members, logps, strict=True)
        ]
    )
    return logsigmoid(beta * gains.view(-1, 2).sum(1)).mean()
