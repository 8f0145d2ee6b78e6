"""A language model as corrector."""

from __future__ import annotations

from collections.abc import Sequence

from handrail.guidance.conversations import correction_conversation, read_correction
from handrail.guidance.corrector import Correction, Draft, bare
from handrail.guidance.endpoint import Endpoint
from handrail.trajectory import Origin


class EndpointCorrector:
    """Asks for the next step, or the rest; with the reference before its eyes if ``shown``."""

    origin = Origin.TEACHER

    def __init__(self, endpoint: Endpoint, shown: bool, max_tokens: int) -> None:
        self.endpoint, self.shown, self.max_tokens = endpoint, shown, max_tokens

    def correct(self, drafts: Sequence[Draft], whole: bool, attempt: int) -> list[Correction | None]:
        asked = [correction_conversation(draft.problem, draft.kept, draft.reference if self.shown else None, whole) for draft in drafts]
        # The first answer is the likeliest; further ones are drawn, to differ.
        answers = self.endpoint.ask(asked, self.max_tokens, 1.0 if attempt else 0.0, attempt)
        return [None if answer is None else self._read(answer, draft, whole) for answer, draft in zip(answers, drafts, strict=True)]

    @staticmethod
    def _read(answer: str, draft: Draft, whole: bool) -> Correction | None:
        found = read_correction(answer)
        if found is None:
            return None
        text, done = found
        return Correction(text, complete=True) if whole or done else Correction(bare(text) + draft.ending, complete=False)
