"""What a run has loaded and where it stands: what its callbacks see."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

from handrail._util.errors import Paused, UserError
from handrail._util.interrupts import Interrupts
from handrail._util.processes import accelerator
from handrail.data.sampler import ProblemSampler
from handrail.engines.local import LocalEngine
from handrail.methods import build
from handrail.methods.base import Method
from handrail.methods.method_and_terms import require_experts
from handrail.methods.npo import Npo
from handrail.models.generate import Sampler
from handrail.models.trainable import TrainablePolicy
from handrail.training.ahead import require_ahead
from handrail.training.config import Config, TrainConfig
from handrail.training.contents import contents, harvested_from_another_model, probed_with_another_model
from handrail.training.policies import (
    load_critic,
    load_experts,
    load_trainable_policy,
    require_trainable,
)
from handrail.training.run_data import RunData, fit, load_data
from handrail.training.run_directory import RunDirectory
from handrail.training.update import Update
from handrail.types.problem import Problem
from handrail.types.trajectory import Group
from handrail.verifiers.pool import VerifierPool

log = logging.getLogger("handrail")

T = TypeVar("T")


class Run:
    """One training run: everything that is loaded once, and what its processes agree on."""

    out: RunDirectory
    directory: Path

    def __init__(
        self,
        config: Config,
        method: type[Method[Any]] | None,
        verifier: VerifierPool,
        interrupts: Interrupts,
        sampler: Callable[[TrainablePolicy], Sampler] | None = None,
    ) -> None:
        if config.rollout.temperature == 0:
            raise UserError(
                "rollout.temperature is 0, so all rollouts of a group would be the same; set it above 0"
            )
        self.config, self.verifier, self.interrupts = config, verifier, interrupts
        self.method = build(config.method, config.rollout, method)
        require_trainable(config, self.method, sampler is not None)
        data = usable_data(config, self.method)
        self.contents = contents(config, data.sources, data.held_out)
        self.accelerator = accelerator(config.model.device, config.model.dtype, config.train.trackers)
        self.policy = load_trainable_policy(
            config, self.accelerator, "reference" in self.method.models, sampler
        )
        require_ahead(self.policy)
        trained = {"policy": self.policy}
        if "critic" in self.method.trained:
            trained["critic"] = load_critic(config, self.accelerator, self.policy)
        for policy in trained.values():
            policy.poll = interrupts.check
        if isinstance(self.method, Npo):
            self.method.require_tokens(self.policy.renderer)
        experts = load_experts(config, self.accelerator, self.policy)
        require_experts(self.method, experts)
        seed, require_end = config.train.seed, config.rollout.require_end
        critic = trained.get("critic")
        self.engine = LocalEngine(self.policy, verifier, experts, seed, require_end, critic)
        # A fixed seed: evaluations of different runs sample with the same random numbers.
        self.evaluator = LocalEngine(self.policy, verifier, experts, 0, require_end)
        self.data = fit(data, self.policy, config)
        experts.problems = self.data.training
        shares = [source.share for source in config.data.train]
        self.sampler = ProblemSampler(self.data.sources, shares, config.train.problems_per_step, seed)
        self.updates = {
            name: Update(
                self.method,
                policy,
                self.accelerator,
                self.accelerator.prepare(adamw(policy, config.train)),
                config.train,
            )
            for name, policy in trained.items()
        }
        """The updates of the models that are trained, by name."""
        self.optimizer = self.updates["policy"].optimizer
        self.skipped = Counter[str]()
        """Updates of each model without a finite gradient, in a row."""
        self.stop_requested = self.stop_reason = ""
        self.decided = 0
        self.checkpointed: int | None = None
        self.gone_back = False
        """Set by a callback that made an earlier checkpoint the newest, from which the run then goes on."""

    def stop(self, reason: str) -> None:
        """End the run after this step, or after the next one if this step has already been evaluated.

        The run evaluates and writes a checkpoint first.
        """
        self.stop_requested = self.stop_requested or reason

    def is_last(self, step: int) -> bool:
        """True if the run ends after ``step``; decided when it is first asked, in every process."""
        if self.decided != step:
            self.stop_reason = next(filter(None, gather_object([self.stop_requested])), "")
            self.decided = step
        return step == self.config.train.steps or bool(self.stop_reason)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's ``value`` in every process."""
        return broadcast_object_list([value])[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process what is raised in one, so that none waits for the others."""
        failed: Paused | UserError | None = None
        try:
            yield
        except (Paused, UserError) as error:
            if self.policy.alone:  # the others cannot be told; the launcher ends them
                raise
            failed = error
        self.policy.join()
        if failed := next(filter(None, gather_object([failed])), None):
            raise failed

    def by_model(self, groups: Sequence[Group]) -> list[tuple[str, Update, list[Group]]]:
        """Each model that is trained: its name, its update, and those of the groups that train it.

        Raises UserError if a group trains a model that the method does not name.
        """
        if unknown := {group.model for group in groups} - self.updates.keys():
            raise UserError(f"a group trains {unknown.pop()!r}, which the method does not name in trained")
        return [
            (name, update, [group for group in groups if group.model == name])
            for name, update in self.updates.items()
        ]

    def problems(self, step: int) -> tuple[list[Problem], list[int]]:
        """Return this process's problems of ``step`` and the place of each among all."""
        problems = self.sampler.problems(step)
        places = list(self.shard(range(len(problems))))
        return [problems[place] for place in places], places

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]


def usable_data(config: Config, method: Method[Any]) -> RunData:
    """Load the data. Raises UserError if the method cannot learn from it."""
    data = load_data(config)
    method.check(data.training)
    for source in config.data.train:
        if warning := probed_with_another_model(source, config.model.path):
            log.warning("data.train: %s", warning)
    cache = method.settings.cache if isinstance(method, Npo) else ""
    if cache and (warning := harvested_from_another_model(cache, config.model.path)):
        log.warning("method.cache: %s", warning)
    return data


def adamw(policy: TrainablePolicy, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        eps=config.epsilon,
        # One kernel on a GPU, without temporary copies of all weights.
        fused=policy.accelerator.device.type == "cuda",
    )
