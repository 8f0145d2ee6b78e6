"""Terms applied to groups of known completions, by the engine or with answers written by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from handrail.engines.local import LocalEngine
from handrail.methods import build
from handrail.methods.base import Method, Term
from handrail.methods.requests import Pending, Request, drive
from handrail.models.config import RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory

PROBLEM = Problem("p", "77 A 8 ?", "70")
Answer = Callable[[Request], Any]


def member(
    policy: TransformersPolicy, text: str, reward: float = 0.0, end: bool = False, **fields: Any
) -> Trajectory:
    tokens = policy.renderer.completion(text, end=end)
    written = Trajectory.by(Author.POLICY, policy.renderer.prompt(PROBLEM), tokens, text).with_advantage(0.0)
    return replace(written, **{"reward": reward, "correct": reward == 1, **fields})


def grpo(*terms: dict[str, Any], name: str = "grpo", **settings: Any) -> Method[Any]:
    return build({"name": name, "terms": list(terms), **settings}, RolloutConfig(group_size=4))


def verb(
    term: Method[Any] | Term,
    name: str,
    group: Group,
    engine: LocalEngine,
    answer: Answer | None = None,
    step: int = 1,
) -> tuple[Group, Counter[str]]:
    """What a verb makes of a group, and what it counts; ``answer`` replaces the engine's answers."""
    engine.begin(step)

    def answers(pending: list[Pending]) -> Sequence[Any]:
        return [answer(each.request) for each in pending] if answer else engine.answer(pending)

    flow = getattr(term, name)(group, engine.context(0, group.problem, name))
    (found,) = drive([((), flow)], answers)
    return found, engine.counts


def advantages(group: Group) -> list[list[float]]:
    return [each.column("advantage").tolist() for each in group.trajectories]


def close(values: Sequence[float], to: float = 1e-4) -> Any:
    return pytest.approx(list(values), abs=to)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def state(checkpoint: Path) -> tuple[dict[str, Any], bytes]:
    tensors = checkpoint / "state.safetensors"
    return json.loads(
        (checkpoint / "state.json").read_text()
    ), tensors.read_bytes() if tensors.exists() else b""


def queue(*values: Any) -> Answer:
    """The values one after the other, as tensors if they are numbers."""
    left = list(values)

    def answer(request: Request) -> Any:
        value = left.pop(0)
        return torch.tensor([value]) if isinstance(value, float) else value

    return answer
