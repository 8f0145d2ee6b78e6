from __future__ import annotations

from pydantic import Field
from torch import Tensor

from handrail.methods import losses
from handrail.methods.base import GrpoSettings, LossNormalizer, Method
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.losses import Shape
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group


class LuffySettings(GrpoSettings):
    normalize_std: bool = False
    """Divide the advantage by the standard deviation of the group's rewards + std_epsilon, as eq. 4 does; the
    paper's experiments and released code do not."""
    clip: bool = False
    """Clip the rollouts' importance ratio, as eq. 6 does; the paper's final configuration does not."""
    loss_normalizer: LossNormalizer = "constant"
    """How token losses are averaged; the paper divides by the constant ``rollout.max_tokens``."""
    entropy_bonus: float = Field(0.01, ge=0)
    """Coefficient of the tokens' entropy: 0.01 in the paper; 0.001, differently averaged, in its code. If it
    is not 0, no trajectory can be dropped."""
    shaping: Shape = "p/(p+c)"
    """Shaping function f of a reference token's probability p; ``p`` is mixed-policy GRPO without shaping."""
    gamma: float = Field(0.1, gt=0)
    """Constant of f: c in p/(p+c), the exponent e in p^e; the other functions have none."""


class Luffy(Method[LuffySettings]):
    """LUFFY: the reference joins the group as its G-th trajectory.

    rollout: G − 1 samples of each problem (G if it has no reference).
    guide: the reference joins the group, graded by the same verifier. If it is graded wrong, it gets a
        negative advantage; if it is unverified, it stays out.
    credit: R − mean R over all G, without the standard deviation.
    surrogate: f(π)·A on reference tokens, f(p) = p/(p + γ); r·A on the policy's own, unclipped.
    """

    name, source, status, Settings = "luffy", "arXiv 2504.14945", "published", LuffySettings

    @property
    def needs_references(self) -> bool:
        return True

    def samples(self, problem: Problem) -> int:
        return self.group_size - bool(problem.references)

    async def guide(self, group: Group, ctx: Context) -> Group:
        reference = await self.verified_reference(group, ctx)
        return group if reference is None or reference.correct is None else group.add(reference)

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        def shaped(logp: Tensor, batch: TokenBatch) -> Tensor:
            return losses.shaped(logp, batch, self.settings.shaping, self.settings.gamma)

        mixed = losses.by_author({Author.POLICY: self.policy_gradient, Author.REFERENCE: shaped})
        return mixed(logp, batch) + losses.imitation(logp, batch)
