from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from handrail.methods.base import State, Status, Term
from handrail.methods.context import Context
from handrail.methods.terms.novelty import Novelty, bonuses, padded
from handrail.methods.terms.step_tokens import with_bonuses, written
from handrail.types.trajectory import Group, Trajectory


class Imentor(Term):
    """i-MENTOR: a bonus for wrong trajectories on which two small networks disagree.

    A + b on the policy's own tokens of trajectories with a reward below 1; b = scale·(e − min e)/(max e −
    min e) over the whole step, times decay/(decay + k) in the networks' k-th step (from 0). e is (target −
    predictor)² of a trajectory's tokens, before one step on mean e; equal e and a lone one give 0.
    The paper's base is grpo with std_epsilon = 1e-10.
    """

    source: ClassVar[str] = "arXiv 2505.17621"
    status: ClassVar[Status] = "published"
    refuses: ClassVar[Mapping[str, str]] = {
        name: f"with {name}, right answers can score below 1 too" for name in ("fapo", "overlong")
    }

    scale: float = Field(0.5, ge=0)
    """Largest bonus."""
    decay: float = Field(40.0, gt=0)
    """Steps after which the bonus is halved."""
    prompt_tokens: int = Field(256, ge=1)
    """The networks read the last tokens of a prompt; a longer one is cut (our choice)."""
    response_tokens: int = Field(1024, ge=1)
    """The networks read the first tokens of a completion; a longer one is cut (our choice)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the networks."""

    _novelty: Novelty | None = PrivateAttr(None)
    _bonus: dict[tuple[int, ...], float] = PrivateAttr(default_factory=dict)

    async def guide(self, group: Group, ctx: Context) -> Group:
        seen = (ctx.renderer.embeddings, self.rows(written(group)))
        return replace(group, notes={**group.notes, "imentor": seen})

    def observe(self, group: Group) -> Any:
        return group.notes.get("imentor")

    def learn(self, seen: list[Any]) -> None:
        rows, self._bonus = [row for _, rows in seen for row in rows], {}
        if len(rows) < 2:  # nothing to normalize over
            return
        novelty = self.opened(seen[0][0])
        scale = self.scale * self.decay / (self.decay + int(novelty.steps))
        self._bonus = dict(zip(rows, bonuses(novelty.step(rows), scale).tolist(), strict=True))

    async def credit(self, group: Group, ctx: Context) -> Group:
        ctx.counts["imentor/groups_without_bonus"] += not self._bonus
        wrong = [member for member in written(group) if member.reward < 1]
        found = [self._bonus.get(row, 0.0) for row in self.rows(wrong)]
        ctx.counts["imentor/bonuses"] += sum(bonus > 0 for bonus in found)
        return with_bonuses(group, wrong, found)

    def rows(self, members: Sequence[Trajectory]) -> list[tuple[int, ...]]:
        return [padded(member, self.prompt_tokens, self.response_tokens) for member in members]

    def opened(self, vocabulary: int) -> Novelty:
        length = self.prompt_tokens + self.response_tokens
        self._novelty = self._novelty or Novelty(vocabulary, length, self.learning_rate)
        return self._novelty

    def state(self) -> State:
        return self._novelty.state() if self._novelty else {}

    def load_state(self, state: State) -> None:
        if state:
            self.opened(len(state["nets"]["embedding.weight"])).load_state(state)
