"""Going on from the middle of a rollout with somebody else's text."""

from __future__ import annotations

from dataclasses import replace

from handrail.experts.correctors import Correction
from handrail.experts.steps import spelt
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Verify
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


async def graft(
    rollout: Trajectory, kept: str, correction: Correction, problem: Problem, ctx: Context
) -> Trajectory | None:
    """The beginning ``kept`` of a rollout, a correction, and the policy's end if the correction has none, graded.

    The longest run of the rollout's tokens that spells a beginning of ``kept`` stays as it was sampled; what is
    left of ``kept`` is written anew together with the correction. None if the policy has no room to go on.
    """
    renderer = ctx.renderer
    cut = spelt(rollout.tokens, kept, renderer)
    rest = kept[len(renderer.text(rollout.tokens[:cut])) :]
    # References are the user's own text; anybody else could end the turn by writing special tokens.
    plain = correction.author is not Author.REFERENCE
    written = renderer.completion(rest + correction.text, end=correction.complete, plain=plain)
    solution = rollout.truncate(cut).append(written, correction.author, finished=correction.complete)
    room = ctx.max_tokens - len(solution)
    if room < (not solution.finished):
        return None
    if not solution.finished:
        (more,) = await Generate(solution.prompt_ids + solution.tokens, 1, room)
        ctx.counts["tokens/resampled"] += len(more)
        solution = solution.extend(more)
    graded: Trajectory = await Verify(problem, replace(solution, text=renderer.text(solution.tokens)))
    return graded
