"""Whether everything fits the model's context, found out before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.errors import UserError
from handrail.policy.transformers import TransformersPolicy
from handrail.problems import Problem


def check_lengths(policy: TransformersPolicy, problems: Sequence[Problem], references: bool = True) -> None:
    """Raises UserError for the first prompt, or if they count reference, that is longer than the model's context, or cannot be encoded."""
    context, room = policy.context, policy.config.rollout.max_tokens
    for problem in problems:
        prompt = len(policy.encode_prompt(problem))
        if context is None:
            continue  # its prompt can be encoded, at least
        where = problem.where or f"problem {problem.id}"
        if prompt + room > context:
            raise UserError(
                f"{where}, field prompt: its {prompt} tokens and rollout.max_tokens = {room} exceed the model's context of {context}; "
                "shorten the prompt or lower rollout.max_tokens"
            )
        for text in problem.references if references else ():
            reference = len(policy.encode_reference(problem, text))
            if prompt + reference > context:
                raise UserError(
                    f"{where}, field reference: the prompt's {prompt} and the reference's {reference} tokens exceed the model's "
                    f"context of {context}; shorten it or leave the problem out"
                )
