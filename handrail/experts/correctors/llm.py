"""A language model behind an endpoint as corrector."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.experts.conversations import correction_conversation, read_correction
from handrail.experts.correctors import Correction, Draft, bare
from handrail.experts.endpoint import Endpoint
from handrail.experts.steps import split_steps


class EndpointCorrector:
    """Ask for the next step or the rest, showing the reference if ``shown``."""

    def __init__(
        self, endpoint: Endpoint, shown: bool, step_end: str | None = None, max_tokens: int = 2048
    ) -> None:
        """``max_tokens``: limit of the answer, including reasoning."""
        self.endpoint, self.shown, self.step_end, self.max_tokens = endpoint, shown, step_end, max_tokens

    def correct(
        self, drafts: Sequence[Draft], whole: bool, attempt: int, seeds: Sequence[int] = ()
    ) -> list[Correction | None]:
        asked = [
            correction_conversation(draft.problem, draft.kept, draft.reference if self.shown else None, whole)
            for draft in drafts
        ]
        # The first attempt is greedy; further ones are sampled, so that they differ.
        answers = self.endpoint.ask(asked, self.max_tokens, 1.0 if attempt else 0.0, attempt)
        return [
            None if answer is None else self._read(answer, draft, whole)
            for answer, draft in zip(answers, drafts, strict=True)
        ]

    def _read(self, answer: str, draft: Draft, whole: bool) -> Correction | None:
        found = read_correction(answer)
        if found is None:
            return None
        text, done = found
        steps = split_steps(text, self.step_end)  # a model that is asked for one step may write several
        if whole or done and len(steps) == 1:
            return Correction(text, complete=True)
        return Correction(bare(steps[0]) + draft.ending, complete=False)
