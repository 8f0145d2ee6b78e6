"""Trajectories as lines of samples.jsonl: every token with its author, advantage and gradient weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from handrail.experts.steps import Prefixes
from handrail.methods.base import Method
from handrail.methods.batch import Sample, token_batch
from handrail.methods.losses import objective
from handrail.models.hf import TransformersPolicy
from handrail.models.policy import Policy
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Group, Trajectory


def sample_rows(
    step: int, groups: Sequence[Group], method: Method[Any], policy: TransformersPolicy
) -> Iterator[dict[str, Any]]:
    """Yield one line per trajectory. Call it before the update, so that weights are the sampling model's."""
    places = [(group, member) for group in groups for member in group.trajectories]
    weights = gradient_weights([member for _, member in places], method, policy)
    for (group, member), own_weights in zip(places, weights, strict=True):
        yield {
            "step": step,
            "problem": group.problem.id,
            "prompt": policy.tokenizer.decode(member.prompt_ids),
            "answer": group.problem.answer,
            **({"model": group.model} if group.model != "policy" else {}),
            "role": "trajectory" if member.in_baseline else "imitated",
            "reward": known(member.reward),
            "correct": member.correct,
            "finished": member.finished,
            "text": member.text,
            "tokens": policy.tokenizer.convert_ids_to_tokens(member.tokens),
            "author": authors(member),
            "advantage": rounded(member.column("advantage").tolist()),
            "gradient_weight": rounded(own_weights),
            **target_tokens(member, policy),
            **({"plan": plan} if (plan := member.plan or group.problem.plan) else {}),
            **({"hint": member.hint} if member.hint else {}),
            **({"judged": judged_tokens(member, policy.renderer)} if member.judged else {}),
        }


def batch_rows(step: int, groups: Sequence[Group], policy: TransformersPolicy) -> Iterator[dict[str, Any]]:
    """Yield an update's input, one line per trajectory, with log π of its tokens; None for nonfinite
    numbers."""
    places = [(group, member) for group in groups for member in group.trajectories]
    logps = logprobs([member for _, member in places], policy)
    for (group, member), logp in zip(places, logps, strict=True):
        yield {
            "step": step,
            "problem": group.problem.id,
            "text": member.text,
            "reward": known(member.reward),
            "prompt": member.prompt_ids,
            "completion": member.tokens,
            **({} if member.targets is None else {"targets": member.targets.tolist()}),
            "author": authors(member),
            **{name: list(map(known, column.tolist())) for name, column in sorted(member.columns.items())},
            "logp": list(map(known, logp.tolist())),
        }


def gradient_weights(members: Sequence[Trajectory], method: Method[Any], policy: Policy) -> list[list[float]]:
    """Coefficients of ∇ log π of each trajectory's tokens: ∂ objective / ∂ log π, divided by the advantage if
    that is nonzero.

    GRPO: the ratio (0 if clipped). LUFFY's references: γp/(p+γ)². SORT's references: w. Empty without any
    signal.
    """
    found: list[list[float]] = [[] for _ in members]
    live = [place for place, member in enumerate(members) if member.has_signal]
    for place, known_logp in zip(live, logprobs([members[place] for place in live], policy), strict=True):
        logp, batch = known_logp[None].requires_grad_(), token_batch([Sample(members[place], 1.0, 1.0, 1.0)])
        (gradient,) = torch.autograd.grad(objective(method, logp, batch).sum(), logp)
        found[place] = (gradient / torch.where(batch.advantage == 0, 1.0, batch.advantage))[0].tolist()
    return found


def logprobs(members: Sequence[Trajectory], policy: Policy) -> list[torch.Tensor]:
    """Score the trajectories under the current policy, in as few forward passes as possible."""
    return policy.score(
        [member.prompt_ids for member in members],
        [member.token_ids for member in members],
        targets=[member.predicted for member in members],
    )


def target_tokens(member: Trajectory, policy: TransformersPolicy) -> dict[str, list[str]]:
    """The tokens that it is trained to predict, if they are not the tokens that it consists of."""
    if member.targets is None:
        return {}
    return {"targets": policy.tokenizer.convert_ids_to_tokens(member.targets.tolist())}


def judged_tokens(member: Trajectory, renderer: Renderer) -> list[float | None]:
    """Score of the step that each token belongs to; None if the judge could not tell or did not reach it."""
    scores: list[float | None] = []
    text, prefixes = "", Prefixes(member.tokens, renderer)
    for step, score in member.judged or []:
        text += step
        rounded_score = None if score is None else float(f"{score:.5g}")
        scores += [rounded_score] * (prefixes.count(text) - len(scores))
    return scores + [None] * (len(member) - len(scores))


def authors(member: Trajectory) -> list[str]:
    return [Author(author).name.lower() for author in member.author.tolist()]


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None
