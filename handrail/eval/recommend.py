"""Recommend a method and a group size from the results of a probe, by rules of thumb (docs/choosing.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handrail.verifiers.audit import spoils

STUCK = 0.2
"""The share of problems without a right rollout from which on GRPO alone misses too much."""
HELPED = 0.5
"""The share of those problems that must have a usable reference for a guided method."""
SURPRISING = 0.01
"""The probability below which a reference token is surprising: the model would hardly ever write it."""
FOREIGN = 0.1
"""The share of surprising tokens above which references are foreign. In docs/evidence.md, clean references
have at most 0.02 and foreign ones at least 0.15."""

THEN = 'handrail model blend START RUN --output BLENDED, and train BLENDED with method.name = "grpo"'
BLENDED = (
    "In docs/blending.md, SFT forgot most of what it was not trained on; blending its model with the start "
    "brought most of that back, and GRPO then learned as much again from problems that the blended model "
    "solves sometimes. Hold out what it must not forget: the less it keeps, the smaller the share should be."
)


def recommendation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``method``, ``group_size`` and ``reasons`` (sentences) for the figures of a probe.

    ``before`` and ``then`` say what to do before and after training by this method, empty if nothing.
    """
    kinds = found["kinds"]
    tried = sum(kinds.values()) - kinds["not_sampled"]
    refused = found["faults"].get("reference_rejected", 0)
    first = []
    if impossible := found["faults"].get("answer_rejected", 0):
        first.append(
            f"Fix this first: the verifier refuses {impossible} answers as the answer to their own problem; "
            "see handrail check."
        )
    if spoils("reference_rejected", refused, found["with_reference"]):
        first.append(
            f"Fix this first: the verifier refuses {refused} of {found['with_reference']} references; "
            "correct the verifier or the data."
        )
    method, reasons = _method(found, kinds["all_wrong"], kinds["all_right"], tried)
    size, why = _group_size(found["groups"], found["rollouts"], tried)
    return {
        "before": _before(found, kinds["all_wrong"], kinds["all_right"], tried),
        "method": method,
        "then": THEN if method == "sft" else "",
        "group_size": size,
        "reasons": [*first, *reasons, why],
    }


def _before(found: Mapping[str, Any], stuck: int, solved: int, tried: int) -> str:
    if solved > tried / 2:
        return "take harder problems"
    if stuck < STUCK * tried or found["all_wrong_with_reference"] >= HELPED * stuck:
        return ""
    refused = found["faults"].get("reference_rejected", 0)
    if spoils("reference_rejected", refused, found["with_reference"]):
        return "make the verifier accept the references"
    return "add references"


def _method(found: Mapping[str, Any], stuck: int, solved: int, tried: int) -> tuple[str, list[str]]:
    if solved > tried / 2:
        others = ", or train on the others alone (data.train.probe)" if solved < tried else ""
        return "grpo", [
            f"{solved} of {tried} problems were solved in every rollout, so most groups are dead because all "
            f"of their rollouts are right: take harder problems{others}."
        ]
    failed = (
        f"{stuck} of {tried} problems failed in all of {found['rollouts']} rollouts ({stuck / tried:.0%})"
    )
    if stuck < STUCK * tried:
        return "grpo", [f"Only {failed}, so the rollouts themselves carry a signal."]
    failed = f"{failed}, and on those GRPO alone has no correct rollout to learn from."
    helped = found["all_wrong_with_reference"] / stuck
    have = f"{helped:.0%} of them have a reference that the verifier accepts"
    if helped < HELPED:
        advice = (
            "add references, or let a stronger model correct failed rollouts "
            '(scope with corrector = "endpoint")'
        )
        return "grpo", [failed, f"Only {have}, and guided methods need those: {advice}."]
    strange = found["surprising_tokens"]
    sound = f"{strange:.0%} of the references' tokens have a probability below {SURPRISING:.0%}"
    if strange > FOREIGN:
        style = f"{sound}: the model would word them differently, and forgets most by imitating them."
    else:
        style = f"Only {sound}: the model would word them in the same way."
    return "sft", [failed, f"{have}.", style, BLENDED]


def _group_size(by_size: Mapping[str, Any], n: int, tried: int) -> tuple[int, str]:
    """Choose the smallest size, from 4 up, that wastes at most ten points more rollouts than the largest.

    If even the largest size wastes nearly all rollouts, return 8.
    """
    least = by_size[str(n)]["wasted"]["mean"]
    for size, each in by_size.items():
        if int(size) >= 4 and each["wasted"]["mean"] <= min(least + 0.1, 0.9):
            rollouts = int(size) * tried
            return int(size), (
                f"With groups of {size}, {each['wasted']['mean']:.0%} of the rollouts are in dead groups "
                f"(all rewards equal): {each['wasted_rollouts']:.0f} of {rollouts} in one pass; "
                f"with groups of {n}, {least:.0%}."
            )
    why = (
        f"Groups of {n} still waste {least:.0%} of their rollouts, so the size does not matter yet; "
        "8 is usual in the papers."
    )
    return 8, why
