"""Warnings about signs of collapse in a run's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

WINDOW = 10
"""Number of steps to average over: the first N steps with rollouts are compared with the last N."""
FEWEST_QUESTIONS = 8
"""Minimum number of unanswered questions before an expert is called silent."""
BETTER = 0.1
"""Gain in the share of correct rollouts that justifies low entropy and short completions, because a policy
that knows the answer need not search. Also the level that a reward or share must have reached before a fall
counts."""


class CollapseMonitor:
    """Callable with every step's metrics; returns new warnings, each only once."""

    def __init__(self, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """``before``: the metrics of all previous steps."""
        self.first: list[Mapping[str, Any]] = []
        self.last: list[Mapping[str, Any]] = []
        self.best: dict[str, float] = {}
        self.said: set[str] = set()
        self.questions: Counter[str] = Counter()
        for metrics in before:
            self(metrics)

    def __call__(self, metrics: Mapping[str, Any]) -> str | None:
        found = unverified(metrics) | self.silent_experts(metrics) | self.collapse(metrics)
        new = {kind: text for kind, text in found.items() if kind not in self.said}
        self.said.update(new)
        return "; ".join(new.values()) or None

    def collapse(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        if metrics.get("reward") is None:  # nothing was sampled
            return {}
        if len(self.first) < WINDOW:
            self.first.append(metrics)
            return {}
        self.last = [*self.last, metrics][-WINDOW:]
        return self.wrong() if len(self.last) == WINDOW else {}

    def silent_experts(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Warnings about experts that have not answered any question so far."""
        out = {}
        for role in ("judge", "corrector", "planner"):
            for key in (f"{role}/asked", f"{role}/no_answer"):
                self.questions[key] += metrics.get(key, 0)
            asked = self.questions[f"{role}/asked"]
            if asked >= FEWEST_QUESTIONS and self.questions[f"{role}/no_answer"] == asked:
                out[role] = (
                    f"the {role} has answered none of {asked} questions, so this run learns nothing from it"
                )
        return out

    def wrong(self) -> dict[str, str]:
        """Warnings about the last steps, by kind."""
        entropy, entropy_at_first = mean(self.last, "entropy"), mean(self.first, "entropy")
        length, length_at_first = mean(self.last, "length"), mean(self.first, "length")
        unverified = mean(self.last, "verifier/unverified") / max(1.0, mean(self.last, "rollouts"))
        learned = mean(self.last, "correct") >= mean(self.first, "correct") + BETTER
        out = {}
        if entropy < entropy_at_first / 10 and not learned:
            out["entropy"] = (
                f"entropy has fallen from {entropy_at_first:.2g} to {entropy:.2g} nats without a gain in "
                "accuracy"
            )
        if length < length_at_first / 4 and not learned:
            out["short"] = (
                f"completions have shrunk from {length_at_first:.0f} to {length:.0f} tokens without a gain "
                "in accuracy"
            )
        if mean(self.last, "truncated") > 0.5 > 2 * mean(self.first, "truncated"):
            out["long"] = (
                f"{mean(self.last, 'truncated'):.0%} of the completions are cut off at rollout.max_tokens"
            )
        for key, words in (("reward", "the reward"), ("correct", "the share of correct rollouts")):
            now = mean(self.last, key)
            best = self.best[key] = max(self.best.get(key, 0.0), now, mean(self.first, key))
            if now < best / 2 and best >= BETTER and "fallen" not in out:
                out["fallen"] = f"{words} has fallen from {best:.2f} to {now:.2f}"
        if unverified > 0.1:
            out["verifier"] = (
                f"{unverified:.0%} of the completions are unverified; metrics.jsonl names the first, under "
                "verifier/first_…"
            )
        return {kind: f"the last {WINDOW} steps: {text}" for kind, text in out.items()}


def unverified(metrics: Mapping[str, Any]) -> dict[str, str]:
    """For each reason, a warning about the first completion without a verdict."""
    first = "verifier/first_"
    return {
        key: f"unverified, and neither right nor wrong: {text}"
        for key, text in metrics.items()
        if key.startswith(first)
    }


def mean(lines: Iterable[Mapping[str, Any]], key: str) -> float:
    return fmean(line.get(key) or 0.0 for line in lines)
