"""What processes learn of each other's groups, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from safetensors.torch import load_file

from handrail import Config, Context, Group, Method, Term, train
from handrail._util.state import with_tensors, without_tensors
from handrail.methods.method_and_terms import observers
from handrail.training import shared_state
from tests.conftest import EASY, config
from tests.methods.terms.test_olr import mislabeled
from tests.training.test_loop import lines
from tests.training.test_worlds import noted, uneven


class Counting(Term):
    """Remembers every problem in order, and how long its rollouts were."""

    _seen: list[str] = PrivateAttr(default_factory=list)
    _lengths: torch.Tensor = PrivateAttr(default_factory=lambda: torch.zeros(0))

    def observe(self, group: Group) -> Any:
        return group.problem.id, [float(len(each)) for each in group.rollouts]

    def learn(self, seen: list[Any]) -> None:
        self._seen += [problem for problem, _ in seen]
        self._lengths = torch.cat([self._lengths, torch.tensor([sum(each) / 3 for _, each in seen])])

    async def credit(self, group: Group, ctx: Context) -> Group:
        ctx.counts["counting/known"] += group.problem.id in self._seen[-4:]
        return group

    def state(self) -> dict[str, Any]:
        return {"seen": self._seen, "nested": [{"lengths": self._lengths}]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._seen, self._lengths = state["seen"], state["nested"][0]["lengths"]


def test_a_term_of_ones_own_learns_before_credit_and_its_state_survives(tmp_path: Path) -> None:
    own = {"name": f"{__file__}:Counting"}

    def run(steps: int, directory: str, resume: bool = False) -> None:
        settings = config(
            data={"train": f"{EASY}&n=64"},
            method={"name": "grpo", "terms": [{"name": "arm"}, own]},
            rollout={"max_tokens": 12},
            train={"steps": steps, "checkpoint_every": 1, "updates_per_step": 2},
        )
        train(settings, tmp_path / directory, resume=resume)

    run(3, "whole")
    run(2, "parts")
    run(3, "parts", resume=True)
    whole, parts = (tmp_path / name / "checkpoints/step-000003" for name in ("whole", "parts"))
    assert (whole / "state.json").read_bytes() == (parts / "state.json").read_bytes()
    one, other = load_file(whole / "state.safetensors"), load_file(parts / "state.safetensors")
    assert one.keys() == other.keys() == {"state.terms.1.nested.0.lengths"}
    assert all(torch.equal(one[key], other[key]) and len(one[key]) == 12 for key in one)
    seen = json.loads((whole / "state.json").read_text())["terms"][1]["seen"]
    assert len(seen) == 12
    # Once a step, before the first of its updates, and for all of its groups.
    assert [row["counting/known"] for row in lines(tmp_path / "whole/metrics.jsonl")[1:]] == [4, 4, 4]


def test_nothing_is_gathered_without_an_observer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gathered(values: list[Any]) -> list[Any]:
        raise AssertionError("gathered")

    monkeypatch.setattr(shared_state, "gather_object", gathered)
    train(config(rollout={"max_tokens": 4}, train={"steps": 1}), tmp_path / "run")
    assert observers(Method()) == []
    term = Counting()
    assert list(map(id, observers(Method(terms=[term])))) == [id(term)]


def test_state_of_numbers_and_tensors_is_kept_to_the_bit() -> None:
    state = {"a": [1, 0.1, None, {"b": torch.tensor([0.1, float("nan")]), "c": "tensor:"}], "d": {}}
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(without_tensors(state, tensors)))
    back = with_tensors(plain, tensors)
    assert back["a"][:3] == [1, 0.1, None] and back["a"][3]["c"] == "tensor:" and back["d"] == {}
    assert back["a"][3]["b"].view(torch.int32).tolist() == state["a"][3]["b"].view(torch.int32).tolist()  # type: ignore[index]


def test_two_processes_share_one_state(tmp_path: Path) -> None:
    """OLR's labels and i-MENTOR's networks; the models differ by rounding only."""
    sections = uneven("grpo", learning_rate=1e-9, steps=2)
    olr = {"name": "olr", "start": 0, "slope": -1.0}
    imentor = {"name": "imentor", "prompt_tokens": 8, "response_tokens": 48}
    sections["method"] = {"name": "grpo", "terms": [olr, imentor, {"name": "pacr"}]}
    # Four problems for five places, so that one is there twice; half of their answers are wrong.
    sections["data"]["train"] = [{"path": mislabeled(tmp_path / "data.jsonl"), "share": 1.0}]
    sections["rollout"] |= {"temperature": 0.5, "max_tokens": 16}
    one, two = tmp_path / "one", tmp_path / "two"
    train(Config.model_validate(sections), one)
    noted(2, {two: sections})
    for left, right in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            exact = value is None or isinstance(value, str)
            assert right[key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-6)), key
    assert lines(one / "labels.jsonl") == lines(two / "labels.jsonl") != []
    last = "checkpoints/step-000002"
    kept, shared = (json.loads((each / last / "state.json").read_text()) for each in (one, two))
    assert kept == shared and kept["terms"][0]["passes"]
    tensors, others = (load_file(each / last / "state.safetensors") for each in (one, two))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
