"""Handrail's methods inside verl's PPO trainer: verl samples, grades and updates; the method guides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transfer_queue
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.metric import reduce_metrics
from verl.utils.tensordict_utils import get, get_tensordict

from handrail._util.errors import UserError
from handrail._util.state import read_state, write_state
from handrail.engines.hosted import build_method
from handrail.engines.verl_engine import FIELDS, dataset_rows, engine_of
from handrail.engines.verl_limits import (
    NAME,
    become_synchronous,
    importance_weight_cap,
    require_possible,
    require_tested,
    settings_of,
)
from handrail.engines.verl_rows import arrange, describe, loss, nest, training_rows
from handrail.methods.method_and_terms import require_experts, restore, state_of
from handrail.methods.scaling import scaled
from handrail.types.problem import Problem
from handrail.types.trajectory import Group

require_tested()


@register_trainer(NAME)
class GuidedPPOTrainer(PPOTrainerSync):  # type: ignore[misc]  # verl has no types
    """verl's synchronous PPO trainer with the method in ``algorithm.handrail`` (see ``VerlSettings``).

    With ``method=grpo`` and no terms, everything is verl's own. Any other method, and GRPO with settings or
    terms, brings its own objective, computed by ``token_loss`` in verl's workers.

    Rollouts and their metrics stay verl's. What a method makes of them goes to the workers directly and never
    enters verl's queue, so it may be more or fewer rows, of any length.
    """

    def __init__(self, config: DictConfig) -> None:
        """Raises UserError if the method cannot do inside verl what ``config`` asks."""
        self.guiding = settings_of(config)
        self.plain = self.guiding.plain
        rollout = config.actor_rollout_ref.rollout
        self.method = build_method(
            self.guiding.method, self.guiding.terms, rollout.n, rollout.response_length
        )
        if not self.plain:
            require_possible(self.method, config)
        become_synchronous(config, self.plain, not self.plain and "reference" in self.method.models)
        self.problems: dict[str, Problem] = {}
        """The problems of the current step, by their uids, in the data loader's order."""
        self.guided: list[tuple[int, Group]] = []
        """The guided groups of the current step, each with the place of its problem."""
        self.size = 0
        """Number of problems of the current step, with or without groups."""
        self.awake = False
        super().__init__(config)

    @property
    def updates(self) -> int:
        """Number of updates that share a step's problems among them."""
        actor = self.config.actor_rollout_ref.actor
        return int(self.config.data.train_batch_size // actor.ppo_mini_batch_size)

    # Set-up

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        if self.plain:
            return
        actor = self.config.actor_rollout_ref.actor
        with open_dict(self.config):  # the schedule of the learning rate advances with every update
            for name in ("total_training_steps", "lr_warmup_steps"):
                if actor.optim[name] > 0:  # -1 is none
                    actor.optim[name] *= self.updates * actor.ppo_epochs
        self.engine = engine_of(self, self.guiding)
        self.method.check(self.engine.experts.problems)
        require_experts(self.method, self.engine.experts)
        self.engine.require_answers(self.method.terms)

    def _setup(self) -> None:
        super()._setup()
        if not self.plain:
            method, cap = describe(self.method), importance_weight_cap(self.config)
            self.actor_rollout_wg.set_loss_fn(partial(loss, method=method, importance_weight_cap=cap))

    # Generation

    def _fetch_one_gen_batch(self) -> TensorDict:
        batch = super()._fetch_one_gen_batch()
        if self.plain:
            return batch
        problems = [self.engine.rows.problem(row) for row in dataset_rows(batch)]
        self.problems |= zip(batch["uid"], problems, strict=True)
        # verl knows no problem without a rollout.
        sizes = [max(1, self.method.samples(problem)) for problem in problems]
        return get_tensordict({**dict(batch.items()), "__rollout_n__": sizes})

    def on_sample_end(self) -> None:
        self.awake = True
        if self.plain:
            self.sleep()

    def wake(self) -> None:
        """Give the GPUs to verl's servers, with the current weights."""
        if not self.awake:
            self.checkpoint_manager.update_weights(self.global_steps - 1)
            self.awake = True

    def sleep(self) -> None:
        """Give the GPUs to the model in training."""
        if self.awake:
            super().on_sample_end()
            self.awake = False

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """Let the method guide the groups, whose rewards are known by now."""
        if self.plain:
            return super()._balance_batch(batch, metrics, *rest, **named)
        logps = ["rollout_log_probs"] if self.config.actor_rollout_ref.rollout.calculate_log_probs else []
        queued = transfer_queue.kv_batch_get(batch.keys, batch.partition_id, [*FIELDS, *logps])
        method, engine = self.method, self.engine
        engine.begin(self.global_steps)
        groups = engine.rollouts(method, self.problems, queued)
        several = self.updates * self.config.actor_rollout_ref.actor.ppo_epochs > 1
        self.size = len(groups)
        self.guided = engine.guide_step(method, groups, old_logp=several)
        self.problems.clear()
        self.sleep()
        return batch

    # Updates

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return super()._compute_old_log_prob(batch, metrics) if self.plain else batch

    def _compute_ref_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return super()._compute_ref_log_prob(batch, metrics) if self.plain else batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return super()._compute_advantage(batch, metrics) if self.plain else batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Credit the groups of each update right before it."""
        if self.plain:
            return super()._update_actor(batch, metrics)
        found: dict[str, list[Any]] = {}
        size = self.size
        rows = {id(tokens): row for row, tokens in enumerate(self.engine.queued)}
        advantages = [torch.zeros(len(tokens)) for tokens in self.engine.queued]
        for _ in range(self.config.actor_rollout_ref.actor.ppo_epochs):
            for update in range(self.updates):
                part = [each for each in self.guided if each[0] * self.updates // size == update]
                places, groups = [place for place, _ in part], [group for _, group in part]
                credited = self.engine.credit(self.method, groups, places)
                for member in (member for group in credited for member in group.trajectories):
                    if (row := rows.get(id(member.token_ids))) is not None:
                        advantages[row] = member.column("advantage")
                for name, values in self._update(credited).items():
                    found.setdefault(name, []).extend(values if isinstance(values, list) else [values])
        fields = get_tensordict({"advantages": nest(advantages), "returns": nest(advantages)})
        transfer_queue.kv_batch_put(batch.keys, batch.partition_id, fields=fields)
        if found:
            found["perf/mfu/actor"] = found.pop("actor/mfu")
        metrics.update(reduce_metrics(found))
        counts = self.engine.counts + self.engine.experts.take_counts()
        groups = [group for _, group in self.guided]
        counts["groups/all_wrong"] = sum(group.all_wrong for group in groups)
        counts["groups/guided"] = sum(len(group.rollouts) < len(group.trajectories) for group in groups)
        metrics.update({f"{NAME}/{name}": float(count) for name, count in counts.items()})
        return batch

    def _update(self, credited: Sequence[Group]) -> dict[str, Any]:
        """Train on what has credit, and return the workers' metrics; none if nothing has."""
        live = [sample for sample in scaled(self.method, credited) if sample.is_live]
        self.engine.counts["trajectories/trained"] += len(live)
        self.sleep()
        if not live:
            return {}
        live = self.engine.prepare(live, self.method.kl != 0)
        actor = self.config.actor_rollout_ref.actor
        rows = arrange(live, self.processes, self.update_divisor, self.engine.policy.renderer.end)
        settings = {
            "temperature": self.config.actor_rollout_ref.rollout.temperature,
            "calculate_entropy": bool(actor.calculate_entropy or self.method.entropy_bonus),
            "global_batch_size": len(rows),
            "mini_batch_size": len(rows),
            "epochs": 1,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},
        }
        output = self.actor_rollout_wg.update_actor(training_rows(rows, **settings))
        return {f"actor/{name}": value for name, value in get(output, "metrics").items()}

    @property
    def processes(self) -> int:
        """Number of data-parallel processes of the actor."""
        info = self.actor_rollout_wg._dispatch_info
        if "actor" not in info:
            info["actor"] = self.actor_rollout_wg._query_dispatch_info("actor")
        return int(max(info["actor"])) + 1

    @property
    def update_divisor(self) -> int:
        """Number that the row count of an update must be divisible by."""
        actor = self.config.actor_rollout_ref.actor
        return self.processes * (1 if actor.use_dynamic_bsz else int(actor.ppo_micro_batch_size_per_gpu))

    def score_divisor(self, model: str) -> int:
        """Number that the row count must be divisible by if ``model`` scores."""
        own = model == "policy" or self.ref_in_actor
        section = self.config.actor_rollout_ref["rollout" if own else "ref"]
        dynamic, rows = section.log_prob_use_dynamic_bsz, section.log_prob_micro_batch_size_per_gpu
        return self.processes * (1 if dynamic else int(rows))

    # Checkpoints

    def _save_checkpoint(self) -> None:
        if not self.plain:
            directory = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            directory.mkdir(parents=True, exist_ok=True)
            write_state(directory / NAME, state_of(self.method))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.plain or not self.global_steps:
            return
        trainer = self.config.trainer
        latest = Path(trainer.default_local_dir, f"global_step_{self.global_steps}")
        directory = Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else latest
        if not (directory / f"{NAME}.json").exists():
            raise UserError(f"{directory} has no {NAME}.json: another trainer wrote it; start from its model")
        restore(self.method, read_state(directory / NAME))
