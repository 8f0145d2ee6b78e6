"""Handrail's methods inside TRL's GRPOTrainer: TRL generates, batches and updates; the method guides."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from handrail._util.errors import UserError
from handrail._util.state import read_state, write_state
from handrail.engines.dealt import DealtPolicy, DealtPool
from handrail.engines.hosted import build_method
from handrail.engines.trl_engine import TrlEngine, TrlPolicy, answer_reward, experts_of, pool_of
from handrail.engines.trl_limits import require_no_terms, require_possible, require_text
from handrail.methods.base import Method, Term
from handrail.methods.batch import MicroBatch, Sample, micro_batch
from handrail.methods.losses import token_loss
from handrail.methods.method_and_terms import restore, state_of
from handrail.methods.scaling import scaled
from handrail.types.trajectory import Author, Group, Trajectory

STATE = "handrail"
"""Name of a checkpoint's files with the state of the method and its terms."""


class GuidedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl has no types
    """GRPOTrainer with a method of Handrail.

    The method learns from the dataset's columns ``reference`` (a worked solution, or ``references``, several
    of them), ``plan`` and ``answer``, which may be missing if the references end in ``\\boxed{answer}`` or
    ``#### answer``. TRL's reward functions grade; without any, Handrail's verifier does, by ``answer``.

    With ``method="grpo"`` and no terms, everything is TRL's own. Any other method, and GRPO with settings or
    terms, brings its own objective, computed by ``token_loss``.
    """

    def __init__(
        self,
        *arguments: Any,
        method: str | Mapping[str, Any] | Method[Any] = "grpo",
        terms: Sequence[str | Mapping[str, Any] | Term] = (),
        verifier: str | Mapping[str, Any] = "math",
        correct_by: str = "",
        correct_from: float = 1.0,
        experts: Mapping[str, Any] | None = None,
        endpoint: Mapping[str, Any] | None = None,
        plan_template: str = "",
        **named: Any,
    ) -> None:
        """Take the arguments of GRPOTrainer and, by name:

        ``method``: a name, settings with a ``name``, a TOML file with a section ``[method]``, or an object,
        which has its own terms. ``terms``: names, settings with a ``name``, or objects. ``verifier``,
        ``experts`` and ``endpoint``: settings, as in these sections of a configuration. ``correct_by``: the
        name of the reward function that tells if a completion is correct, by a reward of at least
        ``correct_from``; needed if there are several. ``plan_template``: as ``data.plan_template``.

        Raises UserError if the method cannot do inside TRL what these arguments ask.
        """
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, *arguments, **named).arguments
        del bound["self"]
        self._take_method(method, terms, bound)
        self.pool: DealtPool | None = None
        if not bound.get("reward_funcs") and not bound.get("environment_factory"):
            bound["reward_funcs"] = [answer_reward]
            self.pool = pool_of(verifier)
            weakref.finalize(self, self.pool.close)
        self.generated: list[tuple[Any, ...]] = []
        """Prompt, completion and log-probabilities of this process's rollouts."""
        self.rewards = torch.empty(0)
        """Rewards of all processes' rollouts by all reward functions, [N, F]."""
        self.guided: list[tuple[int, Group]] = []
        """The guided groups of the last generation, each with the place of its problem."""
        self.micro_batches: list[MicroBatch] = []
        """This process's share of what the current update takes from the last generation."""
        self.generations = self.problems = 0
        super().__init__(**bound)
        if not self.plain:
            self.beta = 0.0  # the method has a KL term of its own
            require_text(self.method, self)
        if not self.plain or self.pool:
            self.policy = TrlPolicy(self, plan_template)
            shared = DealtPolicy(self.policy)
            asked = experts_of(self, shared, experts, endpoint)
            self.engine = TrlEngine(self, shared, asked, correct_by, correct_from)

    def _take_method(self, method: Any, terms: Sequence[Any], bound: dict[str, Any]) -> None:
        """Choose the method, and let ``bound``, the arguments for GRPOTrainer, suit it."""
        args = bound["args"] = copy.copy(bound.get("args") or GRPOConfig("trl-GRPO"))
        self.plain = method == "grpo" and not terms
        if isinstance(method, Method):
            require_no_terms(terms)
            self.method = method
        else:
            self.method = build_method(method, terms, args.num_generations, args.max_completion_length)
        if self.plain:
            return
        require_possible(self.method, args, bound)
        if "reference" in self.method.models:
            args.beta = 1.0  # so that TRL keeps the model before training

    # Generation

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, _, _, logps, *_ = generated
        self.generated = list(zip(prompt_ids, completion_ids, logps or [None] * len(prompts), strict=True))
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        if self.pool is None:
            self.rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        else:
            rows = gather_object(list(zip(inputs, completion_ids, strict=True)))
            self.rewards = self.engine.grade_rollouts(rows).to(self.accelerator.device)
        return self.rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training and not self.plain:
            own = zip(inputs, self.generated, strict=True)
            self._guide(gather_object([(row, *rollout) for row, rollout in own]))
        return output

    def _guide(self, rollouts: Sequence[tuple[Any, ...]]) -> None:
        """Let the method guide the groups of all processes: rows, prompts, completions, log-probabilities."""
        method, engine = self.method, self.engine
        self.generations += 1
        engine.begin(self.generations)
        groups = engine.rollouts(method, rollouts, self.rewards)
        self.problems = len(groups)
        # Without vLLM, the rollouts have been scored already.
        self.guided = engine.guide_step(method, groups, old_logp=self.use_vllm and self.several_updates)

    # Updates

    @property
    def _updates(self) -> int:
        """Number of updates that each share a generation among them, by its problems."""
        return max(1, int(self.args.steps_per_generation // self.args.gradient_accumulation_steps))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.plain or not self.model.training:
            return inputs
        steps = self.args.steps_per_generation
        size, at = steps // self._updates, self._step % steps
        if at % size == 0:
            self.micro_batches = self._credit(at // size, size)
        return {"micro_batch": self.micro_batches[at % size]}

    @property
    def several_updates(self) -> bool:
        """True if there is more than one update between two generations."""
        return bool(self.num_iterations * self._updates > 1)

    def _credit(self, update: int, size: int) -> list[MicroBatch]:
        """Credit an update's groups; return this process's ``size`` micro-batches of live trajectories."""
        engine, processes = self.engine, self.accelerator.num_processes
        part = [
            (place, group) for place, group in self.guided if place * self._updates // self.problems == update
        ]
        places, groups = [place for place, _ in part], [group for _, group in part]
        credited = engine.credit(self.method, groups, places)
        live = [sample for sample in scaled(self.method, credited) if sample.is_live]
        self._log(credited, live)
        # Neighbours are of similar length, and the processes' micro-batches of one time are neighbours.
        live.sort(key=lambda sample: len(sample.trajectory.prompt_ids) + len(sample.trajectory))
        bounds = [number * len(live) // (size * processes) for number in range(size * processes + 1)]
        nothing = Sample(Trajectory.by(Author.REFERENCE, [end := self.policy.renderer.end], [end]))
        own = range(self.accelerator.process_index, size * processes, processes)
        return [micro_batch(live[bounds[number] : bounds[number + 1]] or [nothing]) for number in own]

    def _log(self, credited: Sequence[Group], live: Sequence[Sample]) -> None:
        lengths = [len(each.trajectory.prompt_ids) + len(each.trajectory) for each in live]
        if self.policy.context is not None and max(lengths, default=0) > self.policy.context:
            raise UserError(
                f"a prompt and its reference have {max(lengths)} tokens, and the model's context is "
                f"{self.policy.context}; leave the row out"
            )
        counts = self.engine.counts + self.engine.experts.take_counts()
        self.engine.counts.clear()
        counts["groups/all_wrong"] = sum(group.all_wrong for group in credited)
        counts["groups/guided"] = sum(len(group.rollouts) < len(group.trajectories) for group in credited)
        counts["trajectories/trained"] = len(live)
        for name, count in counts.items():
            self._metrics["train"][f"handrail/{name}"].append(float(count))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if "micro_batch" not in inputs:
            return super()._compute_loss(model, inputs)
        method, policy = self.method, self.policy
        batch = inputs["micro_batch"].to(self.accelerator.device)
        logp, entropy = policy.forward(batch.inputs, model)
        reference = policy.reference_logprobs(batch.inputs) if method.kl else None
        loss = token_loss(
            method, logp, batch.tokens, entropy if method.entropy_bonus else None, reference, self._cap
        )
        assert entropy is not None  # TRL computes it for the model in training
        own = (batch.tokens.author == Author.POLICY) * batch.tokens.mask
        sums = self.accelerator.reduce(torch.stack([(entropy.detach() * own).sum(), own.sum()]))
        self._metrics["train"]["entropy"].append((sums[0] / sums[1].clamp(min=1)).item())
        # Gradients are averaged over processes; each generation of an update gives its share of the loss.
        share = len(self.micro_batches) / self.current_gradient_accumulation_steps
        return loss * self.accelerator.num_processes * share

    @property
    def _cap(self) -> float:
        """Cap on importance weights; 0 for none."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return float(self.vllm_importance_sampling_clip_max or 0.0) if corrected else 0.0

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save and not self.plain:  # first, as TRL then deletes older checkpoints
            directory = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            directory.mkdir(parents=True, exist_ok=True)
            write_state(directory / STATE, {"generations": self.generations, **state_of(self.method)})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.plain:
            return
        file = Path(checkpoint, STATE)
        if not file.with_suffix(".json").exists():
            raise UserError(
                f"{checkpoint} has no {STATE}.json: another trainer wrote it; start from its model"
            )
        state = read_state(file)
        self.generations = state["generations"]
        restore(self.method, state)
