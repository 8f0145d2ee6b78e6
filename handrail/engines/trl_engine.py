"""What a method needs of a GRPOTrainer: its model generates and scores, its reward functions grade."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isnan, nan
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor
from trl import GRPOTrainer

from handrail._util.errors import UserError
from handrail._util.section import validated
from handrail.data.config import PromptFormat
from handrail.engines.dealt import DealtExperts, DealtPolicy, DealtPool, take_share
from handrail.engines.hosted import COLUMNS, HostedEngine, problem_of, rollout
from handrail.experts.config import EndpointConfig, ExpertsConfig
from handrail.experts.registry import Experts
from handrail.methods.base import Method
from handrail.methods.method_and_terms import require_experts
from handrail.models.batching import Inputs
from handrail.models.cached import positions
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.models.policy import Policy
from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory
from handrail.verifiers.config import VerifierConfig


def with_logp(policy: Policy, rollouts: Sequence[Trajectory], old: bool) -> list[Trajectory]:
    """Set the log-probabilities of rollouts that the policy itself has sampled.

    ``old``: True if they are learned from in several updates. Otherwise the ratio is 1, which dropout in the
    update must not change.
    """
    scored = policy.score([each.prompt_ids for each in rollouts], [each.token_ids for each in rollouts])
    return [
        each.with_columns(sampling_logp=logp, **({"old_logp": logp} if old else {}))
        for each, logp in zip(rollouts, scored, strict=True)
    ]


class TrlPolicy(Policy):
    """The model of a GRPOTrainer, in one process."""

    def __init__(self, trainer: Any, plan_template: str = "") -> None:
        self.trainer = trainer
        chat = not isinstance(next(iter(trainer.train_dataset))["prompt"], str)
        prompts = PromptFormat(chat=chat, chat_template_kwargs=trainer.chat_template_kwargs)
        if plan_template:
            prompts = validated(PromptFormat, prompts.model_dump() | {"plan_template": plan_template})
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.text_config = model.config.get_text_config()
        name = str(model.config._name_or_path) or "the model"
        vocabulary = self.text_config.vocab_size
        self.renderer = Renderer(trainer.processing_class, prompts, name, vocabulary, trainer.eos_token_ids)

    @property
    def context(self) -> int | None:
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def max_tokens(self) -> int:
        return int(self.trainer.max_completion_length)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """``seeds`` are not used: TRL samples with PyTorch's own random numbers, or with vLLM's."""
        assert not isinstance(max_tokens, int | None)  # DealtPolicy gives one limit for each prompt
        size = self.trainer.args.per_device_train_batch_size * self.trainer.args.steps_per_generation
        out: list[Trajectory] = []
        with self._at_most(max(gather_object([max(max_tokens, default=0)]))):
            for at in range(0, len(prompts), size):
                part, limits = list(prompts[at : at + size]), max_tokens[at : at + size]
                tokens, logps = self.trainer._generate_single_turn(part, None, {}, 1)
                for place, (prompt, limit) in enumerate(zip(part, limits, strict=True)):
                    logp = None if logps is None else logps[place][:limit]
                    out.append(rollout(self.renderer, prompt, tokens[place][:limit], logp))
        return out if self.trainer.use_vllm else with_logp(self, out, self.trainer.several_updates)

    @contextmanager
    def _at_most(self, tokens: int) -> Iterator[None]:
        trainer = self.trainer
        owner, name = (
            (trainer.vllm_generation, "max_completion_length")
            if trainer.use_vllm
            else (trainer.generation_config, "max_new_tokens")
        )
        before = getattr(owner, name)
        setattr(owner, name, tokens)
        try:
            yield
        finally:
            setattr(owner, name, before)

    def load(self, path: str, field: str) -> Policy:
        """Load another model to sample and score. Raises UserError, naming ``field``, if that fails."""
        model = ModelConfig(path=path, trust_remote_code=self.trainer.args.trust_remote_code)
        rollout = RolloutConfig(max_tokens=self.max_tokens, temperature=self.trainer.temperature)
        return TransformersPolicy(model, rollout, self.renderer.data, self.trainer.accelerator, field=field)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        size, out = self.trainer.args.per_device_train_batch_size, list[Tensor]()
        targets = completions if targets is None else targets
        logprobs = self.reference_logprobs if model == "reference" else self.logprobs
        trained, training = self.trainer.model, self.trainer.model.training
        trained.eval()  # no dropout, as when sampling
        for at in range(0, len(prompts), size):
            part = slice(at, at + size)
            logps = logprobs(Inputs.of(prompts[part], completions[part], targets[part])).cpu()
            out += [row[: len(each)].clone() for row, each in zip(logps, completions[part], strict=True)]
        trained.train(training)
        return out

    def logprobs(self, inputs: Inputs, model: Any = None) -> Tensor:
        """Compute log π [B, T] of the targets."""
        return self.forward(inputs, model)[0]

    @torch.no_grad()
    def reference_logprobs(self, inputs: Inputs) -> Tensor:
        """Compute log π [B, T] of the targets under the model before training."""
        trainer = self.trainer
        if trainer.ref_model is not None:
            return self.forward(inputs, trainer.ref_model)[0]
        from trl.trainer.utils import use_adapter  # not in every version, and this one has been checked

        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.forward(inputs)[0]

    def forward(self, inputs: Inputs, model: Any = None) -> tuple[Tensor, Tensor | None]:
        """Compute log π and the entropy, [B, T] each, as the trainer does, but of the targets.

        The entropy is None for the model before training, of which TRL computes none.
        """
        trainer = self.trainer
        inputs, width = inputs.to(trainer.accelerator.device), inputs.completion.shape[1]
        labels = torch.full_like(inputs.whole, -100)
        labels[:, labels.shape[1] - width :] = inputs.targets.masked_fill(inputs.completion_mask == 0, -100)
        with trainer.accelerator.autocast():
            out = (trainer.model if model is None else model)(
                input_ids=inputs.whole,
                attention_mask=inputs.whole_mask,
                position_ids=positions(inputs.whole_mask),  # as generate() counts them, without padding
                labels=labels,
                fused_lm_head=True,
            )
        start = out.log_probs.shape[1] - width
        return out.log_probs[:, start:], None if out.entropy is None else out.entropy[:, start:]


class TrlEngine(HostedEngine):
    """HostedEngine on a GRPOTrainer's model; without a pool, TRL's reward functions grade."""

    host, advice = "TRL", "give prompts as text, or a simpler chat template"
    no_answers = (
        "reward functions do not tell; leave out reward_funcs, so that verifier= grades by the dataset's "
        "answer column"
    )

    def __init__(
        self,
        trainer: Any,
        policy: DealtPolicy,
        experts: Experts,
        correct_by: str,
        correct_from: float,
    ) -> None:
        """``correct_by``: the reward function that tells if a completion is correct: it gives at least
        ``correct_from`` then."""
        super().__init__(policy, trainer.pool, experts, trainer.args.seed)
        names = trainer.reward_func_names
        if not correct_by and len(names) > 1 and not trainer.plain:
            raise UserError(
                f"reward_funcs: there are {', '.join(names)}; say by correct_by= which one tells if a "
                "completion is correct"
            )
        if correct_by and correct_by not in names:
            raise UserError(f"correct_by: there is no {correct_by!r}; there are: {', '.join(names)}")
        self.require_answers(trainer.method.terms)
        self.trainer, self.correct_from = trainer, correct_from
        self.decisive = names.index(correct_by or names[0])
        self.verdicts: list[Trajectory] = []
        """The last rollouts as the pool has graded them."""

    def grade_rollouts(self, rows: Sequence[tuple[Mapping[str, Any], list[int]]]) -> Tensor:
        """Let the pool grade rows with their completions; return the rewards [N, 1]."""
        renderer = self.policy.renderer
        pairs = [(problem_of(row, renderer), rollout(renderer, [], tokens)) for row, tokens in rows]
        self.verdicts = self.verify(pairs)
        return torch.tensor([[each.reward] for each in self.verdicts])

    def rollouts(
        self, method: Method[Any], rollouts: Sequence[tuple[Any, ...]], rewards: Tensor
    ) -> list[Group]:
        """Make groups of the rollouts of all processes: rows, prompts, completions, log-probabilities.

        ``rewards``: of all reward functions, [N, F]. Raises UserError if Handrail would write another prompt
        than TRL did.
        """
        size, renderer = method.group_size, self.policy.renderer
        members = [rollout(renderer, prompt, tokens, logp) for _, prompt, tokens, logp in rollouts]
        if not self.trainer.use_vllm:
            members = with_logp(self.policy, members, self.trainer.several_updates)
        if self.verifier is None:
            members = self.set_rewards(members, rewards)
        else:
            members = [
                replace(member, reward=verdict.reward, correct=verdict.correct, answer=verdict.answer)
                for member, verdict in zip(members, self.verdicts, strict=True)
            ]
        groups = []
        for at in range(0, len(members), size):
            problem = problem_of(rollouts[at][0], renderer)
            if (n := method.samples(problem)) > size:
                raise UserError(
                    f"{method.name} asks for {n} rollouts, and num_generations is {size}; raise it"
                )
            groups.append(self.group(problem, members[at : at + n]))
        return groups

    def _model(self, name: str) -> tuple[Policy, str]:
        policy, model = super()._model(name)
        return (policy if policy is self.policy else DealtPolicy(policy)), model

    def grade(self, pairs: Sequence[tuple[Problem, Trajectory]], answers: bool) -> list[Trajectory]:
        if self.verifier is not None:
            graded = super().grade(pairs, answers)
            if failing := next(filter(None, gather_object([self.verifier.failing])), None):
                raise UserError(f"{failing}; fix the verifier")
            return graded
        if answers:
            raise UserError(f"the method or a term reads the answers in completions, which {self.no_answers}")
        own = take_share(pairs)
        # A term may have replaced the answer of a problem.
        rows = [problem.metadata | {"answer": problem.answer} for problem, _ in own]
        tokens = [member.tokens for _, member in own]
        texts = self.trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
        chat = self.policy.renderer.chat
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        # Every process calls it, because it gathers the rewards of all.
        rewards = GRPOTrainer._calculate_rewards(
            self.trainer, rows, [row["prompt"] for row in rows], completions, tokens
        )
        # TRL's table and means are of rollouts, so what reward functions log of these has no place there.
        self.trainer._pending_extra_logs.clear()
        self.trainer._pending_metrics.clear()
        return self.set_rewards([member for _, member in pairs], rewards[: len(pairs)])

    def set_rewards(self, members: Sequence[Trajectory], rewards: Tensor) -> list[Trajectory]:
        """Set ``reward`` and ``correct`` from the rewards of all functions [N, F]; NaN is no reward."""
        totals = (rewards * self.trainer.reward_weights.to(rewards.device)).nansum(1)
        totals[rewards.isnan().all(1)] = nan
        verdicts = zip(members, totals.tolist(), rewards[:, self.decisive].tolist(), strict=True)
        return [
            replace(member, reward=total, correct=None if isnan(score) else score >= self.correct_from)
            for member, total, score in verdicts
        ]


def experts_of(
    trainer: Any, policy: DealtPolicy, experts: Mapping[str, Any] | None, endpoint: Mapping[str, Any] | None
) -> DealtExperts:
    """Set up the experts.

    Raises UserError if a setting is wrong, an expert is missing, or the data cannot be learned from.
    """
    asked = DealtExperts(
        validated(ExpertsConfig, experts or {}, "experts"),
        validated(EndpointConfig, endpoint, "endpoint") if endpoint else None,
        trainer.policy.load,
        policy,
        trainer.accelerator.device,
    )
    if not isinstance(trainer.train_dataset, IterableDataset):
        used = [name for name in COLUMNS if name in trainer.train_dataset.column_names]
        rows = trainer.train_dataset.select_columns(used)
        asked.problems = [problem_of(row, trainer.policy.renderer) for row in rows]
        trainer.method.check(asked.problems)
    require_experts(trainer.method, asked)
    return asked


def pool_of(verifier: str | Mapping[str, Any]) -> DealtPool:
    """Start the processes of a verifier that is given by name or settings.

    Raises UserError if a setting is wrong, or if the verifier cannot be used.
    """
    named = {"name": verifier} if isinstance(verifier, str) else dict(verifier)
    return DealtPool(validated(VerifierConfig, named, "verifier"))


def answer_reward(**_: Any) -> list[float]:
    """Give the reward of Handrail's verifier its name; GuidedGRPOTrainer asks the verifier itself."""
    raise NotImplementedError
