from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from handrail.methods.context import Context
from handrail.methods.critic import Criticizing, CriticSettings
from handrail.methods.graft import restarted
from handrail.methods.repairing import Attempt
from handrail.methods.requests import gather
from handrail.types.trajectory import Group


class StrideSettings(CriticSettings):
    kl: float = Field(0.001, ge=0)
    """β, the coefficient of the KL divergence from the starting model; as for grpo."""
    entropy_bonus: float = Field(0.001, ge=0)
    """Coefficient of the token entropy in the objective; if nonzero, no trajectory can be dropped."""
    first: int = Field(52, ge=1)
    """First step with anchor groups."""
    every: int = Field(12, ge=1)
    """Number of steps from one with anchor groups to the next."""
    anchors: int = Field(5, ge=1)
    """Largest number of anchors of a failed rollout; the longest prefixes come first."""
    anchor_size: int = Field(5, ge=2)
    """Number of rollouts from an anchor."""
    go_on: str = "The steps so far are right. Go on."
    """What the prompt says if the next step of the failed rollout was right; empty for nothing."""
    correct_it: str = "The steps so far are right. The next step was wrong: {step} Correct it."
    """What it says if the next step was wrong; ``{step}`` stands for that step."""


class Stride(Criticizing[StrideSettings]):
    """STRIDE-style: sample again from the steps of a failed rollout, with what a critic says about them.

    rollout: G samples of each problem.
    guide: in every 12th step, a critic finds the first wrong step F of a failed rollout; each of its last 5
        prefixes of 0 to F steps starts a group of its own, trained on a prompt that ends in the prefix.
    credit: GRPO's, within each group.
    surrogate: GRPO's.

    The critic is a step judge, the policy or a second model. The last two are trained: in the first 40 steps,
    every fourth after them and those with anchors, by critiques in place of the rollouts. A group is 5
    critiques of a rollout; R = [verdict right] + 0.8·[each step judged], and rarer verdicts weigh more.
    """

    name, source, status, Settings = "stride", "arXiv 2605.18851", "published", StrideSettings

    @property
    def needs_references(self) -> bool:
        return self.settings.judge == "reference"  # no corrector is asked

    async def guide(self, group: Group, ctx: Context) -> Group | list[Group]:
        s = self.settings
        due = ctx.step >= s.first and not (ctx.step - s.first) % s.every
        if not due and not self.is_critic_step(ctx.step):
            return group
        own, attempts = await (self.critiqued if self.trains_critic else self.attempts)(group, ctx)
        if not due or not attempts:
            return own
        attempt = attempts[0]
        lengths = range(max(0, len(attempt.draft.kept) - s.anchors + 1), len(attempt.draft.kept) + 1)
        anchored = await gather(*(self.anchor(group, attempt, length, ctx) for length in lengths))
        ctx.counts["stride/anchors"] += sum(bool(each.trajectories) for each in anchored)
        return [own, *(each for each in anchored if each.trajectories)]

    async def anchor(self, group: Group, attempt: Attempt, length: int, ctx: Context) -> Group:
        """The group of an anchor with ``length`` right steps; empty if there is no room to continue."""
        s, kept = self.settings, "".join(attempt.draft.kept[:length])
        wrong = (attempt.rollout.judged or [])[length][0].strip()
        said = s.correct_it.replace("{step}", wrong) if length == len(attempt.draft.kept) else s.go_on
        whole = await restarted(group.problem, kept, said, s.anchor_size, ctx)
        ctx.counts["stride/too_long"] += not whole
        if not whole:
            return replace(group, trajectories=[])
        # Solutions are rewarded as a whole; the trajectories are only their ends.
        rewarded = await self.apply_rewards(replace(group, trajectories=whole), ctx)
        return rewarded.map(lambda each: replace(each, text=each.text.removeprefix(kept), judged=None))
