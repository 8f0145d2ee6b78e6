"""The only door to a model: generate and score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from handrail.models.renderer import Renderer
from handrail.types.trajectory import Trajectory


class Policy(Protocol):
    """A language model that completes prompts and scores completions."""

    renderer: Renderer

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None if it does not say."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """One completion of each prompt, with its log-probabilities.

        ``max_tokens``: the longest completion, or that of each prompt; ``rollout.max_tokens`` by default.

        A completion depends on its prompt and its seed, not on what is generated beside it.
        """
        ...

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[int] | Tensor]
    ) -> list[Tensor]:
        """log π of each completion's tokens, float32 [len(completion)], without gradient."""
        ...
