"""The only door to a model: ``sample`` and ``score``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from handrail.types import Problem, Trajectory


class Policy(Protocol):
    """What a method may ask of the model that is trained."""

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes, where it says so."""
        ...

    def encode_prompt(self, problem: Problem, plan: str | None = None) -> list[int]:
        """The prompt's tokens as the model sees them, with ``plan`` shown if one is given.

        Raises UserError, with the problem's place, if no completion could sensibly follow them.
        """
        ...

    def encode_completion(self, text: str, end: bool = True, plain: bool = False) -> list[int]:
        """The tokens of a completion, end-of-sequence included unless it goes on; ``plain`` text cannot spell special tokens."""
        ...

    def encode_reference(self, problem: Problem, text: str) -> list[int]:
        """The tokens of one of a problem's references, end-of-sequence included, without what the text repeats of the turn's
        beginning and end. Raises UserError, with the problem's place, if it cannot be one turn of the assistant behind the prompt.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that is graded and shown: that of the tokens before the first end token, special ones such as ``<think>`` included."""
        ...

    def sample(self, prompts: Sequence[list[int]], n: int, max_tokens: int | None = None) -> list[list[Trajectory]]:
        """``n`` completions of each prompt, with behaviour log-probabilities; at most ``rollout.max_tokens`` or ``max_tokens`` long."""
        ...

    def sample_together(self, prompts: Sequence[list[int]], n: int) -> list[list[Trajectory]]:
        """What ``sample`` gives in a single process, shared out over the processes: called with the same arguments and random state in all
        of them, it gives each of them all completions."""
        ...

    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Tensor]:
        """log π of each completion's tokens, float32 [len(completion)], no gradient."""
        ...
