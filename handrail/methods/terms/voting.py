"""Votes on a problem's answer, among the rollouts of one pass and over passes: what OLR counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import linear_regression

from handrail.methods.requests import Verify
from handrail.types.problem import Problem
from handrail.types.trajectory import Trajectory


async def equal(problem: Problem, answer: str, member: Trajectory) -> bool:
    """True if the member's answer equals ``answer``, in spelling or to the verifier."""
    if member.answer is None or member.answer == answer:
        return member.answer == answer
    return (await Verify(replace(problem, answer=answer), member)).correct is True


async def spelled_before(problem: Problem, member: Trajectory, answers: Sequence[str | None]) -> str:
    """Return the member's answer as it is spelled in the last of ``answers``, without repetitions, that it
    equals."""
    spelled = str(member.answer)
    for earlier in filter(None, dict.fromkeys(answers)):
        spelled = earlier if await equal(problem, earlier, member) else spelled
    return spelled


async def largest_cluster(problem: Problem, members: Sequence[Trajectory]) -> list[Trajectory]:
    """Return the members that give the most frequent answer; an empty list if several answers are equally
    frequent, or if no member has an answer.

    Members without an answer are in no cluster.
    """
    found: list[list[Trajectory]] = []
    for member in members:
        for cluster in found:
            if await equal(problem, str(cluster[0].answer), member):
                cluster.append(member)
                break
        else:
            found += [[member]] if member.answer is not None else []
    found.sort(key=len, reverse=True)
    return found[0] if len(found) == 1 or found and len(found[0]) > len(found[1]) else []


def most_frequent(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer; None if several are equally frequent, or if there is no answer.

    Each None among ``answers`` counts as an answer of its own, which equals no other.
    """
    votes = [answer or ("tie", place) for place, answer in enumerate(answers)]
    counts = Counter(votes).most_common(2)
    tied = len(counts) == 2 and counts[0][1] == counts[1][1]
    return str(counts[0][0]) if counts and not tied and isinstance(counts[0][0], str) else None


def trend(shares: Sequence[float]) -> float:
    """Slope of the least-squares line through the shares over 0, 1, ...; 0 for fewer than two."""
    return linear_regression(range(len(shares)), shares).slope if len(shares) > 1 else 0.0
