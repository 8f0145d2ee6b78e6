from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from handrail.methods import losses
from handrail.methods.base import GrpoSettings, Method, Normaliser
from handrail.methods.context import Tools
from handrail.methods.losses import Shape, Streams
from handrail.types import Group, Origin, Problem


class LuffySettings(GrpoSettings):
    normalise_std: bool = False
    """Divide the advantage by the standard deviation of the group's rewards + 1e-4, as eq. 4 does; the
    paper's experiments and released code do not."""
    clip: bool = False
    """Clip the rollouts' importance ratio, as eq. 6 does; the paper's final configuration does not.
    References are never clipped."""
    normaliser: Normaliser = "constant"
    """How token losses are averaged, as for grpo; the paper divides by the constant
    ``rollout.max_tokens``."""
    entropy_bonus: float = Field(0.01, ge=0)
    """Coefficient of the tokens' entropy: 0.01 in the paper; 0.001, differently averaged, in its code. If it
    is not 0, no trajectory can be dropped."""
    shaping: Shape = "p/(p+c)"
    """Shaping function f of a reference token's probability p; ``p`` is mixed-policy GRPO without shaping."""
    gamma: float = Field(0.1, gt=0)
    """Constant of f: c in p/(p+c), the exponent e in p^e; the other functions have none."""


class Luffy(Method):
    """LUFFY: the reference joins the group as its G-th trajectory.

    rollout: G − 1 samples of each problem (G where it has no reference).
    guide: the reference joins the group, graded by the same verifier; one graded wrong gets a negative advantage, an unverified one
        stays out.
    credit: R − mean R over all G, without the standard deviation.
    surrogate: f(π)·A on reference tokens, f(p) = p/(p + γ); r·A on the policy's own, unclipped.
    """

    name = "luffy"
    source = "arXiv 2504.14945"
    status = "published"
    Settings = LuffySettings

    @property
    def needs_references(self) -> bool:
        return True

    def rollout(self, problems: Sequence[Problem], tools: Tools) -> list[Group]:
        groups: dict[int, Group] = {}
        for guided, samples in ((True, self.rollout_config.group_size - 1), (False, self.rollout_config.group_size)):
            places = [place for place, problem in enumerate(problems) if bool(problem.references) is guided]
            groups.update(zip(places, self.sample([problems[place] for place in places], tools, samples), strict=True))
        return [groups[place] for place in range(len(problems))]

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        references = [tools.reference(group.problem) for group in groups]
        tools.counts["guide/no_reference"] += references.count(None)
        pairs = zip(groups, references, strict=True)
        graded = tools.grade_references([(group.problem, reference) for group, reference in pairs if reference])
        joining = iter(graded)
        references = [next(joining) if reference else None for reference in references]
        return [
            # A reference without a verdict would get the advantage of a wrong one.
            group if reference is None or reference.correct is None else replace(group, trajectories=[*group.trajectories, reference])
            for group, reference in zip(groups, references, strict=True)
        ]

    def surrogate(self, logp: Tensor, streams: Streams) -> Tensor:
        settings = self.settings
        assert isinstance(settings, LuffySettings)
        reference = losses.shaped(logp, streams, settings.shaping, settings.gamma)
        own = self.policy_gradient(logp, streams)
        return torch.where(streams.origin == Origin.REFERENCE, reference, own) + losses.imitation(logp, streams)
