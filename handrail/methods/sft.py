"""Imitation of the references, alone or combined with GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from handrail.methods import losses
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.imitating import GrpoSftSettings, Imitating, ImitationSettings, imitate
from handrail.types.problem import Problem
from handrail.types.trajectory import Group


class Sft(Imitating[ImitationSettings]):
    """Supervised fine-tuning on the references.

    rollout: nothing is sampled.
    guide: the reference of every problem is imitated.
    credit: weight 1 on every reference token.
    surrogate: log π.
    """

    name = "sft"
    source = "the standard baseline"
    status = "published"
    Settings = ImitationSettings
    uses_advantages = False
    smallest_group = 1

    def samples(self, problem: Problem) -> int:
        return 0

    async def guide(self, group: Group, ctx: Context) -> Group:
        return imitate(group, ctx)

    def advantages(self, group: Group) -> Group:
        return group

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        return losses.imitation(logp, batch)


class Dft(Sft):
    """Dynamic fine-tuning: SFT weighted by each token's probability, so that unlikely tokens do not dominate.

    rollout: nothing is sampled.
    guide: the reference of every problem is imitated.
    credit: weight 1 on every reference token.
    surrogate: sg(π) · log π, with the probability that the loss computes anyway.
    """

    name = "dft"
    source = "arXiv 2508.05629"

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        return logp.detach().exp() * losses.imitation(logp, batch)


class SftOnFailures(Sft):
    """SFT on failed prompts only.

    rollout: G samples of each problem, used only to find the failed problems.
    guide: if all rollouts are wrong, the reference is imitated.
    credit: weight 1 on every reference token, 0 on the rollouts.
    surrogate: log π.
    """

    name = "sft-on-failures"

    def samples(self, problem: Problem) -> int:
        return self.group_size

    async def guide(self, group: Group, ctx: Context) -> Group:
        return imitate(group, ctx) if group.all_wrong else group


class GrpoSft(Imitating[GrpoSftSettings]):
    """GRPO plus an SFT loss in every group.

    rollout: G samples of each problem.
    guide: the reference is imitated; it does not enter the group's mean.
    credit: GRPO's for the rollouts, weight 1 (times imitation_coef λ) on every reference token.
    surrogate: GRPO's, plus log π on the reference.
    """

    name = "grpo+sft"
    source = "baseline of arXiv 2504.14945 (RL w/ SFT loss)"
    status = "published"
    Settings = GrpoSftSettings
    refuses: ClassVar[Mapping[str, str]] = {
        "olr": "references are imitated unverified, also those that end in an answer that olr has replaced"
    }

    async def guide(self, group: Group, ctx: Context) -> Group:
        return imitate(group, ctx)
