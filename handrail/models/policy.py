"""Protocol through which models are used: generate and score."""

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
        """Maximum sequence length of the model in tokens; None if unknown."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """Sample one completion per prompt, with its log-probabilities.

        ``max_tokens``: length limit of all completions, or one for each prompt; ``rollout.max_tokens`` by
        default.

        A completion depends only on its prompt and its seed, not on the rest of the batch.
        """
        ...

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[int] | Tensor]
    ) -> list[Tensor]:
        """Compute log π of each completion's tokens, float32 [len(completion)], without gradient."""
        ...
