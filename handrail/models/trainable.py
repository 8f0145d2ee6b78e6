"""The policy that learns: its weights change, are saved, and are handed to whoever samples."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from handrail._util.errors import UserError
from handrail.data.config import PromptFormat
from handrail.models.batching import Inputs
from handrail.models.config import LoraConfig, ModelConfig, RolloutConfig, SamplerConfig
from handrail.models.generate import CopySampler, Drawn, Share
from handrail.models.hf import TransformersPolicy
from handrail.models.loading import absolute, load_model
from handrail.models.lora import load_adapter, merged, with_adapter
from handrail.models.vllm import INSTEAD, VllmSampler
from handrail.types import Group, Origin, Trajectory

COMPARED = 2
"""Completions of a step whose log-probabilities are compared with the trainer's."""


class LearningPolicy(TransformersPolicy):
    """With [lora] only adapters learn; with ``sampler.name = "vllm"``, vLLM samples, and in bfloat16 a copy of the model."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig | None = None,
        prompts: PromptFormat | None = None,
        accelerator: Accelerator | None = None,
        micro_batch_tokens: int = 8192,
        lora: LoraConfig | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        keep_start: bool = False,
    ) -> None:
        """``seed``: of the adapters' first weights; ``keep_start``: the model as it is now stays at hand, see ``frozen``.

        Raises UserError if the model cannot be loaded.
        """
        self.lora, self.sampling, self.seed, self.keep_start = lora, sampler or SamplerConfig(), seed, keep_start
        self.start: Any = None
        self.checkpointed: list[nn.Module] = []
        self.sampler: VllmSampler | CopySampler | None = None
        super().__init__(model, rollout, prompts, accelerator, micro_batch_tokens)
        if self.sampling.name == "vllm":
            processes = self.accelerator.num_processes
            if processes > 1:
                raise UserError(f'sampler.name is "vllm", which samples in a single process, not in {processes}; {INSTEAD}')
            self.sampler = VllmSampler(self.config, self.sampling, self.rollout, self.bare_base, self.ends)
        self.handed_over = False

    @property
    def kept_in(self) -> str:
        return self.config.dtype if self.lora else "float32"

    @property
    def bare_base(self) -> Any:
        """The model below the adapters, if there are any."""
        return self.bare_model.get_base_model() if self.lora else self.bare_model

    @property
    def draws_otherwise(self) -> bool:
        """Whether rollouts are drawn with other probabilities than the trainer computes: by another program, or with other rounding."""
        return self.sampler is not None or self.config.dtype == "bfloat16"

    @property
    def correction(self) -> float:
        """The cap of importance weights, where rollouts are drawn otherwise; 0 for none."""
        return self.sampling.correction if self.draws_otherwise else 0.0

    def _prepared(self, model: Any) -> Any:
        # Some published models state a temperature without do_sample, which is refused on saving.
        model.generation_config.do_sample = True
        reduced = self.sampling.computes_in(self.config) == "bfloat16" and self.kept_in == "float32"
        if reduced and self.sampling.name == "transformers":
            self.sampler = CopySampler(model, self.rollout.temperature, self.ends, self.accelerator.device)
        if self.lora:
            model = with_adapter(model, self.lora, absolute(self.config.path), self.seed)
        elif self.keep_start:
            self.start = copy.deepcopy(model).to(self.accelerator.device).requires_grad_(False).eval()
        if self.config.gradient_checkpointing:
            self.shares_prompts = False  # what is not kept cannot be shared
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.checkpointed = [without_dropout(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        return self.accelerator.prepare(model)

    def forward(self, inputs: Inputs, with_entropy: bool = False, model: Any = None) -> tuple[Tensor, Tensor | None]:
        self.model.eval()  # without dropout and the like, as it was sampled
        for layer in self.checkpointed:  # transformers checkpoints activations in training mode only
            layer.training = torch.is_grad_enabled()
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return super().forward(inputs, with_entropy, model)

    @torch.no_grad()
    def frozen(self, inputs: Inputs) -> Tensor:
        """log π [B, T] of the model as it was before training."""
        if self.lora:
            with self.bare_model.disable_adapter():
                return self.forward(inputs, model=self.bare_model)[0]
        return self.forward(inputs, model=self.start)[0]

    # Sampling by another program

    def changed(self) -> None:
        """To be called when weights have changed."""
        self.handed_over = False

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, by transformers' names, with adapters merged in."""
        base = self.bare_base
        named = merged(base) if self.lora else base.state_dict().items()
        return ((name, value.detach()) for name, value in named if name not in base.all_tied_weights_keys)

    @property
    def drawn_at_once(self) -> int:
        return sys.maxsize if isinstance(self.sampler, VllmSampler) else super().drawn_at_once  # vLLM makes its own batches

    def _draw(self, prompts: list[list[int]], max_tokens: int, share: Share | None = None) -> list[Drawn]:
        if self.sampler is None:
            return super()._draw(prompts, max_tokens, share)
        if not self.handed_over:
            self.sampler.take(self.weights())
            self.handed_over = True
        return self.sampler.draw(prompts, max_tokens, self.poll, share)

    def _trajectory(self, prompt: list[int], drawn: Drawn) -> Trajectory:
        trajectory = super()._trajectory(prompt, drawn)
        return replace(trajectory, old=[None] * len(trajectory)) if self.draws_otherwise else trajectory

    def gap(self, groups: Sequence[Group]) -> dict[str, float]:
        """How far the sampler's log-probabilities of the first rollouts are from this model's; nothing where they are not drawn otherwise.

        Raises UserError where rounding cannot explain it.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts][:COMPARED]
        if not self.draws_otherwise or not rollouts:
            return {}
        scored = torch.cat(self.score([rollout.prompt for rollout in rollouts], [rollout.completion for rollout in rollouts]))
        gap = (scored - torch.tensor([logp for rollout in rollouts for logp in rollout.behaviour])).abs().mean().item()
        if not gap <= self.sampling.largest_gap(self.config):
            raise UserError(
                f"the sampler's log-probabilities are {gap:.2f} nats from the trainer's, a mean over {len(scored)} tokens, so it does not "
                'sample from the model that is trained; set sampler.name = "transformers", or raise sampler.most_gap for mere rounding'
            )
        return {"sampler/gap": gap}

    def anchored(self, groups: list[Group]) -> list[Group]:
        """The groups, with the trainer's log-probabilities for tokens that another program sampled: for several updates on them."""
        members = [member for group in groups for member in group.trajectories]
        wanted = [place for place, member in enumerate(members) if Origin.POLICY in member.origin]
        scored = self.score([members[place].prompt for place in wanted], [members[place].completion for place in wanted])
        for place, logp in zip(wanted, scored, strict=True):
            pairs = zip(members[place].origin, logp.tolist(), strict=True)
            members[place] = replace(members[place], old=[value if origin is Origin.POLICY else None for origin, value in pairs])
        done = iter(members)
        return [replace(group, trajectories=[next(done) for _ in group.trajectories]) for group in groups]

    # Saving

    def save(self, directory: Path) -> None:
        """Writes model and tokenizer so that transformers loads them, or the adapter so that peft does."""
        if self.lora and self.lora.save == "merged":
            self.bare_base.save_pretrained(directory, state_dict=dict(self.weights()))
            self.tokenizer.save_pretrained(directory)
        else:
            self.save_state(directory)

    def save_state(self, directory: Path) -> None:
        """Writes what learns, and the tokenizer."""
        self.bare_model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def load_state(self, directory: Path) -> None:
        """Takes back what ``save_state`` wrote. Raises UserError if it is of another model."""
        self.changed()
        if self.lora:
            return load_adapter(self.bare_model, directory)
        weights = load_model(self.config.model_copy(update={"path": str(directory)}))[0].state_dict()
        try:
            missing, unexpected = self.bare_model.load_state_dict(weights, strict=False)
        except RuntimeError:  # a tensor of another size
            missing, unexpected = [], list(weights)
        if unexpected or set(missing) - set(self.bare_model.all_tied_weights_keys):
            raise UserError(
                f"{directory.parent} holds another model than model.path names; resume with the configuration that the run was started with"
            )


def without_dropout(layer: nn.Module) -> nn.Module:
    """``layer`` without the dropout that it applies itself; that of its parts depends on their own mode."""
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
    return layer
