"""Test the papers' claims against the results of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from benchmarks.suite.suite import Result, Suite
from handrail.eval.differences import Difference, Rewards, over_seeds, paired

Answer = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Row:
    """A claim in one setting: it holds if the difference is above ``margin`` (points in [0, 1])."""

    setting: str
    difference: Difference
    margin: float = 0.0

    @property
    def answer(self) -> Answer:
        if self.difference.low > self.margin:
            return "holds"
        return "fails" if self.difference.high <= self.margin else "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of the papers' (``says``) with what was measured (``how``) and its rows.

    ``planned`` is the number of settings that the suite will have. ``average`` is over the settings with
    results; it is None if there is only one.
    """

    says: str
    how: str
    rows: list[Row]
    planned: int
    average: Row | None = None

    @property
    def answer(self) -> str:
        """The answer in words, with the number of settings for each."""
        so_far = f", of {self.planned} planned" if len(self.rows) < self.planned else ""
        counts = {
            answer: sum(row.answer == answer for row in self.rows)
            for answer in ("holds", "fails", "undecided")
        }
        for answer in ("holds", "fails"):
            if counts[answer] == len(self.rows):
                return (
                    f"{answer} in all {len(self.rows)} settings" if len(self.rows) > 1 else answer
                ) + so_far
        if counts["undecided"] == len(self.rows):
            return "undecided: no interval excludes either answer" + so_far
        return ", ".join(f"{answer} in {n} of {len(self.rows)}" for answer, n in counts.items() if n) + so_far


class Evidence:
    """The finished runs of a suite, by backbone, style and method."""

    def __init__(self, suite: Suite, results: Sequence[Result]) -> None:
        self.suite = suite
        self.results = [result for result in results if result.cell.phase == "evidence"]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Backbones and styles, in the order of the page."""
        return [(backbone, style) for style in self.suite.styles for backbone in self.suite.backbones]

    def runs(self, backbone: str, style: str, method: str) -> list[Result]:
        return [
            r
            for r in self.results
            if (r.cell.backbone, r.cell.style, r.cell.method) == (backbone, style, method)
        ]

    def rewards(self, backbone: str, style: str, method: str, sets: Sequence[str]) -> Rewards:
        """Return seed -> problem of any of ``sets`` -> reward after training."""
        return {
            run.cell.seed: {
                f"{name}/{place}": reward
                for name in sets
                for place, reward in enumerate(run.rewards[name])
                if reward is not None
            }
            for run in self.runs(backbone, style, method)
        }

    def has(self, *methods: str) -> bool:
        return set(methods) <= set(self.suite.methods)


def claims(evidence: Evidence) -> list[Claim]:
    """Return the claims that the suite's methods and backbones can test. The intervals of one claim hold
    together with 95 %."""
    made: list[Claim] = []

    def better(
        says: str, a: str, b: str, sets: Sequence[str] = evidence.suite.in_domain, where: str = "in-domain"
    ) -> None:
        if evidence.has(a, b) and sets:
            how = f"{where} accuracy of {a} minus that of {b}, on the same seeds and problems"
            made.append(Claim(says, how, *compared(evidence, a, b, sets)))

    better("On problems that all rollouts fail, GRPO stalls and SORT does not.", "SORT", "GRPO")
    better("On problems that all rollouts fail, GRPO stalls and LUFFY does not.", "LUFFY", "GRPO")
    better("SCOPE learns problems that GRPO does not learn.", "SCOPE", "GRPO")
    if evidence.has("SORT", "GRPO") and len(evidence.suite.backbones) > 1:
        made.append(_largest_on_weakest(evidence))
    better("Policy shaping helps LUFFY.", "LUFFY", "LUFFY without shaping")
    better("SORT learns more with a plan than without one.", "SORT", "SORT α=0")
    better(
        "SORT learns more with the problem's own plan than with another problem's.",
        "SORT",
        "SORT shuffled plan",
    )
    better(
        "SORT learns more than plain imitation of the references: SFT on failures.", "SORT", "SFT on failures"
    )
    better("SORT learns more than plain imitation of the references: SFT.", "SORT", "SFT")
    better("LUFFY learns more than GRPO with an SFT loss.", "LUFFY", "GRPO+SFT")
    made += _diversity(evidence)
    better(
        "SORT forgets less than plain imitation.",
        "SORT",
        "SFT",
        evidence.suite.out_of_domain,
        "out-of-domain",
    )
    return made


def compared(evidence: Evidence, a: str, b: str, sets: Sequence[str]) -> tuple[list[Row], int, Row | None]:
    """Return a row for each setting with results, the number of planned settings, and the average."""
    pairs = {
        f"{backbone}, {style}": (
            evidence.rewards(backbone, style, a, sets),
            evidence.rewards(backbone, style, b, sets),
        )
        for backbone, style in evidence.settings
    }
    return _answered(pairs, a, b)


def _answered(
    pairs: Mapping[str, tuple[Rewards, Rewards]], a: str, b: str, most: float = 1.0
) -> tuple[list[Row], int, Row | None]:
    """Return the same as ``compared``. ``pairs``: for each setting, the rewards of ``a`` and those of
    ``b``."""
    level = 1 - 0.05 / len(pairs)
    there = {setting: both for setting, both in pairs.items() if both[0].keys() & both[1].keys()}
    rows = [
        Row(setting, paired("", a, b, ours, theirs, level, most)) for setting, (ours, theirs) in there.items()
    ]
    return rows, len(pairs), _average(list(there.values()), a, b, most)


def _average(pairs: Sequence[tuple[Rewards, Rewards]], a: str, b: str, most: float) -> Row | None:
    """Average every seed and problem over the settings, for the seeds that all settings have."""
    seeds = (
        set.intersection(*(set(rewards) for both in pairs for rewards in both)) if len(pairs) > 1 else set()
    )
    if not seeds:
        return None
    ours, theirs = (
        {
            seed: {
                problem: fmean(both[side][seed][problem] for both in pairs)
                for problem in pairs[0][side][seed]
            }
            for seed in seeds
        }
        for side in (0, 1)
    )
    return Row("average", paired("", a, b, ours, theirs, most=most))


def _largest_on_weakest(evidence: Evidence) -> Claim:
    """Compare SORT's gain over GRPO on the weakest backbone with its gain on each other backbone: a
    difference of differences."""
    suite = evidence.suite
    weakest, *others = suite.backbones

    def gain(backbone: str, style: str) -> Rewards:
        ours, theirs = (
            evidence.rewards(backbone, style, method, suite.in_domain) for method in ("SORT", "GRPO")
        )
        return {
            seed: {key: ours[seed][key] - theirs[seed][key] for key in ours[seed]}
            for seed in ours.keys() & theirs.keys()
        }

    pairs = {
        f"{weakest} against {other}, {style}": (gain(weakest, style), gain(other, style))
        for style in suite.styles
        for other in others
    }
    how = "the gain on the weakest backbone minus the gain on the other one"
    return Claim(
        "SORT's gain over GRPO is largest on the weakest backbone.",
        how,
        *_answered(pairs, weakest, "the others", most=2.0),
    )


def _diversity(evidence: Evidence) -> list[Claim]:
    """Compare the diversity of rollouts in the last tenth of training. A policy that has learned nothing
    writes the most diverse ones."""
    made = []
    for other in ("LUFFY", "GRPO"):
        rows = []
        for backbone, style in evidence.settings if evidence.has("SCOPE", other) else []:
            ours, theirs = (
                {
                    run.cell.seed: run.figures["diversity"]["one_minus_self_bleu"]
                    for run in evidence.runs(backbone, style, method)
                }
                for method in ("SCOPE", other)
            )
            if ours.keys() & theirs.keys():
                found = over_seeds("", "SCOPE", other, ours, theirs, 1 - 0.05 / len(evidence.settings))
                rows.append(Row(f"{backbone}, {style}", found))
        average = None
        if len(rows) > 1 and len({len(row.difference.per_seed) for row in rows}) == 1:
            means = dict(enumerate(map(fmean, zip(*(row.difference.per_seed for row in rows), strict=True))))
            average = Row("average", over_seeds("", "SCOPE", other, means, dict.fromkeys(means, 0.0)))
        if rows:
            how = f"1 − self-BLEU of rollouts in the last tenth of training, SCOPE minus {other}, over seeds"
            made.append(
                Claim(
                    f"SCOPE keeps rollouts more diverse than {other} does.",
                    how,
                    rows,
                    len(evidence.settings),
                    average,
                )
            )
    return made
