"""A discrete-event simulation of a run: what the formulas leave out is that no two completions, verdicts and
shares are equal, and that everybody waits for the slowest."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import simpy

from benchmarks.scale.assumptions import Assumptions
from benchmarks.scale.formula import batches, decode_cost, transfer, update_seconds
from benchmarks.scale.models import Array
from benchmarks.scale.setup import Setup

Events = Generator[simpy.Event, Any, None]


class Simulation:
    """Workers, samplers, verifier processes and the network of a run, over some steps."""

    def __init__(self, setup: Setup, a: Assumptions, steps: int = 20, seed: int = 0) -> None:
        self.setup, self.a, self.steps = setup, a, steps
        self.random = np.random.default_rng(seed)
        self.noise = setup.lengths.sigma > 0
        self.env = simpy.Environment()
        self.put, self.network, self.load = transfer(setup, a)
        self.decode_cost = decode_cost(setup, a)
        self.lengths = {step: self._draw(1.0) for step in range(1, steps + 1)}
        self.extra = {step: self._draw(setup.guided) for step in range(1, steps + 1)} if setup.guided else {}
        self.places = max(1, min(setup.samplers, setup.nodes))
        """Nodes with samplers."""
        self.published: dict[int, simpy.Event] = defaultdict(self.env.event)
        self.arrived: dict[tuple[int, int], simpy.Event] = defaultdict(self.env.event)
        self.asked_again: dict[int, simpy.Event] = defaultdict(self.env.event)
        self.sampled: dict[tuple[str, int], list[simpy.Event]] = {}
        self.ends: list[float] = []
        self.asking: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        """For every engine, the workers that it answers, its place among their samplers, and their number."""
        for worker in range(setup.workers if setup.samplers else 0):
            own = setup.own(worker)
            for place, engine in enumerate(own):
                self.asking[engine].append((worker, place, len(own)))

    def run(self) -> list[float]:
        """Return the seconds of every step."""
        for kind, drawn in (("rollout", self.lengths), ("guide", self.extra)):
            for step in drawn:
                self.sampled[kind, step] = [self.env.event() for _ in range(self.setup.engines)]
        for engine in range(self.setup.engines):
            self.env.process(self.engine(engine))
        self.env.process(self.sending())
        self.env.process(self.training())
        self.env.run()
        return [end - begin for begin, end in zip([0.0, *self.ends], self.ends, strict=False)]

    def _draw(self, share: float) -> list[Array]:
        """Lengths of the completions of every worker."""
        setup, count = self.setup, math.ceil(self.setup.group * share)
        drawn = setup.lengths.draw(self.random, (setup.problems, count))
        return [drawn[worker :: setup.workers].ravel() for worker in range(setup.workers)]

    # Sampling

    def engine(self, number: int) -> Events:
        """One copy of the model that samples: for every version of the weights, load it and answer what is
        asked of it."""
        setup, env = self.setup, self.env
        for version in range(1, self.steps + 1):
            yield self.arrived[version, number % self.places]
            yield env.timeout(self.load)
            first = 1 if version == 1 else version + setup.staleness
            for step in range(first, min(version + setup.staleness, self.steps) + 1):
                yield from self.answer("rollout", step, self.lengths[step], number)
            if self.extra:
                yield self.asked_again[version]
                yield from self.answer("guide", version, self.extra[version], number)

    def sending(self) -> Events:
        """Ray's store: the workers' nodes have a part of the weights each, and send it to one node after
        another."""
        for version in range(1, self.steps + 1):
            yield self.published[version]
            for place in range(self.places):
                if place:
                    yield self.env.timeout(self.network / (self.places - 1))
                self.arrived[version, place].succeed()

    def answer(self, kind: str, step: int, drawn: list[Array], number: int) -> Events:
        for request in self.requests(drawn, number):
            at = 0
            for size in batches(len(request), self.setup.batch):
                yield from self.decode(np.sort(request[at : at + size]))
                at += size
        self.sampled[kind, step][number].succeed()

    def requests(self, drawn: list[Array], number: int) -> Iterator[Array]:
        """What an engine samples, by request; a worker divides its completions among its own samplers."""
        setup = self.setup
        if not setup.samplers:
            yield drawn[number]
        elif setup.merged:
            yield piece(np.concatenate(drawn), setup.engines, number)
        else:
            for worker, place, own in self.asking[number]:
                if len(part := piece(drawn[worker], own, place)):
                    yield part

    def decode(self, lengths: Array) -> Events:
        """Sample a batch of completions of these lengths, ascending; half of the rows leave when half have
        ended."""
        fixed, row, seen = self.decode_cost
        at, kept, total = 0.0, len(lengths), len(lengths)
        while kept:
            left = kept // 2
            until = float(lengths[total - left - 1])
            tokens = until - at
            mean_seen = self.setup.prompt + at + (tokens - 1) / 2
            yield self.env.timeout(tokens * (fixed + kept * (row + seen * mean_seen)))
            at, kept = until, left

    # Training

    def training(self) -> Events:
        """The workers, who wait for each other before and after every update."""
        env, setup = self.env, self.setup
        for step in range(1, self.steps + 1):
            yield env.timeout(self.put)
            self.published[step].succeed()
            done: Sequence[simpy.Event] = self.sampled["rollout", step]
            yield env.all_of(
                [
                    env.process(self.graded(step, worker, self.finished(worker, done)))
                    for worker in range(setup.workers)
                ]
            )
            if self.extra:
                self.asked_again[step].succeed()
                yield env.all_of(self.sampled["guide", step])
            yield env.timeout(max(self.updates(step)))
            self.ends.append(env.now)

    def finished(self, worker: int, done: Sequence[simpy.Event]) -> simpy.Event:
        """The end of the sampling of a worker's completions."""
        setup = self.setup
        if setup.merged:
            return self.env.all_of(done)
        if setup.samplers:
            return self.env.all_of([done[number] for number in setup.own(worker)])
        return done[worker]

    def graded(self, step: int, worker: int, sampled: simpy.Event) -> Events:
        """Wait for the worker's rollouts and grade them in its verifier processes."""
        yield sampled
        count = len(self.lengths[step][worker])
        seconds = self.random.exponential(self.a.verdict, count) if self.noise else [self.a.verdict] * count
        free = [0.0] * self.setup.verifiers
        for each in seconds:
            heapq.heappush(free, heapq.heappop(free) + each)
        yield self.env.timeout(max(free))

    def updates(self, step: int) -> Iterator[float]:
        """Seconds of the update in every worker."""
        setup = self.setup
        padded = setup.fsdp or setup.checkpointing
        for drawn in self.lengths[step]:
            prompts = len(drawn) / (1 if padded else setup.group)
            tokens = float(drawn.sum()) + prompts * setup.prompt
            yield sum(update_seconds(setup, self.a, tokens))


def piece(whole: Array, pieces: int, number: int) -> Array:
    """One of ``pieces`` that ``whole`` is cut into, the first ones longer by 1 if need be."""
    size, longer = divmod(len(whole), pieces)
    start = number * size + min(number, longer)
    return whole[start : start + size + (number < longer)]


def simulated_seconds(setup: Setup, a: Assumptions, steps: int = 20, seed: int = 0) -> float:
    """Mean seconds of a step, without the first ones, in which nothing is sampled ahead yet, and the last."""
    seconds = Simulation(setup, a, steps, seed).run()
    left_out = setup.staleness + 2
    return float(np.mean(seconds[left_out : len(seconds) - setup.staleness]))
