"""Repair of a rollout: keep its beginning, insert a correction, and let the policy continue; or go on from
its beginning in the prompt."""

from __future__ import annotations

from dataclasses import replace

from handrail.experts.correctors import Correction
from handrail.experts.steps import Prefixes
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Verify, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


def splice(rollout: Trajectory, kept: str, correction: Correction, ctx: Context) -> Trajectory:
    """Join the beginning ``kept`` of a rollout and a correction, without text and verdict.

    The longest prefix of the rollout's tokens whose text is a prefix of ``kept`` stays as sampled; the rest
    of ``kept`` is tokenized together with the correction.
    """
    cut = Prefixes(rollout.tokens, ctx.renderer).count(kept)
    rest = kept[len(ctx.renderer.text(rollout.tokens[:cut])) :]
    # A reference is the user's own text. Any other author could end the turn by writing special tokens.
    plain = correction.author is not Author.REFERENCE
    written = ctx.renderer.completion(rest + correction.text, end=correction.complete, plain=plain)
    return rollout.truncate(cut).append(written, correction.author, finished=correction.complete)


async def complete(solution: Trajectory, problem: Problem, ctx: Context, n: int = 1) -> list[Trajectory]:
    """Let the policy continue ``n`` times, unless the solution is finished; return graded trajectories.

    Returns none if there is no room to continue.
    """
    solutions, room = [solution], ctx.max_tokens - len(solution)
    if room < (not solution.finished):
        return []
    if not solution.finished:
        continuations = await Generate(solution.prompt_ids + solution.tokens, n, room)
        solutions = [solution.extend(more) for more in continuations]
    written = [replace(each, text=ctx.renderer.text(each.tokens)) for each in solutions]
    return list(await gather(*(Verify(problem, each) for each in written)))


async def restarted(problem: Problem, kept: str, said: str, n: int, ctx: Context) -> list[Trajectory]:
    """Sample ``n`` ends of a solution from a prompt that says ``said``, if anything, and ends in ``kept``.

    Their text is the whole solution, by which they are graded. Returns none if there is no room to continue.
    """
    start = ctx.renderer.completion(kept, end=False, plain=True) if kept else []
    prompt = ctx.renderer.prompt(problem, said or None) + start
    # The room for a problem was checked without what the prompt says here.
    if len(start) >= ctx.max_tokens or ctx.longest is not None and len(prompt) >= ctx.longest:
        return []
    ends = await Generate(prompt, n, ctx.max_tokens - len(start))
    whole = [replace(end, text=kept + end.text) for end in ends]
    return list(await gather(*(Verify(problem, each) for each in whole)))
