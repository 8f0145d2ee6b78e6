from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from handrail.methods.base import State, Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Verify, gather
from handrail.methods.terms.voting import largest_cluster, most_frequent, spelled_before, trend
from handrail.types.trajectory import Group


class Olr(Term):
    """OLR: replace a problem's answer by the one that the policy agrees on more and more.

    In each pass over a problem, y is the answer of the unique largest cluster of its rollouts (equal in
    spelling or to the verifier; unreadable answers cluster with nothing), and its share their mean reward
    against y, 0 without y. For this pass y is the answer and all is graded by it, if the pass is later than
    ``start``, the slope of the shares over the passes is at least ``slope``, and y is also the unique most
    frequent y of all passes. Passes are counted for each problem; twice in a step is once (our choice). The
    paper's base is grpo with kl = 0.001.
    """

    source: ClassVar[str] = "arXiv 2604.03993"
    status: ClassVar[Status] = "published"
    precedes: ClassVar[frozenset[str]] = frozenset({"fapo", "overlong"})
    needs_answers: ClassVar[bool] = True

    start: int = Field(4, ge=0)
    """Last pass that replaces nothing, counting from 0: by default, the sixth pass is the first to do so."""
    slope: float = 0.05
    """Least slope of the shares, per pass; 0.025 is the paper's alternative."""

    _passes: dict[str, list[list[Any]]] = PrivateAttr(default_factory=dict)  # problem -> [[y or None, share]]
    _changed: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    async def reward(self, group: Group, ctx: Context) -> Group:
        if not group.rollouts or "olr" in group.notes:  # only a reference, or decided already
            return group
        problem, past = group.problem, self._passes.get(group.problem.id, [])
        read = await gather(*(Verify(problem, member, answer=True) for member in group.rollouts))
        cluster, answer, share, graded = await largest_cluster(problem, read), None, 0.0, group.trajectories
        if cluster:
            answer = await spelled_before(problem, cluster[0], [each for each, _ in past])
            changed_problem = replace(problem, answer=answer)
            graded = await gather(*(Verify(changed_problem, member) for member in group.trajectories))
            rewards = [each.reward for each in graded if each.is_rollout and each.reward == each.reward]
            share = fmean(rewards) if rewards else 0.0
        slope = trend([*(each for _, each in past), share])
        steady = bool(cluster) and answer == most_frequent([*(each for each, _ in past), answer])
        another = not any(member.correct for member in cluster)
        changed = steady and another and len(past) > self.start and slope >= self.slope
        ctx.counts["olr/no_majority"] += not cluster
        ctx.counts["olr/refined"] += changed
        note = {"pass": len(past), "given": problem.answer, "answer": answer, "share": share, "slope": slope}
        group = replace(group, notes={**group.notes, "olr": (note, changed)})
        return replace(group, problem=changed_problem, trajectories=graded) if changed else group

    def observe(self, group: Group) -> Any:
        return (group.problem.id, *group.notes["olr"]) if "olr" in group.notes else None

    def learn(self, seen: list[Any]) -> None:
        self._changed, once = [], set[str]()
        for problem, note, changed in seen:
            if problem not in once:
                self._passes.setdefault(problem, []).append([note["answer"], note["share"]])
                self._changed += [{"problem": problem, **note}] if changed else []
            once.add(problem)

    def changed_labels(self) -> list[dict[str, Any]]:
        return self._changed

    def state(self) -> State:
        return {"passes": self._passes}

    def load_state(self, state: State) -> None:
        self._passes = state["passes"]
