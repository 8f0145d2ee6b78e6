"""What a method needs of verl's trainer: its servers generate, its workers score, its reward loop grades."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor, get_tensordict

from handrail._util.errors import BadRow, UserError
from handrail._util.section import validated
from handrail._util.seeds import derive
from handrail.data.config import PromptFormat
from handrail.data.layouts import column_map_layout, recognize, to_problem
from handrail.engines.hosted import HostedEngine, rollout
from handrail.engines.verl_limits import NAME, VerlSettings
from handrail.engines.verl_rows import plain_rows
from handrail.experts.registry import Experts
from handrail.methods.base import Method
from handrail.methods.batch import Sample
from handrail.models.batching import pad
from handrail.models.policy import Policy, limits_of
from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

FIELDS = ("uid", "prompts", "responses", "response_mask", "rm_scores", "extra_fields")
"""What is read of verl's rollouts."""


class VerlPolicy(Policy):
    """The model of verl's trainer, in verl's servers and workers."""

    def __init__(self, trainer: Any, plan_template: str = "") -> None:
        self.trainer, self.rollout = trainer, trainer.config.actor_rollout_ref.rollout
        template = OmegaConf.to_container(OmegaConf.create(trainer.config.data.apply_chat_template_kwargs))
        prompts = validated(
            PromptFormat,
            {"chat": True, "chat_template_kwargs": template}
            | ({"plan_template": plan_template} if plan_template else {}),
            f"algorithm.{NAME}",
        )
        model = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.model)
        config = model.hf_config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.renderer = Renderer(
            model.tokenizer, prompts, str(model.path), config.vocab_size, ends, "actor_rollout_ref.model.path"
        )

    @property
    def context(self) -> int | None:
        """Maximum length of a sequence in verl's servers."""
        limit = self.rollout.max_model_len
        return self.positions if limit is None else int(limit)

    @property
    def max_tokens(self) -> int:
        return int(self.rollout.response_length)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        limits = limits_of(self, prompts, max_tokens)
        settings = self.rollout
        sampling = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "repetition_penalty": 1.0,
            "logprobs": settings.calculate_log_probs,
        }
        seeded = settings.name == "vllm"  # SGLang's servers take no seed for a single request

        async def one(client: Any, prompt: list[int], seed: int, limit: int) -> Any:
            own = {"max_tokens": limit} | ({"seed": seed % 2**31} if seeded else {})
            return await client.generate(uuid4().hex, prompt_ids=prompt, sampling_params=sampling | own)

        async def all_of(client: Any) -> list[Any]:
            asked = zip(prompts, seeds, limits, strict=True)
            return await asyncio.gather(*(one(client, *each) for each in asked))

        self.trainer.wake()
        outputs = asyncio.run(all_of(self.trainer.get_llm_client()))
        if any(output.stop_reason == "aborted" for output in outputs):
            raise RuntimeError("verl's servers have aborted a request of the method")
        return [
            rollout(self.renderer, prompt, each.token_ids[:limit], each.log_probs and each.log_probs[:limit])
            for prompt, each, limit in zip(prompts, outputs, limits, strict=True)
        ]

    def score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        """``targets`` must be the completions: verl's workers score the tokens that they read."""
        rows = [torch.as_tensor(completion, dtype=torch.long) for completion in completions]
        if targets is not None and not all(
            torch.equal(torch.as_tensor(target, dtype=torch.long), row)
            for target, row in zip(targets, rows, strict=True)
        ):
            raise UserError("verl cannot score other tokens than those that a model reads")
        out = [torch.empty(0)] * len(rows)
        places = [place for place, row in enumerate(rows) if len(row)]
        if not places:
            return out
        padded = places + [places[0]] * (-len(places) % self.trainer.score_divisor(model))
        data = get_tensordict(
            plain_rows([prompts[place] for place in padded], [rows[place] for place in padded]),
            {"temperature": self.rollout.temperature, "calculate_entropy": False, "compute_loss": False},
        )
        for place, logp in zip(places, self._log_probs(data, model).unbind(), strict=False):
            start = len(prompts[place]) - 1  # each position holds the log-probability of the next token
            out[place] = logp[start : start + len(rows[place])].float().cpu()
        return out

    def _log_probs(self, data: TensorDict, model: str) -> Any:
        trainer = self.trainer
        trainer.sleep()
        if model == "reference" and not trainer.ref_in_actor:
            return trainer.ref_policy_wg.compute_ref_log_prob(data)["log_probs"]
        assign_non_tensor(data, no_lora_adapter=model == "reference")
        return trainer.actor_rollout_wg.compute_log_prob(data)["log_probs"]

    def require_room(self, members: Sequence[Trajectory]) -> None:
        """Raise UserError if the workers have no room for the longest of these trajectories."""
        longest = max(len(member.prompt_ids) + len(member) for member in members)
        actor = self.trainer.config.actor_rollout_ref.actor
        room = actor.ppo_max_token_len_per_gpu * actor.ulysses_sequence_parallel_size
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"a prompt and its reference have {longest} tokens, and the model's context is "
                f"{self.positions}; leave the row out"
            )
        if actor.use_dynamic_bsz and longest > room:
            raise UserError(
                f"a prompt and its reference have {longest} tokens, and a micro-batch has room for {room}; "
                "raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
            )


class Rows:
    """Rows of verl's dataset as problems, by the layouts that ``handrail.data`` knows, or by a column map."""

    def __init__(self, columns: Mapping[str, str], row: Mapping[str, Any], renderer: Renderer) -> None:
        """``row``: any row of the dataset. ``columns``: as ``data.columns``, empty to recognize it."""
        truth = {"answer": "reward_model.ground_truth"}
        row = {**row, "prompt": row["raw_prompt"]}  # the data may call it otherwise
        layout = column_map_layout({**truth, **columns}) if columns else recognize([row])
        self.layout = replace(layout, columns={**layout.columns, "prompt": "raw_prompt"})
        self.renderer = renderer

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """Make a problem of a row, with the whole row as metadata. Raises UserError if it has no answer."""
        default = str(derive(str(row["raw_prompt"]), str(row.get("reward_model"))))
        try:
            fields, _ = self.layout.split(row)
            problem = to_problem(fields, dict(row), default)
        except BadRow as error:
            raise UserError(
                f"a row of data.train_files, field {error.field}: {error.what}; {error.advice}"
            ) from error
        return self.renderer.clean_references(problem)


class VerlEngine(HostedEngine):
    """HostedEngine on verl's trainer; without a verifier, verl's reward loop grades."""

    host, advice = "verl", "raise data.max_prompt_length, or use a simpler chat template"
    no_answers = "verl's rewards do not tell; add +algorithm.handrail.verifier=math"

    def __init__(
        self,
        trainer: Any,
        policy: VerlPolicy,
        verifier: VerifierPool | None,
        experts: Experts,
        rows: Rows,
        settings: VerlSettings,
    ) -> None:
        super().__init__(policy, verifier, experts, int(trainer.config.data.seed or 0))
        self.trainer, self.own, self.rows, self.settings = trainer, policy, rows, settings
        self.queued: list[Tensor] = []
        """The ``token_ids`` of the rollouts in verl's batch, by which they are found in groups."""

    def rollouts(
        self, method: Method[Any], problems: Mapping[str, Problem], queued: TensorDict
    ) -> list[Group]:
        """Make groups of the queued rollouts, in the order of ``problems``, which are given by their uids.

        Problems of which every rollout has failed are left out.
        """
        uids, members = unwrap(queued["uid"]), list[Trajectory]()
        logps = queued.get("rollout_log_probs")
        logps = [None] * len(queued) if logps is None else [row.tolist() for row in logps.unbind()]
        rows = zip(
            queued["prompts"].unbind(),
            queued["responses"].unbind(),
            queued["response_mask"].unbind(),
            queued["rm_scores"].unbind(),
            unwrap(queued["extra_fields"]),
            logps,
            strict=True,
        )
        self.queued = []
        for prompt, response, mask, scores, extra, logp in rows:
            if not bool(mask.all()):
                raise UserError(
                    "a rollout has several turns, and a method reads and writes single-turn completions; use "
                    "the agent loop single_turn_agent"
                )
            member = rollout(self.policy.renderer, prompt.tolist(), response.tolist(), logp)
            self.queued.append(member.token_ids)
            info = (extra or {}).get("reward_extra_info", {})
            members.append(self.set_reward(member, float(scores.sum()), info))
        if self.verifier is not None:
            members = self.verify([(problems[uid], each) for uid, each in zip(uids, members, strict=True)])
        by_uid: dict[str, list[Trajectory]] = {uid: [] for uid in problems}
        for uid, member in zip(uids, members, strict=True):
            by_uid[uid].append(member)
        self.counts["groups/failed"] += sum(not found for found in by_uid.values())
        return [
            self.group(problem, found[: method.samples(problem)])
            for problem, found in zip(problems.values(), by_uid.values(), strict=True)
            if found
        ]

    def prepare(self, samples: Sequence[Sample], reference: bool) -> list[Sample]:
        """Return samples for verl's workers.

        ``reference``: True to add log-probabilities under the model before training, as the column
        ``reference_logp``. Raises UserError if the workers have no room for the longest.
        """
        self.own.require_room([sample.trajectory for sample in samples])
        if not reference:
            return list(samples)
        members = [sample.trajectory for sample in samples]
        prompts, completions = [each.prompt_ids for each in members], [each.token_ids for each in members]
        return [
            replace(sample, trajectory=member.with_columns(reference_logp=logp))
            for sample, member, logp in zip(
                samples, members, self.own.score(prompts, completions, "reference"), strict=True
            )
        ]

    def set_reward(self, member: Trajectory, score: float, extra: Mapping[str, Any]) -> Trajectory:
        """Set ``reward`` and ``correct`` from what verl's reward loop tells."""
        told = extra.get(self.settings.correct_by)
        decisive = score if told is None else float(told)
        correct = None if isnan(decisive) else decisive >= self.settings.correct_from
        return replace(member, reward=float(score), correct=correct)

    def grade(self, pairs: Sequence[tuple[Problem, Trajectory]], answers: bool) -> list[Trajectory]:
        if self.verifier is not None:
            graded = super().grade(pairs, answers)
            if self.verifier.failing:
                raise UserError(f"{self.verifier.failing}; fix the verifier")
            return graded
        if answers:
            raise UserError(f"the method or a term reads the answers in completions, which {self.no_answers}")
        scores = self.trainer.reward_loop_manager.compute_rm_score(reward_rows(pairs))
        totals = scores.batch["rm_scores"].sum(1).tolist()
        more = scores.non_tensor_batch
        return [
            self.set_reward(member, total, {name: column[place] for name, column in more.items()})
            for place, ((_, member), total) in enumerate(zip(pairs, totals, strict=True))
        ]


def reward_rows(pairs: Sequence[tuple[Problem, Trajectory]]) -> DataProto:
    """What verl's reward functions read of trajectories: their tokens, and the dataset's row of each."""
    prompts, prompt_mask = pad([member.prompt_ids for _, member in pairs])
    responses, response_mask = pad([member.token_ids for _, member in pairs])
    batch = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": torch.cat([prompt_mask, response_mask], 1),
    }
    rows = [row_of(problem) | {"__num_turns__": 2} for problem, _ in pairs]
    columns = {}
    for name in rows[0]:
        columns[name] = np.empty(len(rows), dtype=object)
        columns[name][:] = [row[name] for row in rows]
    return DataProto(TensorDict(batch, batch_size=len(pairs)), columns)


def row_of(problem: Problem) -> dict[str, Any]:
    """The dataset's row of a problem, whose answer a term may have replaced."""
    row = copy.deepcopy(dict(problem.metadata))
    reward = row.get("reward_model")
    if isinstance(reward, dict) and str(reward.get("ground_truth")) != problem.answer:
        row["reward_model"] = {**reward, "ground_truth": problem.answer}
    return row


def unwrap(column: Any) -> list[Any]:
    """The values of a field that are no tensors."""
    return [getattr(value, "data", value) for value in column]


def dataset_rows(batch: TensorDict) -> list[dict[str, Any]]:
    """Rows of verl's data loader, without tensors."""
    columns = {name: unwrap(batch[name]) for name in batch.keys() if not isinstance(batch[name], Tensor)}  # noqa: SIM118
    return [{name: column[place] for name, column in columns.items()} for place in range(len(batch))]


def engine_of(trainer: Any, settings: VerlSettings) -> VerlEngine:
    """Make the engine of a trainer that has its datasets, with all training problems.

    Raises UserError if a row cannot be used, or for a model that reads images.
    """
    policy = VerlPolicy(trainer, settings.plan_template)
    if trainer.processor is not None:
        raise UserError("a method trains on text only inside verl; give a model without images")
    rows = Rows(settings.columns, trainer.train_dataset[0], policy.renderer)
    experts = Experts(settings.experts, settings.endpoint, policy=policy)
    prompt = trainer.config.data.prompt_key
    experts.problems = [
        rows.problem(row | {"raw_prompt": row[prompt]}) for row in trainer.train_dataset.dataframe
    ]
    verifier = settings.verifier
    named = {"name": verifier} if isinstance(verifier, str) else verifier
    pool = VerifierPool(validated(VerifierConfig, named, f"algorithm.{NAME}.verifier")) if named else None
    if pool is not None:
        weakref.finalize(trainer, pool.close)
    return VerlEngine(trainer, policy, pool, experts, rows, settings)
