from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from handrail.experts.correctors import Correction, Draft, ReferenceCorrector
from handrail.experts.judges import first_error
from handrail.experts.judges.reference import aligned
from handrail.experts.planners import names_answer
from handrail.experts.registry import CorrectorName, Experts, JudgeName
from handrail.experts.steps import spelt, split_steps
from handrail.methods import losses
from handrail.methods.base import GrpoSettings, Method, Normaliser
from handrail.methods.context import Tools
from handrail.methods.losses import Shape, Streams
from handrail.models import Policy
from handrail.types import Group, Origin, Problem, Trajectory


class ScopeSettings(GrpoSettings):
    normalise_std: bool = False
    """Divide the advantage by the standard deviation of the repaired group's rewards + 1e-4."""
    clip_high: float = Field(0.28, ge=0)
    """Upper bound of the clipped ratio of the policy's own tokens: 1 + clip_high; a corrector's tokens are
    never clipped."""
    normaliser: Normaliser = "token"
    """How token losses are averaged, as for grpo."""
    judge: JudgeName | Literal["random"] = "rule"
    """Judge that finds the first wrong step: ``rule`` checks the arithmetic, ``reference`` compares with the
    reference's results, ``prm`` is the model ``experts.prm``, ``llm`` asks the endpoint; ``random`` is an
    ablation."""
    corrector: CorrectorName = "reference"
    """Corrector that repairs it: ``reference`` takes the reference's step, ``policy`` is the policy with the
    reference in its prompt, ``model`` is ``experts.teacher``, ``endpoint`` asks the endpoint."""
    mode: Literal["step", "suffix", "reference"] = "step"
    """``step``: the corrector writes one step and the policy goes on; ``suffix``: the corrector writes to the
    end; ``reference``: the corrector sees the reference, writes one step, and may not give the answer
    away."""
    threshold: float = Field(0.5, gt=0, le=1)
    """τ: the first step with a lower score is the first wrong step."""
    least_right: float = Field(0.3, ge=0, lt=1)
    """ρ: a rollout is repaired only if at least this share of its steps comes before the first wrong one."""
    repairs: int = Field(1, ge=1)
    """M: number of rollouts of a group to repair, those with the largest share of right steps first."""
    tries: int = Field(4, ge=1)
    """N: number of attempts at a repair, until the verifier accepts one."""
    step_tokens: int = Field(256, ge=1)
    """Longest step of a corrector, in tokens."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default steps end at blank lines, or else at lines,
    semicolons or sentences."""
    no_prefix: Literal["skip", "reference"] = "skip"
    """What to do with a rollout whose very first step is wrong: leave it as it is, or replace it by the whole
    reference."""
    placing: Literal["replace", "append"] = "replace"
    """Replace the failed rollout by the repaired one, or append it, so that a group with a single failure
    keeps its signal."""
    shaping: Shape = "p/(p+c)"
    """Shaping function f of the probability p of a corrector's token; ``p`` means no shaping."""
    gamma: float = Field(0.1, gt=0)
    """Constant of f: c in p/(p+c), the exponent e in p^e; the other functions have none."""


@dataclass(frozen=True)
class Attempt:
    """A failed rollout (``group``, ``place``) of which the first ``right`` steps are kept."""

    group: int
    place: int
    rollout: Trajectory
    draft: Draft
    right: float  # share of its steps

    @property
    def kept(self) -> str:
        return "".join(self.draft.kept)


class Scope(Method):
    """SCOPE-style: failed rollouts are repaired from their first wrong step, and stay where the verifier accepts them.

    rollout: G samples of each problem.
    guide: a step judge finds the first wrong step of the failed rollouts; of the M with the largest share of right steps, at
        least ρ, a corrector replaces that step and the policy goes on, up to N times, until the verifier accepts one; it
        takes the failed rollout's place.
    credit: R − mean R over the repaired group, without the standard deviation.
    surrogate: f(π)·A on the corrector's tokens, f(p) = p/(p + γ); the clipped ratio on the policy's own.

    The idea is from the abstract; the mechanism is our reconstruction.
    """

    name = "scope"
    source = "arXiv 2602.24110"
    status = "reconstruction"
    Settings = ScopeSettings

    @property
    def scope(self) -> ScopeSettings:
        assert isinstance(self.settings, ScopeSettings)
        return self.settings

    @property
    def needs_references(self) -> bool:
        return "reference" in (self.scope.judge, self.scope.mode) or self.scope.corrector in ("reference", "policy")

    def prepare(self, experts: Experts) -> None:
        s = self.scope
        self.judge = None if s.judge == "random" else experts.judge(s.judge, s.step_end)
        self.corrector = experts.corrector(s.corrector, s.mode == "reference", s.step_tokens, s.step_end)

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        groups = self.judged(groups, tools)
        repaired: dict[int, dict[int, Trajectory]] = {}
        for attempt, trajectory in self.repair(self.chosen(self.attempts(groups, tools), tools), tools):
            repaired.setdefault(attempt.group, {})[attempt.place] = trajectory
        return [self.placed(group, repaired.get(index, {})) for index, group in enumerate(groups)]

    def placed(self, group: Group, repaired: dict[int, Trajectory]) -> Group:
        if self.scope.placing == "append":
            return replace(group, trajectories=[*group.trajectories, *repaired.values()])
        return replace(group, trajectories=[repaired.get(place, old) for place, old in enumerate(group.trajectories)])

    # Who is repaired, and from where

    def judged(self, groups: list[Group], tools: Tools) -> list[Group]:
        """The groups, their failed rollouts with the judge's score of every step; those that were cut off are not judged."""
        failed = list(failures(groups))
        whole = [(index, place, rollout) for index, place, rollout in failed if rollout.finished]
        tools.counts["scope/failed"] += len(failed)
        tools.counts["scope/truncated"] += len(failed) - len(whole)
        if self.judge is None:
            return groups
        steps = [split_steps(rollout.text, self.scope.step_end) for _, _, rollout in whole]
        scores = self.judge.judge([(groups[index].problem, parts) for (index, _, _), parts in zip(whole, steps, strict=True)])
        tools.counts["scope/not_judged"] += scores.count(None)
        members = [list(group.trajectories) for group in groups]
        for (index, place, rollout), parts, score in zip(whole, steps, scores, strict=True):
            members[index][place] = replace(rollout, judged=None if score is None else list(zip(parts, score, strict=True)))
        return [replace(group, trajectories=trajectories) for group, trajectories in zip(groups, members, strict=True)]

    def attempts(self, groups: Sequence[Group], tools: Tools) -> list[Attempt]:
        """The failed rollouts with a first wrong step, cut before it."""
        out = []
        for index, place, rollout in failures(groups):
            if not rollout.finished or (self.judge is not None and rollout.judged is None):
                continue
            parts = split_steps(rollout.text, self.scope.step_end)
            at = self.first_wrong(rollout, len(parts), tools)
            tools.counts["scope/no_error_found"] += at is None
            if at is not None:
                problem = groups[index].problem
                out.append(Attempt(index, place, rollout, Draft(problem, parts[:at], self.followed(problem, parts[:at])), at / len(parts)))
        return out

    def followed(self, problem: Problem, kept: list[str]) -> str | None:
        """The reference that the kept steps follow furthest."""
        return max(problem.references, key=lambda text: aligned(kept, split_steps(text, self.scope.step_end)), default=None)

    def first_wrong(self, rollout: Trajectory, steps: int, tools: Tools) -> int | None:
        if rollout.judged is None:
            return tools.rng.randrange(1, steps) if steps > 1 else None
        return first_error([score for _, score in rollout.judged], self.scope.threshold)

    def chosen(self, attempts: Sequence[Attempt], tools: Tools) -> list[Attempt]:
        """Of each group the M attempts that were right for longest."""
        s = self.scope
        blank = [attempt for attempt in attempts if not attempt.draft.kept]
        short = [attempt for attempt in attempts if attempt.draft.kept and attempt.right < s.least_right]
        tools.counts["scope/no_prefix"] += len(blank)
        tools.counts["scope/short_prefix"] += len(short)
        tools.counts["scope/partly_right"] += len(attempts) - len(blank)
        dropped = short + (blank if s.no_prefix == "skip" else [])
        out: list[Attempt] = []
        taken: Counter[int] = Counter()
        for attempt in sorted(attempts, key=lambda attempt: -attempt.right):
            if attempt not in dropped and taken[attempt.group] < s.repairs:
                taken[attempt.group] += 1
                out.append(attempt)
        return out

    # The repair

    def repair(self, attempts: list[Attempt], tools: Tools) -> list[tuple[Attempt, Trajectory]]:
        """The attempts whose repair the verifier accepts, with that repair."""
        tools.counts["scope/tried"] += len(attempts)
        done = []
        for number in range(self.scope.tries):
            accepted = self.once(attempts, number, tools)
            done += accepted
            attempts = [attempt for attempt in attempts if all(attempt is not other for other, _ in accepted)]
        replaced = sum(not attempt.draft.kept for attempt, _ in done)
        tools.counts["scope/replaced"] += replaced
        tools.counts["scope/repaired"] += len(done) - replaced
        tools.counts["scope/repair_failed"] += len(attempts)
        return done

    def once(self, attempts: list[Attempt], number: int, tools: Tools) -> list[tuple[Attempt, Trajectory]]:
        """One try at every attempt: the accepted ones."""
        corrections = self.corrections(attempts, number, tools)
        drafts = [
            (attempt, self.opening(attempt, correction, tools.policy))
            for attempt, correction in zip(attempts, corrections, strict=True)
            if correction is not None
        ]
        fitting = [(attempt, opening) for attempt, opening in drafts if self.room(opening) >= (not opening.finished)]
        tools.counts["scope/too_long"] += len(drafts) - len(fitting)
        drafts = fitting
        solutions = self.finished([opening for _, opening in drafts], tools)
        graded = tools.grade([(attempt.draft.problem, solution) for (attempt, _), solution in zip(drafts, solutions, strict=True)])
        return [(attempt, solution) for (attempt, _), solution in zip(drafts, graded, strict=True) if solution.correct]

    def corrections(self, attempts: list[Attempt], number: int, tools: Tools) -> list[Correction | None]:
        partly = [attempt.draft for attempt in attempts if attempt.draft.kept]
        blank = [attempt.draft for attempt in attempts if not attempt.draft.kept]
        parts = iter(self.corrector.correct(partly, self.scope.mode == "suffix", number))
        references = iter(ReferenceCorrector().correct(blank, True, number))
        corrections = [next(parts if attempt.draft.kept else references) for attempt in attempts]
        tools.counts["scope/no_correction"] += corrections.count(None)
        if self.scope.mode == "reference":
            for index, (attempt, correction) in enumerate(zip(attempts, corrections, strict=True)):
                if correction and attempt.draft.kept and names_answer(correction.text, attempt.draft.problem):
                    tools.counts["scope/leaking_step"] += 1
                    corrections[index] = None
        return corrections

    def opening(self, attempt: Attempt, correction: Correction, policy: Policy) -> Trajectory:
        """The kept tokens and the correction behind them."""
        rollout, kept = attempt.rollout, attempt.kept
        tokens = spelt(rollout.completion, kept, policy)
        rest = kept[len(policy.decode(rollout.completion[:tokens])) :]
        origin = self.corrector.origin if attempt.draft.kept else Origin.REFERENCE
        plain = origin is not Origin.REFERENCE  # who is asked may not end the turn; references are the user's own
        written = policy.encode_completion(rest + correction.text, end=correction.complete, plain=plain)
        opening = rollout.upto(tokens).followed(written, origin, finished=correction.complete)
        return replace(opening, judged=rollout.judged and rollout.judged[: len(attempt.draft.kept)])

    def room(self, opening: Trajectory) -> int:
        """How many tokens the policy may add."""
        return self.rollout_config.max_tokens - len(opening)

    def finished(self, openings: list[Trajectory], tools: Tools) -> list[Trajectory]:
        """The openings, continued by the policy where they are not complete, with their text."""
        drawn = self.continued([opening for opening in openings if not opening.finished], tools.policy)
        out = []
        for solution in openings:
            if not solution.finished:
                rest, fits = next(drawn), self.room(solution)
                tools.counts["tokens/resampled"] += len(rest)
                solution = solution.continued(rest if len(rest) <= fits else rest.upto(fits))
            out.append(replace(solution, text=tools.policy.decode(solution.completion)))
        return out

    def continued(self, openings: list[Trajectory], policy: Policy) -> Iterator[Trajectory]:
        """What the policy adds to each: those with most room first, and with them all that stay within the context meanwhile."""
        prompts = [opening.prompt + opening.completion for opening in openings]
        waiting = sorted(range(len(openings)), key=lambda place: -self.room(openings[place]))
        drawn: dict[int, Trajectory] = {}
        while waiting:
            room = self.room(openings[waiting[0]])
            together = [place for place in waiting if policy.context is None or len(prompts[place]) + room <= policy.context]
            together = together or waiting[:1]
            rows = policy.sample([prompts[place] for place in together], 1, room)
            drawn.update((place, row[0]) for place, row in zip(together, rows, strict=True))
            waiting = [place for place in waiting if place not in drawn]
        return (drawn[place] for place in range(len(openings)))

    def surrogate(self, logp: Tensor, streams: Streams) -> Tensor:
        corrected = losses.shaped(logp, streams, self.scope.shaping, self.scope.gamma)
        own = self.policy_gradient(logp, streams)
        return torch.where(streams.origin == Origin.POLICY, own, corrected) + losses.imitation(logp, streams)


def failures(groups: Sequence[Group]) -> Iterator[tuple[int, int, Trajectory]]:
    """Group, place and trajectory of every rollout known to be wrong."""
    for index, group in enumerate(groups):
        for place, rollout in enumerate(group.trajectories):
            if rollout.is_rollout and rollout.correct is False:
                yield index, place, rollout
