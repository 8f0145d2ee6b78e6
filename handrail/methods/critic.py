"""Base class of methods whose critic can be trained: the policy itself, or a second model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from operator import mul
from typing import Any, TypeVar

from pydantic import Field

from handrail._util.errors import UserError
from handrail.experts.config import Role
from handrail.experts.conversations import critique_conversation, read_critique
from handrail.experts.steps import split_steps
from handrail.methods.base import State
from handrail.methods.context import Context
from handrail.methods.repairing import Attempt, Repairing, RepairSettings
from handrail.methods.requests import Generate
from handrail.types.trajectory import Group


class CriticSettings(RepairSettings):
    judge: str = "arithmetic"
    """Critic that finds the first wrong step: a judge as for scope, which stays as it is; ``policy``: the
    policy, which also learns to judge its own solutions; or ``critic``: a second model, which learns to judge
    them (``experts.critic``). The next five settings are for ``policy`` and ``critic``."""
    warm_up: int = Field(40, ge=0)
    """Number of steps at the start that train only the critic."""
    critic_every: int = Field(4, ge=1)
    """Steps from one that trains only the critic to the next, after the warm-up."""
    critiques: int = Field(5, ge=2)
    """Number of critiques of a solution, which are a group."""
    format_reward: float = Field(0.8, ge=0)
    """Reward of a critique with a verdict that judges each step once; a right verdict earns 1 besides."""
    class_smoothing: float = Field(0.8, ge=0, lt=1)
    """Share of the previous value in the moving averages of the numbers of critiques of wrong and of right
    solutions; the critiques' advantages are divided by the roots of these, and scaled to mean 1."""


S = TypeVar("S", bound=CriticSettings)


class Criticizing(Repairing[S]):
    """A method whose critic can be trained. Its counts begin with its name."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sizes: list[float] = []
        """Moving averages of the numbers of critiques of wrong and of right solutions; empty at first."""
        self.weights = [1.0, 1.0]
        """Factors of their advantages in the present step."""
        if self.trains_critic and self.terms:
            raise UserError(
                f'method.terms: terms act on solutions, and with judge = "{self.settings.judge}" critiques '
                "are trained too; leave them out, or name another judge"
            )

    @property
    def trains_critic(self) -> bool:
        return self.settings.judge in ("policy", "critic")

    @property
    def trained(self) -> frozenset[str]:
        return frozenset({"critic"} if self.settings.judge == "critic" else ())

    @property
    def experts(self) -> Mapping[Role, str]:
        """As for every repair; a critic that is trained is no expert."""
        named = super().experts
        return {role: named[role] for role in named if role != "judge" or not self.trains_critic}

    def is_critic_step(self, step: int) -> bool:
        s = self.settings
        return self.trains_critic and (step <= s.warm_up or not (step - s.warm_up) % s.critic_every)

    async def critiqued(self, group: Group, ctx: Context) -> tuple[Group, list[Attempt]]:
        """Critiques of the first rollout with a verdict, as a group on a prompt of their own; and this
        rollout, if it is wrong and the first critique that says so and judges every step finds where."""
        s, problem = self.settings, group.problem
        empty = replace(group, trajectories=[], model=s.judge)
        solution = next((member for member in group.rollouts if member.correct is not None), None)
        steps = split_steps(solution.text, s.step_end) if solution else []
        if solution is None or not steps:
            ctx.counts[f"{self.name}/nothing_to_judge"] += 1
            return empty, []
        question = critique_conversation(problem, steps)[0]["content"]
        prompt = ctx.renderer.prompt(replace(problem, prompt=question))
        if ctx.longest is not None and len(prompt) >= ctx.longest:
            ctx.counts[f"{self.name}/too_long"] += 1
            return empty, []
        members, right, attempts = [], solution.correct is True, list[Attempt | None]()
        for member in await Generate(prompt, s.critiques, model=s.judge):
            judged, verdict = read_critique(member.text, len(steps))
            agrees = verdict is right
            reward = agrees + s.format_reward * (judged is not None) if verdict is not None else 0.0
            members.append(replace(member, correct=agrees, reward=reward))
            if not right and verdict is False and judged and not attempts:
                scores = zip(steps, map(float, judged), strict=True)
                attempts.append(self.cut(problem, replace(solution, judged=list(scores)), ctx))
        ctx.counts[f"{self.name}/critiques"] += len(members)
        ctx.counts[f"{self.name}/right_verdicts"] += sum(member.correct is True for member in members)
        notes = {**group.notes, "critic": (right, len(members))}
        return replace(empty, trajectories=members, notes=notes), [each for each in attempts if each]

    def observe(self, group: Group) -> Any:
        return group.notes.get("critic")

    def learn(self, seen: list[Any]) -> None:
        if not seen:
            return
        sizes = [sum(n for right, n in seen if right is kind) for kind in (False, True)]
        keep = self.settings.class_smoothing
        pairs = zip(self.sizes or sizes, sizes, strict=True)
        self.sizes = [keep * before + (1 - keep) * now for before, now in pairs]
        raw = [1 / (sqrt(size) + 1e-6) for size in self.sizes]
        mean = sum(map(mul, raw, sizes)) / sum(sizes)
        self.weights = [each / mean for each in raw]

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited = await super().credit(group, ctx)
        if credited is None or "critic" not in group.notes:
            return credited
        weight = self.weights[group.notes["critic"][0]]
        return credited.map(lambda each: each.with_columns(advantage=each.column("advantage") * weight))

    def state(self) -> State:
        return {"sizes": self.sizes}

    def load_state(self, state: State) -> None:
        self.sizes = state.get("sizes", [])
