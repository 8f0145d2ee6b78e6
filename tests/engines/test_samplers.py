"""An actor that samples, without Ray: which weights answer which request, and what happens to errors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handrail import UserError
from handrail.engines.ray_samplers import SamplerActor, load_sampler
from handrail.models.generate import Completion
from handrail.models.trainable import TrainablePolicy
from handrail.models.vllm import VllmSampler
from tests.conftest import config

PROMPTS = [[5, 6, 7], [8, 9]]
REQUEST = (PROMPTS, [1, 2], [12, 12])
Weights = dict[str, torch.Tensor]


def weights(policy: TrainablePolicy, scale: float) -> Weights:
    return {name: value * scale for name, value in policy.weights()}


def act(what: Callable[[SamplerActor], Awaitable[list[list[Completion]]]]) -> list[list[list[int]]]:
    """Run ``what`` with an actor that has loaded its model; return the tokens of the answers."""

    async def run() -> list[list[Completion]]:
        settings = config()
        actor = SamplerActor(settings.model, settings.rollout, settings.data, settings.sampler)
        await actor.load()
        found = await what(actor)
        assert not actor.wanted and not actor.answers
        return found

    return [[each.tokens.tolist() for each in answer] for answer in asyncio.run(run())]


@pytest.fixture(scope="module")
def alone(policy: TrainablePolicy) -> list[list[list[int]]]:
    """The answers with two versions of the weights, each asked for by itself."""

    async def ask(actor: SamplerActor, scale: float) -> list[list[Completion]]:
        await actor.update((1, 0), weights(policy, scale))
        await actor.submit("a", (1, 0), *REQUEST)
        return [await actor.result("a")]

    found = [act(lambda actor, scale=scale: ask(actor, scale))[0] for scale in (1.0, 0.2)]  # type: ignore[misc]
    assert found[0] != found[1]
    return found


def test_a_request_is_answered_with_the_weights_that_it_names(
    policy: TrainablePolicy, alone: list[list[list[int]]]
) -> None:
    """Also if newer weights come first, or the request comes before its weights."""

    async def mixed(actor: SamplerActor) -> list[list[Completion]]:
        await actor.update((1, 0), weights(policy, 1.0))
        await actor.submit("old", (1, 0), *REQUEST)
        newer = asyncio.create_task(actor.update((1, 1), weights(policy, 0.2)))
        await actor.submit("new", (1, 1), *REQUEST)
        found = [await actor.result("old"), await actor.result("new")]
        await newer
        await actor.update((1, 0), weights(policy, 1.0))  # overtaken on the way
        await actor.submit("again", (1, 1), *REQUEST)
        return [*found, await actor.result("again")]

    assert act(mixed) == [alone[0], alone[1], alone[1]]


def test_what_lost_workers_have_asked_is_dropped(
    policy: TrainablePolicy, alone: list[list[list[int]]]
) -> None:
    async def restarted(actor: SamplerActor) -> list[list[Completion]]:
        await actor.update((1, 0), weights(policy, 1.0))
        await actor.submit("running", (1, 0), *REQUEST)
        waiting = asyncio.create_task(actor.result("running"))
        await actor.submit("never", (1, 5), *REQUEST)  # its weights were not sent before the loss
        await asyncio.sleep(0.01)
        await actor.update((2, 0), weights(policy, 0.2))
        await actor.submit("after", (2, 0), *REQUEST)
        found = [await actor.result("after")]
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return found

    assert act(restarted) == [alone[1]]


def test_weights_that_do_not_fit_are_an_error_of_the_next_request(policy: TrainablePolicy) -> None:
    async def misfit(actor: SamplerActor) -> list[list[Completion]]:
        await actor.update((1, 0), {"lm_head.wait": torch.zeros(1)})
        await actor.submit("a", (1, 0), *REQUEST)
        with pytest.raises(UserError, match="has other weights than the model in training"):
            await actor.result("a")
        await actor.update((1, 1), weights(policy, 1.0))
        await actor.submit("b", (1, 1), *REQUEST)
        return [await actor.result("b")]

    assert len(act(misfit)[0]) == 2


def test_weights_that_come_in_parts_are_taken_once_all_have_come(
    policy: TrainablePolicy, alone: list[list[list[int]]]
) -> None:
    async def in_parts(actor: SamplerActor) -> list[list[Completion]]:
        await actor.update((1, 0), weights(policy, 1.0))
        await actor.submit("old", (1, 0), *REQUEST)
        await actor.submit("new", (1, 1), *REQUEST)
        newer = [*weights(policy, 0.2).items()]
        await actor.update((1, 1), dict(newer[::2]), 2)
        found = [await actor.result("old")]
        assert actor.version == (1, 0)
        await actor.update((1, 1), dict(newer[1::2]), 2)
        found.append(await actor.result("new"))
        await actor.update((1, 2), {}, 2)
        await actor.update((2, 0), {}, 2)  # the workers were started again; the first part is of no use
        assert list(actor.parts) == [(2, 0)]
        return found

    assert act(in_parts) == alone


def test_a_restarted_actor_says_so() -> None:
    settings = config()

    async def ask() -> None:
        actor = SamplerActor(settings.model, settings.rollout, settings.data, settings.sampler)
        await actor.submit("a", (1, 0), *REQUEST)

    with pytest.raises(RuntimeError, match="has been restarted"):
        asyncio.run(ask())


def test_beside_vllm_an_actor_holds_no_weights_of_transformers(
    policy: TrainablePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Weights = {}

    class FakeVllm:
        def __init__(self, directory: str, **settings: Any) -> None: ...

        def generate(self, *trial: Any, **settings: Any) -> None: ...

        def apply_model(self, function: Callable[[Any], None]) -> None: ...

        def reset_prefix_cache(self) -> None: ...

        def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
            taken.update(kwargs["weights_iterator"])

    fake = SimpleNamespace(LLM=FakeVllm, SamplingParams=SimpleNamespace, TokensPrompt=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # which the sampler sets
        monkeypatch.setenv(name, "")
    settings = config(sampler={"name": "vllm"})
    sampler = load_sampler(settings.model, settings.rollout, settings.data, settings.sampler)
    assert isinstance(sampler, VllmSampler) and sampler.ends == sorted(policy.renderer.ends)
    assert all(weight.is_meta for weight in sampler.model.state_dict().values())
    sampler.update_weights(policy.weights())
    assert taken.keys() == dict(policy.weights()).keys()
    assert all(torch.equal(taken[name], value) for name, value in policy.weights())
