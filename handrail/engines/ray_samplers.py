"""Samplers under Ray: actors that answer ``generate`` with the newest weights, apart from the learners.

Every request names the version of the weights that it wants, and an actor answers all requests of a version
before it takes newer weights. So completions do not depend on which process is faster.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from threading import Event
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from handrail._util.errors import UserError
from handrail._util.processes import accelerator
from handrail.data.config import PromptFormat
from handrail.engines.ray import first_line
from handrail.models.config import ModelConfig, RolloutConfig, SamplerConfig
from handrail.models.generate import Completion, Sampler
from handrail.models.hf import TransformersPolicy, load_with_renderer
from handrail.models.trainable import TrainablePolicy
from handrail.models.vllm import VllmSampler

Version = tuple[int, int]
"""Number of starts of the workers, and number of changes of the weights since the last start."""
READY_SECONDS = 600.0
"""Seconds for all samplers to load their models."""
POLL = 0.2
"""Seconds between two looks at whether the run was asked to stop."""


class SamplerActor:
    """A model that samples in an actor of its own."""

    def __init__(
        self, model: ModelConfig, rollout: RolloutConfig, prompts: PromptFormat, sampler: SamplerConfig
    ) -> None:
        self.settings = model, rollout, prompts, sampler
        self.thread = ThreadPoolExecutor(1)  # for all work with the model, so that calls are taken meanwhile
        self.loading = asyncio.Lock()
        self.sampler: Sampler | None = None
        self.version: Version = (0, -1)
        self.failed: Exception | None = None
        """Why the newest weights could not be taken."""
        self.parts: dict[Version, list[dict[str, Tensor]]] = {}
        """Weights of which some parts have not come yet."""
        self.wanted: dict[str, Version] = {}
        self.answers: dict[str, asyncio.Task[list[Completion]]] = {}
        self.changed, self.busy = asyncio.Condition(), False

    async def load(self) -> None:
        """Load the model, once. Raises UserError if it cannot be loaded or sampled from."""
        async with self.loading:
            if self.sampler is None:
                self.sampler = await self._work(load_sampler, *self.settings)

    async def update(self, version: Version, part: dict[str, Tensor], parts: int = 1) -> None:
        """Sample from new weights, of which this is one of ``parts``, once all have come and every request
        for older ones is answered.

        Nobody waits for this, so an error is kept for those who ask for samples.
        """
        self._forget_before(version)
        self.parts.setdefault(version, []).append(part)
        if len(self.parts[version]) < parts:
            return
        weights = dict(ChainMap(*self.parts.pop(version)))
        async with self._turn(lambda: all(each >= version for each in self.wanted.values())):
            if version <= self.version:  # overtaken by newer weights on the way
                return
            try:
                assert self.sampler, "update before load"
                await self._work(self.sampler.update_weights, weights.items())
                self.version, self.failed = version, None
            except Exception as error:
                self.failed = error

    async def submit(
        self,
        ticket: str,
        version: Version,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
    ) -> None:
        """Take a request; ``result`` returns its answer.

        Raises RuntimeError if Ray has restarted this actor, which has no model then.
        """
        if self.sampler is None:
            raise RuntimeError("a sampler was lost and has been restarted")
        self._forget_before(version)
        self.wanted[ticket] = version
        request = self._answer(ticket, version, prompts, seeds, max_tokens)
        self.answers[ticket] = asyncio.create_task(request)

    async def result(self, ticket: str) -> list[Completion]:
        try:
            return await self.answers[ticket]
        finally:
            self.answers.pop(ticket, None)

    def _forget_before(self, version: Version) -> None:
        """Drop what was asked and sent before the workers were restarted, because nobody waits for it."""
        self.parts = {each: parts for each, parts in self.parts.items() if each[0] >= version[0]}
        for ticket, wanted in list(self.wanted.items()):
            if wanted[0] < version[0]:
                del self.wanted[ticket]
                if task := self.answers.pop(ticket, None):
                    task.cancel()

    async def _answer(self, ticket: str, version: Version, *request: Any) -> list[Completion]:
        try:
            async with self._turn(lambda: self.failed is not None or self.version == version):
                if self.failed:
                    raise self.failed
                assert self.sampler
                return list(await self._work(self.sampler.generate, *request, never_stops))
        finally:
            self.wanted.pop(ticket, None)
            async with self.changed:
                self.changed.notify_all()

    @asynccontextmanager
    async def _turn(self, ready: Callable[[], bool]) -> Any:
        """Enclose work with the model, of which there is one at a time."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.busy and ready())
            self.busy = True
        try:
            yield
        finally:
            async with self.changed:
                self.busy = False
                self.changed.notify_all()

    async def _work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)


def never_stops() -> None:
    """Poll for a stop, which never comes: the process that asked stops waiting, or ends the actor."""


class PolicySampler(Sampler):
    """A policy that samples with the weights of another one."""

    makes_batches = True

    def __init__(self, policy: TransformersPolicy) -> None:
        self.policy = policy

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights. Raises UserError if they are of another model."""
        model = self.policy.bare_model
        missing, unexpected = model.load_state_dict(dict(weights), strict=False)
        if unexpected or set(missing) - set(model.all_tied_weights_keys):
            raise UserError(f"{self.policy.config.path} has other weights than the model in training")

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt."""
        return self.policy.complete(prompts, seeds, max_tokens)


def load_sampler(
    model: ModelConfig, rollout: RolloutConfig, prompts: PromptFormat, sampler: SamplerConfig
) -> Sampler:
    """Load what samples in an actor. Raises UserError if it cannot be loaded or sampled from."""
    at = accelerator(model.device, model.dtype)
    if sampler.name != "vllm":
        sampled = model.model_copy(update={"dtype": sampler.computes_in(model), "compile": False})
        return PolicySampler(TransformersPolicy(sampled, rollout, prompts, at))
    # vLLM has weights of its own, and needs of transformers' only the names: in bfloat16, half the memory.
    loaded, renderer = load_with_renderer(model, prompts, dtype="bfloat16")
    return VllmSampler(model, sampler, rollout, loaded.to("meta"), renderer.ends, at.device)


class RaySamplers(Sampler):
    """The actors as the sampler of a policy in training."""

    makes_batches = True

    def __init__(self, actors: Sequence[Any], policy: TrainablePolicy, start: int) -> None:
        """``start``: the number of times that the workers were started. Raises what ``wait_for`` raises."""
        self.actors, self.policy, self.start = actors, policy, start
        rank, workers = policy.accelerator.process_index, policy.accelerator.num_processes
        self.own = actors[rank % len(actors) :: workers]
        """The actors that answer this process. If every process asked all of them, each would answer many
        small requests one after another."""
        sampling = policy.sampling
        self.dtype = getattr(torch, sampling.computes_in(policy.config))
        exact = sampling.name != "vllm" and self.dtype == torch.float32 and not sampling.staleness
        self.differs = not exact
        self.sent: Event = Event()
        wait_for(actors)

    @property
    def version(self) -> Version:
        return self.start, self.policy.version

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send the weights to every actor, in the type that they sample in.

        Each process sends a part, so that no host sends all, nor needs room for all.
        """
        import ray

        rank, parts = self.policy.accelerator.process_index, self.policy.accelerator.num_processes
        kept = {name for name, _ in self.policy.bare_base.named_buffers()}  # as they are, as in any model
        part = {
            name: value.detach().to("cpu", value.dtype if name in kept else self.dtype)
            for place, (name, value) in enumerate(weights)  # if in shards, all processes gather each
            if place % parts == rank
        }
        held = ray.put(part)
        for actor in self.actors:  # they wait for their turn, nobody waits for them
            actor.update.remote(self.version, held, parts)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt; an actor gets neighbours, which may share their prompt."""
        import ray

        parts = torch.arange(len(prompts)).tensor_split(len(self.own))
        tickets, taken = [], []
        for actor, part in zip(self.own, parts, strict=True):
            ticket, rows = uuid4().hex, part.tolist()
            request = [[each[row] for row in rows] for each in (prompts, seeds, max_tokens)]
            if rows:
                taken.append(actor.submit.remote(ticket, self.version, *request))
                tickets.append((actor, ticket))
        with user_errors():
            ray.get(taken)
        self.sent.set()
        answers = [actor.result.remote(ticket) for actor, ticket in tickets]
        waiting = answers
        while waiting:
            poll()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL)
        with user_errors():
            return [completion for answer in ray.get(answers) for completion in answer]


def start_samplers(
    number: int,
    use_gpus: bool,
    model: ModelConfig,
    rollout: RolloutConfig,
    prompts: PromptFormat,
    sampler: SamplerConfig,
) -> list[Any]:
    """Start actors, spread over the nodes; Ray restarts a lost one. ``wait_for`` loads their models."""
    import ray

    units = sampler.tensor_parallel
    resources = {"num_cpus": 1, "num_gpus": units} if use_gpus else {"num_cpus": units}
    made = ray.remote(**resources, max_restarts=-1, scheduling_strategy="SPREAD")
    return [made(SamplerActor).remote(model, rollout, prompts, sampler) for _ in range(number)]


def wait_for(actors: Sequence[Any], seconds: float = READY_SECONDS) -> None:
    """Wait until every actor has loaded its model, even if Ray has to restart it.

    Raises UserError if a model cannot be loaded, or after ``seconds``.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    deadline = time.monotonic() + seconds
    for actor in actors:
        while True:
            try:
                with user_errors():
                    ray.get(actor.load.remote(), timeout=max(0, deadline - time.monotonic()))
                break
            except GetTimeoutError as error:
                raise UserError(
                    f"the samplers are not ready after {seconds:.0f} seconds: the cluster has no room for "
                    f"{len(actors)} of them beside the workers, or the model takes longer to load"
                ) from error
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"a sampler cannot be started: {first_line(error)}") from error
                time.sleep(POLL)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise a UserError of an actor as it was raised there, without the actor's traceback."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
