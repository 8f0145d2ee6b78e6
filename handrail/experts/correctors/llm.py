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
        # The first answer is the likeliest; further ones are drawn, to differ.
        temperature, readers = 1.0 if attempt else 0.0, [read_correction] * len(asked)
        answers = self.endpoint.ask_and_read(asked, readers, self.max_tokens, temperature, attempt)
        return [
            None if answer is None else self._correction(*answer, draft, whole)
            for answer, draft in zip(answers, drafts, strict=True)
        ]

    def _correction(self, text: str, done: bool, draft: Draft, whole: bool) -> Correction:
        steps = split_steps(text, self.step_end)  # a model asked for one step may write several
        if whole or done and len(steps) == 1:
            return Correction(text, complete=True)
        return Correction(bare(steps[0]) + draft.ending, complete=False)
