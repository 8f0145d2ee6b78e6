"""Hints of leading steps of a reference, and rollouts that saw one but are trained without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from handrail.experts.conversations import prompt_text
from handrail.experts.planners import names_answer
from handrail.experts.steps import split_steps
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Verify, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Trajectory


def leading_steps(problem: Problem, step_end: str | None, ctx: Context) -> list[str | None]:
    """Hints of 0, 1, ... leading steps of a reference that do not give the answer away and leave room."""
    reference = ctx.reference(problem)
    steps = split_steps(reference.text, step_end) if reference else []
    while steps and names_answer(steps[-1], problem):
        steps.pop()
    # In other steps, an answer that the problem itself names is a number like any other.
    if not names_answer(prompt_text(problem), problem):
        silent = list(takewhile(lambda step: not names_answer(step, problem), steps))
        ctx.counts["actguide/leaking_step"] += len(silent) < len(steps)
        steps = silent
    hints = [None, *("".join(steps[:length]).rstrip() for length in range(1, len(steps) + 1))]
    room = None if ctx.longest is None else ctx.longest - ctx.max_tokens
    while len(hints) > 1 and room is not None and len(ctx.renderer.prompt(problem, hints[-1])) > room:
        hints.pop()
    ctx.counts["actguide/no_hint"] += len(hints) == 1
    return hints


async def shortest_that_helps(
    problem: Problem, hints: Sequence[str | None], probes: int, rollouts: int, ctx: Context
) -> int:
    """Index of the shortest hint with which one of ``rollouts`` is rewarded, as far as ``probes`` hints tell;
    the longest one is never tried."""
    low, high = 0, len(hints) - 1
    for _ in range(probes):
        if low < high:
            middle = (low + high) // 2
            tried = await with_hint(problem, hints[middle], rollouts, ctx)
            helps = any(member.reward > 0 for member in tried)
            low, high = (low, middle) if helps else (middle + 1, high)
    ctx.counts["actguide/search_unfinished"] += low < high
    return low


async def with_hint(problem: Problem, hint: str | None, n: int, ctx: Context) -> list[Trajectory]:
    """Graded rollouts with the hint, as trajectories of the plain prompt; ``old_logp`` saw the hint."""
    completions = await Generate(ctx.renderer.prompt(problem, hint), n)
    moved = [
        replace(each, prompt_ids=ctx.renderer.prompt(problem), hint=hint).with_columns(
            old_logp=each.column("sampling_logp"),
            hinted=torch.full((len(each),), float(hint is not None)),
        )
        for each in completions
    ]
    return list(await gather(*(Verify(problem, each) for each in moved)))
