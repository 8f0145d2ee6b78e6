"""LUFFY's reference, SCOPE's repair and NPO's replayed answer in one group.

Each has the surrogate of its author. Run: ``method.name = "examples/luffy_scope_npo.py:LuffyScopeNpo"``, with
``method.cache`` from ``handrail harvest``.
"""

from typing import Any

from torch import Tensor

from handrail import Author, Context, Group, Problem, TokenBatch
from handrail.methods import losses
from handrail.methods.luffy import Luffy
from handrail.methods.npo import Npo, NpoSettings
from handrail.methods.scope import Scope, ScopeSettings


class Settings(ScopeSettings):
    cache: str
    """File of answers that ``handrail harvest`` sampled from a later checkpoint of the same model."""


class LuffyScopeNpo(Scope):
    """LUFFY, SCOPE and NPO by author.

    rollout: LUFFY's.
    guide: LUFFY's, then SCOPE's, then NPO's.
    credit: SCOPE's, over all of the group.
    surrogate: f(π)·A on the reference's and the corrector's tokens, the clipped ratio on the policy's own and
        on the replayed ones.
    """

    Settings = Settings

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.luffy = Luffy(group_size=self.group_size, terms=self.terms)
        self.npo = Npo(NpoSettings(cache=self.settings.cache), self.group_size, terms=self.terms)

    @property
    def needs_references(self) -> bool:
        return True

    def samples(self, problem: Problem) -> int:
        return self.luffy.samples(problem)

    async def guide(self, group: Group, ctx: Context) -> Group:
        with_reference = await self.luffy.guide(group, ctx)
        return await self.npo.guide(await super().guide(with_reference, ctx), ctx)

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        def shaped(logp: Tensor, batch: TokenBatch) -> Tensor:
            return losses.shaped(logp, batch, self.settings.shaping, self.settings.gamma)

        return losses.by_author({
            Author.POLICY: self.policy_gradient, Author.REPLAY: self.policy_gradient,
            Author.REFERENCE: shaped, Author.TEACHER: shaped,
        })(logp, batch)  # fmt: skip
