"""Rollouts of later steps, sampled elsewhere while this process updates the policy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from handrail._util.errors import Paused, UserError
from handrail.engines.local import LocalEngine
from handrail.types.trajectory import Group

if TYPE_CHECKING:
    from handrail.models.trainable import TrainablePolicy
    from handrail.training.run import Run


class Ahead:
    """Samples step s with the weights that the policy has at the start of step s - ``sampler.staleness``.

    The first steps are all sampled with the weights that the run starts or resumes from.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.last, self.steps = run, run.config.train.steps, run.config.sampler.staleness
        self.threads = ThreadPoolExecutor(self.steps + 1)
        self.begun: dict[int, Future[list[Group]]] = {}
        self.ended, self.poll = Event(), run.policy.poll
        run.policy.poll = self.check

    def check(self) -> None:
        """Raise Paused in threads that still sample when the run ends."""
        if self.ended.is_set():
            raise Paused("the run has ended")
        self.poll()

    def end(self) -> None:
        self.run.policy.poll = self.poll
        self.ended.set()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def rollouts(self, step: int) -> list[Group]:
        """Begin the steps up to ``staleness`` ahead, and return this process's rollouts of ``step``."""
        self.run.policy.update_sampler()
        for number in range(step, min(step + self.steps, self.last) + 1):
            if number not in self.begun:
                self._begin(number, step - 1)
        return self.begun.pop(step).result()

    def _begin(self, step: int, version: int) -> None:
        run, sampler = self.run, self.run.policy.sampler
        assert sampler and sampler.sent
        engine = LocalEngine(run.policy, run.verifier, run.engine.experts, run.engine.seed)
        engine.begin(step, version)
        sampler.sent.clear()
        self.begun[step] = self.threads.submit(engine.rollout, run.method, *run.problems(step))
        # Before the weights change, the sampler must know for which ones it was asked.
        while not self.begun[step].done() and not sampler.sent.wait(0.01):
            pass


@contextmanager
def sampling_ahead(run: Run) -> Iterator[Ahead | None]:
    """Sample ahead in the block if ``sampler.staleness`` asks for it."""
    if not run.config.sampler.staleness:
        yield None
        return
    ahead = Ahead(run)
    try:
        yield ahead
    finally:
        ahead.end()


def require_ahead(policy: TrainablePolicy) -> None:
    """Raise UserError if ``sampler.staleness`` needs a sampler that works while this process goes on."""
    staleness = policy.sampling.staleness
    if staleness and (policy.sampler is None or policy.sampler.sent is None):
        raise UserError(
            f"sampler.staleness is {staleness}, but the process that trains also samples; "
            "set it to 0, or start handrail train with --ray and --samplers"
        )
    if staleness and policy.sampler and not policy.sampler.makes_batches:
        raise UserError(
            f"sampler.staleness is {staleness}, but a sampler that works ahead must take all "
            "completions of a step at once (makes_batches)"
        )
