"""State that all processes share: what a method and its terms learn of a step's groups."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from accelerate.utils import gather_object

from handrail.methods.base import Method
from handrail.methods.method_and_terms import observers
from handrail.types.trajectory import Group


def observe(
    method: Method[Any], guided: Sequence[Sequence[Group]], places: Sequence[int]
) -> list[tuple[int, list[list[Any]]]]:
    """For each place, the observations of each observer; empty without an observer."""
    found = observers(method)
    return [
        (place, [[each.observe(group) for group in groups] for each in found])
        for place, groups in zip(places, guided, strict=True)
        if found
    ]


def learn(method: Method[Any], observed: list[tuple[int, list[list[Any]]]]) -> None:
    """Let every observer learn from the observations of all processes, in the order of the problems."""
    found = observers(method)
    everything = sorted(gather_object(observed), key=itemgetter(0)) if found else []
    for index, each in enumerate(found):
        each.learn([seen for _, by_observer in everything for seen in by_observer[index] if seen is not None])
