"""Each system around the core: two processes that are stopped after a step and go on give the run of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handrail.data.load import load_problems
from handrail.models.trainable import TrainablePolicy
from tests.conftest import EASY, HARD
from tests.training.test_loop import lines
from tests.training.test_worlds import assert_same_curves, noted, uneven

pytestmark = pytest.mark.long

GUIDED = {"judge": "reference", "corrector": "reference"}
SYSTEMS: dict[str, tuple[dict[str, Any], str]] = {
    "npo": ({"name": "npo", "threshold": 0.9}, "npo/replayed"),
    "actguide": ({"name": "actguide"}, "actguide/guided"),
    "int": ({"name": "int", "continuations": 4, **GUIDED}, "int/kept"),
    "cso": ({"name": "cso", **GUIDED}, "cso/pairs"),
    "stride": (
        {"name": "stride", "judge": "reference", "first": 1, "every": 1, "go_on": "", "correct_it": ""},
        "stride/anchors",
    ),
    "calibrl": ({"name": "calibrl"}, "calibrl/compared"),
    "dmpo": ({"name": "dmpo"}, "dmpo/matched"),
    "tgpo": ({"name": "tgpo"}, "tgpo/tokens"),
    "ace": ({"name": "grpo", "terms": [{"name": "ace"}]}, "ace/penalized"),
    "arm": ({"name": "grpo", "terms": [{"name": "arm"}]}, "arm/shifted"),
    "pacr": ({"name": "grpo", "terms": [{"name": "pacr"}]}, "pacr/scored"),
    "prorag": ({"name": "grpo", "terms": [{"name": "prorag", "judge": "reference"}]}, "prorag/judged"),
    "fapo": ({"name": "grpo", "terms": [{"name": "fapo", "judge": "reference"}]}, "fapo/judged"),
    "tgpo-adv": ({"name": "grpo", "terms": [{"name": "tgpo"}]}, "tgpo/tokens"),
    "imentor": (
        {"name": "grpo", "terms": [{"name": "imentor", "prompt_tokens": 8, "response_tokens": 48}]},
        "imentor/bonuses",
    ),
}
"""Its settings, and a count that shows that it did something. OLR, which needs wrong labels, has its own."""


def planned(root: Path, where: str, steps: int) -> dict[Path, dict[str, Any]]:
    out = {}
    for name, (method, _) in SYSTEMS.items():
        cache = {"cache": str(root / "answers.jsonl")} if name == "npo" else {}
        sections = uneven(method["name"], steps=steps, learning_rate=1e-3, epsilon=1e-3)
        out[root / f"{name}-{where}"] = {
            **sections,
            "method": {**method, **cache},
            "experts": {"teacher": "builtin:house-tiny"},
            "eval": {},
        }
    return out


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME-one: two steps of one process. NAME-two: one step of two processes, and another after resuming."""
    root = tmp_path_factory.mktemp("systems")
    renderer = TrainablePolicy("builtin:house-tiny").renderer
    rows = ["{}"]
    for problem in load_problems(f"{EASY}&n=8") + load_problems(f"{HARD}&n=8"):
        tokens = renderer.completion(problem.references[0])
        answer = {"tokens": tokens, "logp": [-0.1] * len(tokens), "text": problem.references[0]}
        rows.append(json.dumps({"id": problem.id, "answers": [answer]}))
    (root / "answers.jsonl").write_text("\n".join(rows) + "\n")
    noted(1, planned(root, "one", 2), IN_FLOAT64="1")
    for steps in (1, 2):
        noted(2, planned(root, "two", steps), IN_FLOAT64="1")
    return root


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_processes_and_a_break_change_nothing(name: str, worlds: Path) -> None:
    one, two = worlds / f"{name}-one", worlds / f"{name}-two"
    count = SYSTEMS[name][1]
    assert sum(row.get(count, 0) for row in lines(one / "metrics.jsonl")) > 0
    assert_same_curves(one, two, to=1e-5)  # a checkpoint is loaded in float32
