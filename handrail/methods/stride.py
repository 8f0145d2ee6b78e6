from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from handrail.methods.context import Context
from handrail.methods.repairing import Attempt, Repairing, RepairSettings
from handrail.methods.requests import Generate, Verify, gather
from handrail.types.trajectory import Group


class StrideSettings(RepairSettings):
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


class Stride(Repairing[StrideSettings]):
    """STRIDE-style: sample again from the steps of a failed rollout, with what a critic says about them.

    rollout: G samples of each problem.
    guide: in every 12th step, a step judge finds the first wrong step F of a failed rollout; each of its last
        5 prefixes of 0 to F steps starts a group of its own, trained on a prompt that ends in the prefix.
    credit: GRPO's, within each group.
    surrogate: GRPO's.

    The paper trains the critic, too, in turn with the policy; here it is a step judge that stays as it is.
    """

    name, source, status, Settings = "stride", "arXiv 2605.18851", "published", StrideSettings

    @property
    def needs_references(self) -> bool:
        return self.settings.judge == "reference"  # no corrector is asked

    async def guide(self, group: Group, ctx: Context) -> Group | list[Group]:
        s = self.settings
        if ctx.step < s.first or (ctx.step - s.first) % s.every:
            return group
        group, attempts = await self.attempts(group, ctx)
        if not attempts:
            return group
        attempt = attempts[0]
        lengths = range(max(0, len(attempt.draft.kept) - s.anchors + 1), len(attempt.draft.kept) + 1)
        anchored = await gather(*(self.anchor(group, attempt, length, ctx) for length in lengths))
        ctx.counts["stride/anchors"] += sum(bool(each.trajectories) for each in anchored)
        return [group, *(each for each in anchored if each.trajectories)]

    async def anchor(self, group: Group, attempt: Attempt, length: int, ctx: Context) -> Group:
        """The group of an anchor with ``length`` right steps; empty if there is no room to continue."""
        s, problem = self.settings, group.problem
        kept = "".join(attempt.draft.kept[:length])
        wrong = (attempt.rollout.judged or [])[length][0].strip()
        said = s.correct_it.replace("{step}", wrong) if length == len(attempt.draft.kept) else s.go_on
        start = ctx.renderer.completion(kept, end=False, plain=True) if kept else []
        prompt = ctx.renderer.prompt(problem, said or None) + start
        # The room for a problem was checked without what the prompt says here.
        too_long = len(start) >= ctx.max_tokens or ctx.longest is not None and len(prompt) >= ctx.longest
        ctx.counts["stride/too_long"] += too_long
        if too_long:
            return replace(group, trajectories=[])
        members = await Generate(prompt, s.anchor_size, ctx.max_tokens - len(start))
        # Solutions are graded and rewarded as a whole; the trajectories are only their ends.
        whole = [replace(member, text=kept + member.text) for member in members]
        graded = await gather(*(Verify(problem, each) for each in whole))
        rewarded = await self.apply_rewards(replace(group, trajectories=graded), ctx)
        ends = zip(rewarded.trajectories, members, strict=True)
        return replace(
            rewarded, trajectories=[replace(each, text=end.text, judged=None) for each, end in ends]
        )
