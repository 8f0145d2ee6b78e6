"""Repair of a rollout: keep its beginning, insert a correction, and let the policy continue."""

from __future__ import annotations

from dataclasses import replace

from handrail.experts.correctors import Correction
from handrail.experts.steps import count_prefix_tokens
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Verify
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


async def graft(
    rollout: Trajectory, kept: str, correction: Correction, problem: Problem, ctx: Context
) -> Trajectory | None:
    """Join the beginning ``kept`` of a rollout, a correction and, unless that is complete, the policy's
    continuation.

    The longest prefix of the rollout's tokens whose text is a prefix of ``kept`` stays as sampled; the rest
    of ``kept`` is tokenized together with the correction. Returns the graded trajectory, None if the policy
    has no room to continue.
    """
    renderer = ctx.renderer
    cut = count_prefix_tokens(rollout.tokens, kept, renderer)
    rest = kept[len(renderer.text(rollout.tokens[:cut])) :]
    # A reference is the user's own text. Any other author could end the turn by writing special tokens.
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
