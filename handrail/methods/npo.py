from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from handrail._util.errors import UserError
from handrail.data.answers import Answer, read_answers
from handrail.methods.context import Context
from handrail.methods.replaying import Replaying, ReplaySettings
from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Group


class NpoSettings(ReplaySettings):
    cache: str
    """File of answers that ``handrail harvest`` sampled from a later checkpoint of the same model."""


class Npo(Replaying[NpoSettings]):
    """NPO: in hard groups, a right answer of a later checkpoint of the same run replaces a rollout.

    rollout: G samples of each problem.
    guide: if at most a share τ of the rollouts is right, a cached answer, if the verifier still accepts it,
        replaces the last rollout.
    credit: GRPO's over the mixed group.
    surrogate: the clipped ratio; that of the answer's tokens is π/q with the later checkpoint's q.

    The formulas come from agreeing notes on the paper; no code was published.
    """

    name, source, status, Settings = "npo", "arXiv 2604.20733", "secondary", NpoSettings

    readable = False
    """True once the answers are known to consist of the policy's tokens."""

    @cached_property
    def answers(self) -> dict[str, list[Answer]]:  # type: ignore[override]  # nobody sets it
        # Not in __init__: a process that only computes the loss may not have the file.
        return read_answers(self.settings.cache, "method.cache")

    def check(self, problems: Sequence[Problem]) -> None:
        super().check(problems)
        if not any(self.answers.get(problem.id) for problem in problems):
            raise UserError(
                f"method.cache: {self.settings.cache} has no answer to any of the training problems; harvest "
                "from the data that the run trains on"
            )

    async def guide(self, group: Group, ctx: Context) -> Group:
        self.require_tokens(ctx.renderer)
        return await super().guide(group, ctx)

    def require_tokens(self, renderer: Renderer) -> None:
        """Raise UserError if the answers do not consist of the renderer's tokens."""
        if self.readable:
            return
        for name, answers in self.answers.items():
            for answer in answers:
                known = all(0 <= token < renderer.embeddings for token in answer.tokens)
                if not known or renderer.text(answer.tokens).strip() != answer.text.strip():
                    raise UserError(
                        f"method.cache: in the tokens of {renderer.model}, the answer to {name} in "
                        f"{self.settings.cache} is another text; harvest it from a later checkpoint of this "
                        "model"
                    )
        self.readable = True
