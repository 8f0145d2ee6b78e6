"""Trajectories as lines of samples.jsonl: every token with its origin and how hard the objective pulls on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from handrail.experts.steps import spelt
from handrail.methods.base import Method
from handrail.models.hf import TransformersPolicy
from handrail.training.batch import Row, micro_batch
from handrail.types import Group, Trajectory


def sample_rows(step: int, groups: Sequence[Group], method: Method, policy: TransformersPolicy) -> Iterator[dict[str, Any]]:
    """One line a trajectory. To be called before the update, so that weights are those of the weights that sampled."""
    for group in groups:
        for place, member in enumerate(group.members):
            yield {
                "step": step,
                "problem": group.problem.id,
                "prompt": policy.tokenizer.decode(member.prompt),
                "answer": group.problem.answer,
                "role": "trajectory" if place < len(group.trajectories) else "demonstration",
                "reward": member.reward,
                "correct": member.correct,
                "finished": member.finished,
                "text": member.text,
                "tokens": policy.tokenizer.convert_ids_to_tokens(member.completion),
                "origin": [origin.name.lower() for origin in member.origin],
                "credit": rounded(member.credit),
                "weight": rounded(token_weights(member, method, policy)),
                **({"plan": group.problem.plan} if group.problem.plan is not None else {}),
                **({"judged": judged_tokens(member, policy)} if member.judged else {}),
            }


def batch_rows(step: int, groups: Sequence[Group], policy: TransformersPolicy) -> Iterator[dict[str, Any]]:
    """All that an update was given, one line a trajectory, with log π of its tokens: None where it is not finite."""
    for group in groups:
        for member in group.members:
            (logp,) = policy.score([member.prompt], [member.completion])
            yield {
                "step": step,
                "problem": group.problem.id,
                "text": member.text,
                "reward": member.reward,
                "prompt": member.prompt,
                "completion": member.completion,
                "origin": [origin.name.lower() for origin in member.origin],
                "behaviour": member.behaviour,
                "credit": member.credit,
                "weight": member.weight,
                "logp": [value if math.isfinite(value) else None for value in logp.tolist()],
            }


def token_weights(member: Trajectory, method: Method, policy: TransformersPolicy) -> list[float]:
    """What multiplies ∇ log π of each token, credit aside: ∂ objective / ∂ log π, divided by the credit where there is one.

    For GRPO the ratio (0 where clipped), for LUFFY's references γp/(p+γ)², for SORT's w; empty without any signal.
    """
    if not member.has_signal:
        return []
    (logp,) = policy.score([member.prompt], [member.completion])
    logp = logp[None].requires_grad_()
    streams = micro_batch([Row(member, 1.0, 1.0)]).streams
    (gradient,) = torch.autograd.grad(method.surrogate(logp, streams).sum(), logp)
    return list((gradient / torch.where(streams.credit == 0, 1.0, streams.credit))[0].tolist())


def judged_tokens(member: Trajectory, policy: TransformersPolicy) -> list[float | None]:
    """The score of the step that each token belongs to; None where no judge could tell."""
    scores: list[float | None] = []
    text = ""
    for step, score in member.judged or []:
        text += step
        scores += [None if score is None else float(f"{score:.5g}")] * (spelt(member.completion, text, policy) - len(scores))
    return scores + [None] * (len(member) - len(scores))


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
