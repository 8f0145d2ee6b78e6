"""``python -m benchmarks.scale``: the formulas by hand, the simulation against them, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.scale.assumptions import GPU, Assumptions, fitted
from benchmarks.scale.changes import CHANGES
from benchmarks.scale.formula import (
    Parts,
    bottleneck,
    decode_cost,
    decode_seconds,
    equal_seconds,
    parts,
    rows_kept,
    step_seconds,
    token_seconds,
    tokens_read,
    transfer,
    update_seconds,
)
from benchmarks.scale.models import MEASURED, MODELS, Lengths, Model
from benchmarks.scale.page import filled, pages, setups
from benchmarks.scale.setup import Setup, fitting, sampling_bytes, start_bytes, training_bytes
from benchmarks.scale.simulate import Simulation, piece, simulated_seconds
from handrail import train
from handrail.training.callbacks import Callback
from handrail.training.resources import Clock
from handrail.training.run import Run
from tests.conftest import config

# A layer: 10 · (2·10 + 2·5 + 3·20) = 900 weights. Two layers and 100 words of 10: 2,800 are multiplied.
SMALL = Model("small", layers=2, hidden=10, attention=10, kv=5, intermediate=20, vocabulary=100)
ROUND = Assumptions(
    peak=56_000, bandwidth=5600, memory=1e6, nvlink=15_200, network=7600, matmul=1.0, read=1.0,
    decode_layer=0.5, kv_bandwidth=4000, parallel_latency=0.25, drawing=1.0, micro_batch_layer=0.5,
    width=0.01, word=0.001, optimizer=0.001, activation=2.0, verdict=0.5, host=15_200, store=7600,
)  # fmt: skip
EQUAL = Lengths(median=3, sigma=0.0, longest=6)
H200 = fitted()


def small(gpus: int, **changes: object) -> Setup:
    base = Setup(SMALL, gpus, problems=8, group=2, prompt=8, lengths=EQUAL, batch=4, micro_batch=64)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_sizes_of_models_by_hand() -> None:
    assert (SMALL.layer_weights, SMALL.multiplied, SMALL.weights, SMALL.kv_bytes) == (1800, 2800, 3800, 40)
    assert [round(model.weights / 1e9, 1) for model in MODELS] == [1.5, 7.6, 32.8, 70.6]


def test_sampling_by_hand() -> None:
    # Two layers of 0.5 s and 5,600 bytes of weights in a second; 5,600 operations a row, 40 bytes a token.
    assert decode_cost(small(1), ROUND) == pytest.approx((2.0, 0.1, 0.01))
    # Halves of weights, rows and keys; a layer waits 0.25 s for the other GPU.
    assert decode_cost(small(2, shards=2), ROUND) == pytest.approx((2.0, 0.05, 0.005))
    # Three tokens, which see 8, 9 and 10 tokens, in four rows.
    by_hand = 3 * 2.0 + 3 * 4 * 0.1 + 4 * 0.01 * (8 + 9 + 10)
    assert decode_seconds(small(1), ROUND, 4) == pytest.approx(by_hand)
    assert equal_seconds(small(1), ROUND, 4) == pytest.approx(by_hand)


def test_update_by_hand() -> None:
    # Rows of 8 + 3 tokens: (6·1800 + 6·2·10·11) / 56,000 + 20 · 0.01, and 100 words · (0.001 + 80 / 56,000).
    layers = (10_800 + 1320) / 56_000 + 0.2
    words = 100 * (0.001 + 80 / 56_000)
    assert token_seconds(small(1), ROUND) == pytest.approx(layers + words)
    assert token_seconds(small(1, checkpointing=True), ROUND) == pytest.approx(4 / 3 * layers + words)
    # Two processes with 4 problems: 8 · 3 tokens and 4 prompts of 8, or 8 of them if rows are padded.
    assert tokens_read(small(2)) == 24 + 32
    assert tokens_read(small(2, fsdp=True)) == 24 + 64
    # 56 tokens are one micro-batch of two layers; DDP sends half of 15,200 bytes twice.
    compute = 2 * 0.5 + 56 * (layers + words) + 3.8
    assert update_seconds(small(2), ROUND, 56) == pytest.approx((compute, 1.0))
    # Two micro-batches, three times half of the weights each: 3 s, while 29 s are computed.
    compute = 2 * 2 * 0.5 + 88 * (layers + words) + 1.9
    assert update_seconds(small(2, fsdp=True), ROUND, 88) == pytest.approx((compute, 0.0))
    slow = replace(ROUND, nvlink=152.0)
    assert update_seconds(small(2, fsdp=True), slow, 88)[1] == pytest.approx(300 - (compute - 1.9))


def test_weight_transfer_by_hand() -> None:
    # 7,600 bytes to the CPU and into the store, 0.5 s each, and from there to a GPU; 22,800 bytes of copying.
    copy = 22_800 / 5600
    assert transfer(small(3, samplers=2), ROUND) == pytest.approx((1.0, 0.0, 0.5 + copy))
    # Each of two workers puts a half.
    assert transfer(small(4, samplers=2), ROUND) == pytest.approx((0.5, 0.0, 0.5 + copy))
    # Samplers on 4 nodes: 3 nodes get 7,600 bytes at 7,600 a second, one after another, from a single worker.
    assert transfer(small(16, samplers=15, node=4), ROUND)[1] == pytest.approx(3.0)
    # With a worker on every node, all nodes receive at the same time.
    assert transfer(small(16, samplers=8, node=4), ROUND)[1] == pytest.approx(1.0)
    assert transfer(small(2), ROUND) == pytest.approx((0.0, 0.0, copy))
    # Shards are gathered first: half of the float32 weights over NVLink.
    assert transfer(small(4, samplers=2, fsdp=True), ROUND)[0] == pytest.approx(1.0)


def test_staleness_by_hand() -> None:
    sampling = {"load": 2.0, "sample": 6.0, "stragglers": 2.0}
    p = Parts(put=1, network=3, verify=1, guide=0, update=5, exchange=1, **sampling)
    steps = [step_seconds(small(4, samplers=2, staleness=k), p) for k in (0, 1, 2)]
    # 21 s in a row; half of them, shared by two steps; the samplers' own 10 s.
    assert steps == [21, 10.5, 10]
    ahead = small(6, samplers=2, staleness=2, batch=16)  # two workers ask a sampler
    assert bottleneck(ahead, p) == "requests"
    assert bottleneck(replace(ahead, merged=True), p) == "sample"
    # Asked again, everything waits for the rollouts ahead: 1 + 3 + 10 + 4 + 6.
    assert step_seconds(small(4, samplers=2, staleness=1), replace(p, guide=4)) == 24


def test_requests_go_to_samplers_as_they_do_in_ray() -> None:
    for size, pieces in ((16, 3), (5, 5), (2, 4)):
        whole = np.arange(size, dtype=float)
        split = torch.arange(size).tensor_split(pieces)
        assert [piece(whole, pieces, n).tolist() for n in range(pieces)] == [each.tolist() for each in split]
    # 8 problems with 2 completions each: 4 workers with a sampler each, 2 with 3 each, 6 that share 2.
    assert small(8, samplers=4).requests() == (1, 4)
    assert small(8, samplers=6).requests() == (1, 3) and [*small(8, samplers=6).own(1)] == [1, 3, 5]
    assert small(8, samplers=2).requests() == (3, 4) and [*small(8, samplers=2).own(3)] == [1]
    assert small(8, samplers=2, merged=True).requests() == (1, 8)
    assert small(8).requests() == (1, 2)


EXACT = [
    small(1), small(2), small(2, fsdp=True), small(8, samplers=4, shards=2, fsdp=True, staleness=1),
    small(4, samplers=2), small(4, samplers=2, staleness=1), small(4, samplers=2, staleness=3),
    small(4, samplers=2, staleness=1, merged=True, batch=2), small(5, samplers=1, staleness=1),
    small(16, samplers=8, node=4, staleness=1), small(16, samplers=8, node=4, staleness=2),
    small(4, samplers=2, guided=0.5), small(4, samplers=2, staleness=1, guided=0.5), small(2, guided=0.5),
]  # fmt: skip


@pytest.mark.parametrize("setup", EXACT, ids=lambda setup: f"{setup.gpus}-{setup.samplers}-{setup.staleness}")
def test_without_randomness_the_simulation_is_the_formula(setup: Setup) -> None:
    assert simulated_seconds(setup, ROUND) == pytest.approx(step_seconds(setup, parts(setup, ROUND)))


def test_sampling_ahead_hides_the_shorter_loop() -> None:
    slow = replace(ROUND, decode_layer=50.0)  # sampling takes longer than training
    for a in (ROUND, slow):
        setup = small(4, samplers=2, merged=True)
        p = parts(setup, a)
        training = p.put + p.verify + p.update + p.exchange
        sampling = p.load + p.sample + p.stragglers
        ahead = replace(setup, staleness=2)
        assert simulated_seconds(setup, a) == pytest.approx(training + sampling)
        assert simulated_seconds(ahead, a) == pytest.approx(max(training, sampling))


def test_rows_leave_when_half_have_ended() -> None:
    simulation = Simulation(small(1), ROUND)
    simulation.env.process(simulation.decode(np.arange(1.0, 9.0)))
    simulation.env.run()
    # Lengths 1 to 8: eight rows for 4 tokens, four for 2, two for 1, one for 1.
    rows = [8, 8, 8, 8, 4, 4, 2, 1]
    by_hand = sum(2 + kept * (0.1 + 0.01 * (8 + at)) for at, kept in enumerate(rows))
    assert simulation.env.now == pytest.approx(by_hand)
    running = np.arange(8.0, 0.0, -1.0)
    assert rows_kept(8, running).tolist() == rows


def test_the_formula_expects_what_random_lengths_take() -> None:
    setup = Setup(MODELS[0], 8)
    p = parts(setup, H200)
    simulation = Simulation(setup, H200)
    drawn = np.concatenate([np.concatenate(each) for each in simulation.lengths.values()])
    assert drawn.mean() == pytest.approx(setup.lengths.mean, rel=0.01)
    assert drawn.std() == pytest.approx(setup.lengths.deviation, rel=0.02)
    assert simulated_seconds(setup, H200) == pytest.approx(step_seconds(setup, p), rel=0.04)
    alone = replace(setup, gpus=1, problems=32)
    assert simulated_seconds(alone, H200, 60) == pytest.approx(
        step_seconds(alone, parts(alone, H200)), rel=0.02
    )
    most = [max(sum(each) for each in workers) for workers in simulation.lengths.values()]
    assert np.mean(most) == pytest.approx(tokens_read(setup) - 64 * setup.prompt, rel=0.02)


def test_the_fit_gives_what_was_measured() -> None:
    found = {name: json.loads((GPU / f"{name}.json").read_text()) for name in ("sampling", "update-h200")}
    for row in found["sampling"]["rows"]:
        lengths = Lengths(median=256, sigma=0.0, longest=256)
        setup = Setup(MEASURED, 1, prompt=64, lengths=lengths, batch=row["batch"], problems=row["batch"] // 8)
        rate = row["batch"] * 256 / decode_seconds(setup, H200, row["batch"])
        assert rate == pytest.approx(row["tokens_per_second"], rel=0.01)
        weights = 12 * MEASURED.weights  # gradient, moments: not there while only sampling
        assert (sampling_bytes(setup, H200) - weights) / 2**30 == pytest.approx(row["gib"], rel=0.02)
    for row in found["update-h200"]["rows"][:2]:
        lengths = Lengths(median=448, sigma=0.0, longest=448)
        setup = Setup(MEASURED, 1, prompt=64, lengths=lengths, micro_batch=row["tokens"])
        seconds = update_seconds(setup, H200, row["tokens"])[0]
        assert seconds == pytest.approx(row["seconds"]["update"], rel=0.02)
        assert training_bytes(setup, H200) / 2**30 == pytest.approx(row["gib"]["update"], rel=0.08)


def test_the_memory_of_weights_is_what_a_run_keeps(tmp_path: Path) -> None:
    class Kept(Callback):
        def on_start(self, run: Run, step: int) -> None:
            run.optimizer.optimizer.register_step_pre_hook(lambda *_: self.count(run))

        def count(self, run: Run) -> None:
            self.gradient = sum(p.grad.nbytes for p in run.policy.model.parameters() if p.grad is not None)

        def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
            models = (run.policy.model, run.policy.start, getattr(run.policy.sampler, "model", None))
            self.models = [sum(p.nbytes for p in model.parameters()) for model in models if model is not None]
            moments = run.optimizer.state_dict()["state"].values()
            self.moments = sum(entry[name].nbytes for entry in moments for name in ("exp_avg", "exp_avg_sq"))
            self.weights = sum(p.numel() for p in run.policy.model.parameters())

    found = Kept()
    method = {"name": "luffy", "kl": 0.1}
    train(
        config(method=method, model={"dtype": "bfloat16"}, train={"steps": 1}),
        tmp_path / "run",
        callbacks=[found],
    )
    p = found.weights
    assert (found.models, found.gradient, found.moments) == ([4 * p, 4 * p, 2 * p], 4 * p, 8 * p)
    # Without activations, the formula has the same 16 + 2 + 4 bytes.
    model = replace(MEASURED, vocabulary=1000)
    setup = Setup(model, 1, start=True)
    whole = training_bytes(setup, replace(H200, activation=0.0))
    assert whole == 22 * model.weights and start_bytes(setup) == 4 * model.weights
    assert training_bytes(replace(setup, lora=True), replace(H200, activation=0.0)) == 2 * model.weights


def test_what_handrail_cannot_run() -> None:
    small_one, seven, middle, large = MODELS
    assert fitting(Setup(small_one, 8), H200) == Setup(small_one, 8)
    found = fitting(Setup(seven, 8), H200)
    assert found and found.fsdp
    for gpus in (8, 64, 1024):
        for model in (middle, large):  # without samplers, every process holds the whole weights
            assert fitting(Setup(model, gpus), H200) is None
        assert fitting(Setup(large, gpus, samplers=gpus // 2), H200) is None
    found = fitting(Setup(middle, 64, samplers=32), H200)
    assert found and found.fsdp and found.checkpointing
    assert fitting(Setup(large, 64, samplers=32, shards=2), H200)
    assert not fitting(Setup(large, 8, samplers=4, shards=4), H200)
    assert fitting(Setup(middle, 8, lora=True), H200) and not fitting(Setup(large, 8, lora=True), H200)


def test_beside_samplers_nothing_is_whole() -> None:
    model, bare = replace(MEASURED, vocabulary=1000), replace(H200, activation=0.0, drawing=0.0)
    setup = Setup(model, 16, samplers=8, shards=4, fsdp=True, start=True)
    gathered = model.layer_weights / model.layers + model.weights - model.layer_weights
    assert training_bytes(setup, bare) == pytest.approx((16 + 4) * model.weights / 8 + 8 * gathered)
    adapted = replace(setup, lora=True)
    assert training_bytes(adapted, bare) == pytest.approx(2 * (model.weights / 8 + gathered))
    cache = sampling_bytes(setup, bare) - 2 * model.weights / 4
    assert sampling_bytes(replace(setup, shards=8), bare) == pytest.approx(2 * model.weights / 8 + cache / 2)


def test_every_change_makes_a_step_shorter() -> None:
    for gpus in (8, 64, 1024):
        for setup in (each for model in MODELS for each in setups(model, gpus, H200)):
            p = parts(setup, H200)
            _, change = CHANGES[bottleneck(setup, p)]
            _, changed, a = change(setup, H200)
            assert step_seconds(changed, parts(changed, a)) < step_seconds(setup, p)


def test_every_worker_sends_a_part_of_the_weights() -> None:
    model, a = MODELS[0], replace(H200, store=2.0)
    few = Setup(model, 64, samplers=63)  # one worker, whose node sends them to the 7 others
    many = Setup(model, 64, samplers=56)  # 8 workers on 8 nodes, each of which must receive them whole
    assert parts(few, a).network == 7 * model.weights and parts(many, a).network == model.weights
    assert parts(few, a).put == pytest.approx(8 * parts(many, a).put)


def test_the_pages_are_up_to_date() -> None:
    for name, found in pages(H200).items():
        text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
        assert filled(text, found) == text, "run python -m benchmarks.scale"
