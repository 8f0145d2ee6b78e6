"""i-MENTOR: the bonus by hand, its networks against a second account of them, and their state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from handrail import Author, Group, LocalEngine, TrainablePolicy, train
from handrail.methods.terms.imentor import Imentor
from handrail.methods.terms.novelty import Novelty, bonuses, padded
from tests.conftest import config
from tests.methods.terms.scripted import PROBLEM, advantages, close, grpo, lines, member, state, verb

SMALL = {"name": "imentor", "prompt_tokens": 4, "response_tokens": 6}


def test_the_bonus_by_hand() -> None:
    errors = torch.tensor([0.01, 0.03, 0.05])
    assert bonuses(errors, 0.5).tolist() == close([0, 0.25, 0.5], 1e-6)
    assert bonuses(torch.tensor([0.3, 0.3]), 0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("calls", "factor"), [(0, 1.0), (40, 0.5), (120, 0.25), (360, 0.1)])
def test_the_bonus_fades(calls: int, factor: float, policy: TrainablePolicy) -> None:
    term, rows = Imentor(**SMALL), [(1,) * 10, (2,) * 10]  # type: ignore[arg-type]
    term.opened(50).steps.fill_(calls)
    term.learn([(50, rows)])
    assert sorted(term._bonus.values()) == close([0.0, 0.5 * factor], 1e-6)


def with_bonuses(term: Imentor, group: Group, errors: Sequence[float], scale: float) -> None:
    rows = [padded(each, 4, 6) for each in group.trajectories]
    term._bonus = dict(zip(rows, bonuses(torch.tensor(errors), scale).tolist(), strict=True))


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        ((1.0, 0.1, 0.0), 0.5, (1.1499, -0.2342, -0.1658)),
        ((1.0, 0.1, 0.0), 0.25, (1.1499, -0.3592, -0.4158)),
        ((0.0, 0.0, 0.0), 0.5, (0.0, 0.25, 0.5)),
    ],
)
def test_advantages_by_hand(
    rewards: tuple[float, ...],
    scale: float,
    expected: tuple[float, ...],
    policy: TrainablePolicy,
    engine: LocalEngine,
) -> None:
    """The second scale is that of the networks' 40th step."""
    group = Group(
        PROBLEM,
        [member(policy, text, reward) for text, reward in zip(("77", "8 9", "9"), rewards, strict=True)],
    )
    method = grpo(SMALL, std_epsilon=1e-10)
    assert isinstance(method.terms[0], Imentor)
    with_bonuses(method.terms[0], group, [0.01, 0.03, 0.05], scale)
    found, counts = verb(method, "credit", group, engine)
    assert [row[0] for row in advantages(found)] == close(expected)
    assert found.has_signal and counts["imentor/bonuses"] == 2


def test_a_right_unverified_or_foreign_trajectory_gets_none(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    unverified = member(policy, "77", math.nan, correct=None)
    foreign = replace(member(policy, "8"), author=torch.tensor([int(Author.REFERENCE)]))
    group = Group(PROBLEM, [member(policy, "9", 1.0), unverified, foreign, member(policy, "70")])
    term = Imentor(**SMALL)  # type: ignore[arg-type]
    with_bonuses(term, group, [0.05, 0.04, 0.03, 0.05], 0.5)
    found, counts = verb(term, "credit", group, engine)
    assert advantages(found)[:3] == [[0.0]] * 3 and advantages(found)[3] == [0.5]
    assert counts["imentor/bonuses"] == 1
    noted, _ = verb(term, "guide", group, engine)
    assert len(term.observe(noted)[1]) == 2  # the networks read neither the unverified nor the foreign one


def test_without_a_batch_there_is_no_bonus_and_no_step(policy: TrainablePolicy, engine: LocalEngine) -> None:
    term, group = Imentor(**SMALL), Group(PROBLEM, [member(policy, "77")])  # type: ignore[arg-type]
    noted, _ = verb(term, "guide", group, engine)
    term.learn([term.observe(noted)])
    assert term.state() == {}
    found, counts = verb(term, "credit", noted, engine)
    assert advantages(found) == [[0.0]] and counts["imentor/groups_without_bonus"] == 1
    term.learn([term.observe(noted), term.observe(noted)])  # two equal rows: equal errors
    assert list(term._bonus.values()) == [0.0] and int(term.opened(0).steps) == 1


def test_rows_are_padded_and_cut_to_one_length(policy: TrainablePolicy) -> None:
    short = replace(member(policy, "77 8"), prompt_ids=[5, 6])
    assert padded(short, 4, 3) == (0, 0, 5, 6, *short.tokens, 0)
    assert padded(short, 1, 1) == (6, short.tokens[0])


def test_the_networks_are_what_their_description_says() -> None:
    """Errors before the step, and every parameter after it, from the same start by plain torch."""
    novelty = Novelty(20, 10, 1e-3)
    rows = torch.randint(20, (6, 10), generator=torch.Generator().manual_seed(1))
    twin = Novelty(20, 10, 1e-3)
    start = {name: value.clone() for name, value in twin.state_dict().items()}
    flat = nn.functional.embedding(rows, twin.embedding.weight).reshape(6, 160)
    normal = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    normal = normal * twin.norm.weight + twin.norm.bias

    def through(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        weights = [parameter.T for parameter in net.parameters()]
        for weight, bias in (weights[:2], weights[2:4]):
            x = nn.functional.leaky_relu(x @ weight + bias, 0.01)
        return torch.sigmoid(x @ weights[4] + weights[5]).squeeze(1)

    target = through(twin.target, normal).detach()
    errors = (target - through(twin.predictor, normal)) ** 2
    trained = [twin.embedding.weight, *twin.norm.parameters(), *twin.predictor.parameters()]
    gradients = torch.autograd.grad(errors.mean(), trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert novelty.step(rows.tolist()).tolist() == close(errors.tolist(), 1e-7)
    for name, value in novelty.state_dict().items():
        assert name.startswith("target") == torch.equal(value, start[name]) or name.startswith("norm"), name
    for name, parameter in novelty.named_parameters():
        assert torch.allclose(parameter, dict(twin.named_parameters())[name], atol=1e-6), name


def test_state_restores_the_networks_to_the_bit() -> None:
    rows = [(0, term, 3, 4) for term in range(5)]
    sizes = {"prompt_tokens": 2, "response_tokens": 2}
    whole, first = Imentor(name="imentor", **sizes), Imentor(name="imentor", **sizes)
    for term in (whole, first):
        term.learn([(10, rows)])
        term.learn([(10, rows[:3])])
    resumed = Imentor(name="imentor", **sizes)
    resumed.load_state(first.state())
    for term in (whole, resumed):
        term.learn([(10, rows)])
    assert whole._bonus == resumed._bonus and max(whole._bonus.values()) == pytest.approx(0.5 * 40 / 42)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    method = {"name": "grpo", "terms": [{**SMALL, "response_tokens": 12}]}

    def run(steps: int, directory: str, resume: bool = False) -> None:
        settings = config(
            method=method,
            rollout={"max_tokens": 12},
            train={"steps": steps, "checkpoint_every": 1},
        )
        train(settings, tmp_path / directory, resume=resume)

    run(4, "whole")
    run(3, "parts")
    run(4, "parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert lines(whole / "metrics.jsonl") == lines(parts / "metrics.jsonl")
    assert lines(whole / "samples.jsonl") == lines(parts / "samples.jsonl")
    step = "checkpoints/step-000004"
    assert state(whole / step) == state(parts / step) and state(whole / step)[1]
    assert sum(row["imentor/bonuses"] for row in lines(whole / "metrics.jsonl")[1:]) > 30
    assert json.loads((whole / step / "state.json").read_text())["terms"][0]["nets"].keys() >= {"steps"}
