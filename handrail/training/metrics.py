"""Metrics of a step, and the summary of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from handrail.engines.local import LocalEngine
from handrail.methods.base import Method
from handrail.training.config import Config
from handrail.training.diversity import diversity, measures
from handrail.training.run_directory import RunDirectory
from handrail.training.update import Outcome
from handrail.types.trajectory import Group

TRAINING_PARTS = ("sample", "verify", "measure", "guide", "update", "given_up")
"""Parts of a step's time that are not evaluation; ``given_up`` is that of steps that the run went back
over."""


class StepMetrics:
    """Collect sums in one process; ``result`` adds up all processes."""

    def __init__(self, groups: Sequence[Group], places: Sequence[int]) -> None:
        """``groups``: graded, before any guidance; ``places``: their problems' in the step."""
        rollouts = [member for group in groups for member in group.rollouts]
        entropies = [known(member.column("entropy")) for member in rollouts]
        self.sums: Counter[str] = Counter({
            "groups": len(groups),
            "graded": sum(bool(group.rollouts) for group in groups),
            "all_wrong": sum(group.all_wrong for group in groups),
            "mixed": sum(group.mixed for group in groups),
            "all_right": sum(group.all_right for group in groups),
            "dead": sum(group.dead for group in groups if group.rollouts),
            "guided": 0,
            "rollouts": len(rollouts),
            "correct": sum(member.correct is True for member in rollouts),
            "verified": sum(member.correct is not None for member in rollouts),
            "rewarded": sum(member.reward == member.reward for member in rollouts),  # not NaN
            "truncated": sum(not member.finished for member in rollouts),
            "sampled": sum(member.trained_tokens for member in rollouts),
            "spread": sum(len(spread) for spread in entropies),
            "trained": 0,
            "off_policy": 0,
            "dropped": 0,
        })  # fmt: skip
        self.all_wrong = {place for place, group in zip(places, groups, strict=True) if group.all_wrong}
        self.reward = sum(member.reward for member in rollouts if member.reward == member.reward)
        self.entropy = float(sum(spread.sum() for spread in entropies))
        self.diversity = [measures(group) for group in groups]
        self.updates: list[dict[str, float]] = []

    def add_update(self, groups: Sequence[tuple[int, Group]], outcome: Outcome) -> None:
        """Add one update; ``groups`` after credit, each with its place."""
        self.sums["guided"] += len(self.all_wrong & {at for at, group in groups if learns_from_others(group)})
        self.sums["trained"] += outcome.tokens_trained
        self.sums["off_policy"] += outcome.tokens_off_policy
        self.sums["dropped"] += outcome.tokens_dropped
        if outcome.figures:
            self.updates.append(outcome.figures)

    def result(self, engine: LocalEngine) -> dict[str, Any]:
        """Metrics of the step: counts over all processes, including the engine's, and means over its
        updates."""
        parts = gather_object([(self.sums, self.reward, self.entropy, engine.counts, self.diversity)])
        sums: Counter[str] = sum((part[0] for part in parts), Counter())
        own: Counter[str] = sum((part[3] for part in parts), Counter())
        return {
            "groups/all": sums["groups"],
            "groups/all_wrong": sums["all_wrong"],
            "groups/mixed": sums["mixed"],
            "groups/all_right": sums["all_right"],
            "groups/dead": sums["dead"],
            "groups/guided": sums["guided"],
            "rollouts": sums["rollouts"],
            "length": ratio(sums["sampled"], sums["rollouts"]),
            "correct": ratio(sums["correct"], sums["verified"]),
            "reward": ratio(sum(part[1] for part in parts), sums["rewarded"]),
            "entropy": ratio(sum(part[2] for part in parts), sums["spread"]),
            "truncated": ratio(sums["truncated"], sums["rollouts"]),
            "tokens/sampled": sums["sampled"],
            "tokens/trained": sums["trained"],
            "tokens/off_policy": sums["off_policy"],
            "tokens/dropped": sums["dropped"],
            **diversity([group for part in parts for group in part[4]]),
            **{name: own[name] for name in sorted(own)},
            **first_unverified(engine.unverified),
            **self.figures(),
            **({} if self.updates else {"note": no_signal(sums)}),
        }

    def figures(self) -> dict[str, float]:
        names = sorted({name for figures in self.updates for name in figures})
        combine = {name: max if name.endswith("/max") else mean for name in names}
        return {
            name: combine[name](figures[name] for figures in self.updates if name in figures)
            for name in names
        }


def known(column: Tensor) -> Tensor:
    """Return the values that are not NaN."""
    return column[~column.isnan()]


def first_unverified(unverified: dict[str, str]) -> dict[str, str]:
    """For each reason in any process's ``unverified``, the first completion without a verdict."""
    found = reversed(gather_object([unverified]))
    return {f"verifier/first_{reason}": said for process in found for reason, said in process.items()}


def tokens_sampled(step: Mapping[str, Any]) -> int:
    """All tokens that the policy sampled in a step: its rollouts and what ``guide`` asked for."""
    return int(step.get("tokens/sampled", 0)) + int(step.get("tokens/resampled", 0))


def learns_from_others(group: Group) -> bool:
    """True if the update of ``group`` learns from tokens that the policy did not sample."""
    return any(member.has_signal and not member.is_rollout for member in group.trajectories)


def ratio(total: float, n: int) -> float | None:
    return total / n if n else None


def no_signal(sums: Counter[str]) -> str:
    """Explain why nothing was learned."""
    if not sums["graded"]:
        return f"no signal: {sums['groups']} groups without a rollout or a usable reference"
    kinds = {"mixed": sums["mixed"], "all right": sums["all_right"]}
    kinds["unverified"] = sums["graded"] - sums["all_wrong"] - sum(kinds.values())
    others = "".join(f", {n} {kind}" for kind, n in kinds.items() if n)
    return f"no signal: {sums['all_wrong']} of {sums['graded']} groups all wrong{others}"


def summary(out: RunDirectory, config: Config, method: Method[Any], spent: str) -> dict[str, Any]:
    """Summary of a run. ``spent`` is the budget that ended the run; empty if none did.

    ``eval``: accuracy and, if measured, diversity before and after training. ``all_wrong``: share of
    all-wrong groups in the first and the last tenth of the steps. ``guided``: number of all-wrong groups that
    were guided. ``off_policy``: share of trained tokens that the policy did not sample. ``salvaged``: share
    of partly correct failures that were repaired.
    """
    lines = out.read(out.metrics)
    steps, timings = lines[1:], out.read(out.timings)
    tenth = max(1, len(steps) // 10)
    return {
        "method": method.name or type(method).__name__,
        "source": method.source,
        "status": method.status,
        "seed": config.train.seed,
        "steps": len(steps),
        "ended_by": spent or "steps",
        "tokens_sampled": sum(map(tokens_sampled, steps)),
        "eval": {
            name: {"start": evaluation(lines[0], name), "end": evaluation(lines[-1], name)}
            for name in config.eval.sets
        },
        "all_wrong": {"first": share(steps[:tenth], "all_wrong"), "last": share(steps[-tenth:], "all_wrong")},
        "guided": total(steps, "groups/guided"),
        "off_policy": ratio(total(steps, "tokens/off_policy"), total(steps, "tokens/trained")),
        "salvaged": salvaged(steps),
        "steps_without_signal": sum("note" in line for line in steps),
        "seconds": round(sum(map(training_seconds, timings)), 2),
    }


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of one step, without evaluation."""
    return sum(seconds.get(part, 0.0) for part in TRAINING_PARTS)


def evaluation(line: dict[str, Any], name: str) -> dict[str, Any]:
    start = f"eval/{name}/"
    return {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)}


def total(lines: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(int(line.get(key, 0)) for line in lines)


def salvaged(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Ratio of the counts ``NAME/repaired`` and ``NAME/partly_right``, which any method may keep."""
    failures = {key for line in lines for key in line if key.endswith("/partly_right")}
    repaired = [key.removesuffix("partly_right") + "repaired" for key in failures]
    return ratio(sum(total(lines, key) for key in repaired), sum(total(lines, key) for key in failures))


def share(lines: Sequence[dict[str, Any]], kind: str) -> float | None:
    """Share of groups of one kind among those with rollouts."""
    graded = sum(line[f"groups/{name}"] for line in lines for name in ("all_wrong", "mixed", "all_right"))
    return ratio(sum(line[f"groups/{kind}"] for line in lines), graded)
