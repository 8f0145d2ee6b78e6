"""The policy in training: its weights are updated, saved, and copied to the sampler."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from handrail._util.errors import UserError
from handrail._util.launch import Fsdp, weights_read_once
from handrail.data.config import PromptFormat
from handrail.models.batching import Inputs
from handrail.models.compiled import compile_layers, not_compiled
from handrail.models.config import LoraConfig, ModelConfig, RolloutConfig, SamplerConfig
from handrail.models.generate import Completion, CopySampler, Sampler
from handrail.models.hf import TransformersPolicy
from handrail.models.loading import absolute, load_model, savable
from handrail.models.lora import load_adapter, merge_weights, with_adapter
from handrail.models.policy import with_old_logp
from handrail.models.sharding import ShardedModel, Turns, transformers_model, whole
from handrail.models.vllm import INSTEAD, VllmSampler
from handrail.types.trajectory import Group, Trajectory

POLICY, REFERENCE = 1, 2
"""Kinds of calls in which all processes take part, see ``Turns``."""
COMPARED = 2
"""Number of completions per step whose log-probabilities are compared with the trainer's."""


class TrainablePolicy(TransformersPolicy):
    """A trainable TransformersPolicy.

    With [lora], only adapters are trained. With ``sampler.name = "vllm"``, vLLM does the sampling; if the
    sampler computes in bfloat16 but the weights are float32, a bfloat16 copy does.
    """

    def __init__(
        self,
        model: ModelConfig | str,
        rollout: RolloutConfig | None = None,
        prompts: PromptFormat | None = None,
        accelerator: Accelerator | None = None,
        micro_batch_tokens: int = 8192,
        lora: LoraConfig | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        keep_start: bool = False,
        fsdp: Fsdp | None = None,
        own_sampler: Callable[[TrainablePolicy], Sampler] | None = None,
        field: str = "model.path",
    ) -> None:
        """``seed``: for the adapters' initial weights. ``keep_start``: True to keep a copy of the initial
        model. ``fsdp``: how to shard the model over the processes, if at all. ``own_sampler`` returns what
        samples in place of ``sampler.name``.

        Raises UserError, naming ``field``, if the model cannot be loaded.
        """
        self.lora, self.sampling = lora, sampler or SamplerConfig()
        self.seed, self.keep_start, self.field = seed, keep_start, field
        self.start: Any = None
        self.checkpointed: list[nn.Module] = []
        self.sampler: Sampler | None = None
        self.fsdp = fsdp
        self.shards: ShardedModel | None = None
        self.turns: Turns | None = None
        self.own_sampler = own_sampler
        if fsdp and (model.compile if isinstance(model, ModelConfig) else False):
            raise UserError("model.compile does not work with FSDP; leave it out")
        with weights_read_once(fsdp):
            super().__init__(model, rollout, prompts, accelerator, micro_batch_tokens, field)
        if self.shards:
            self.shards.reshard()  # the loading has tried the model
        if own_sampler:
            self.sampler = own_sampler(self)
        elif self.sampling.name == "vllm":
            processes = self.accelerator.num_processes
            if processes > 1:
                raise UserError(
                    f'sampler.name is "vllm", which samples in one process, but there are {processes}; '
                    f"{INSTEAD}"
                )
            if self.sampling.tensor_parallel > 1:
                raise UserError(
                    "sampler.tensor_parallel is for samplers apart from the training; leave it out, or start "
                    "handrail train with --ray and --samplers"
                )
            self.sampler = VllmSampler(
                self.config,
                self.sampling,
                self.rollout,
                self.bare_base,
                self.renderer.ends,
                self.accelerator.device,
            )
        if self.config.compile:
            compile_layers(self.bare_model, self.config.path)
        self.sampler_is_current = False
        self.version = 0
        """Number of changes of the weights since they were loaded."""

    @property
    def param_dtype(self) -> str:
        return self.config.dtype if self.lora else "float32"

    @property
    def reads_weights(self) -> bool:
        return not (self.fsdp and self.own_sampler) or self.accelerator.is_main_process

    @property
    def bare_base(self) -> Any:
        """The model without its adapters, if it has any."""
        return self.bare_model.get_base_model() if self.lora else self.bare_model

    @property
    def sampler_differs(self) -> bool:
        """True if sampling uses other probabilities than the trainer's."""
        return (self.sampler is not None and self.sampler.differs) or self.config.dtype == "bfloat16"

    @property
    def importance_weight_cap(self) -> float:
        """Cap on importance weights; 0 (no weights) if the sampler does not differ from the trainer."""
        return self.sampling.importance_weight_cap if self.sampler_differs else 0.0

    def _prepare(self, model: Any) -> Any:
        model = savable(model)
        reduced = self.sampling.computes_in(self.config) == "bfloat16" and self.param_dtype == "float32"
        if reduced and self.sampling.name == "transformers" and not self.own_sampler:
            self.sampler = CopySampler(
                model, self.rollout.temperature, self.renderer.ends, self.accelerator.device
            )
        if self.lora:
            model = with_adapter(model, self.lora, absolute(self.config.path), self.seed)
        freeze_all_but_text(model)
        if self.config.gradient_checkpointing:
            self.layout = "padded"  # activations that are not kept cannot be shared in a cache
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        keep_start = self.keep_start and not self.lora
        if self.fsdp:
            self.layout = "padded"  # every process must call the model equally often, with every micro-batch
            device, apart = self.accelerator.device, self.own_sampler is not None
            self.shards = ShardedModel(model, self.fsdp, device, apart, keep_start and apart)
            self.turns = Turns(self.shards, self._idle) if apart else None
            self.start, prepared = self.shards.start, self.shards.trained
        else:
            prepared = self.accelerator.prepare(model)
        if keep_start and self.start is None:
            self.start = copy.deepcopy(model).requires_grad_(False).eval()
        if self.config.gradient_checkpointing:
            self.checkpointed = [
                disable_dropout(module)
                for module in prepared.modules()
                if isinstance(module, GradientCheckpointingLayer)
            ]
        return prepared

    @property
    def bare_model(self) -> Any:
        return self.shards.whole if self.shards else super().bare_model

    @property
    def apart(self) -> bool:
        """True if no process holds whole weights, because the model is in shards and sampled elsewhere."""
        return self.shards is not None and self.shards.apart

    @property
    def scorer(self) -> Any:
        return self.model if self.apart else super().scorer

    def at_hand(self) -> AbstractContextManager[None]:
        """Enclose work of the main process with ``bare_model``, in all processes at once."""
        return self.shards.at_hand() if self.shards else nullcontext()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Enclose an update, in all processes at once: a model in shards cannot sample or score meanwhile."""
        if not self.shards:
            yield
            return
        if self.shards.apart:
            yield
            self.shards.reshard()  # the model before training, which has no backward pass
            return
        self.shards.release()
        yield
        self.shards.gather()  # not after an error: the other processes may have none, and would not take part

    def forward(
        self, inputs: Inputs, with_entropy: bool = False, model: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        self.model.eval()  # no dropout, as when sampling
        for layer in self.checkpointed:  # transformers checkpoints activations in training mode only
            layer.training = torch.is_grad_enabled()
        with self.autocast():
            return super().forward(inputs, with_entropy, model)

    @torch.no_grad()
    def reference_logprobs(self, inputs: Inputs, adapted: Any = None) -> Tensor:
        """Compute log π [B, T] under the model before training.

        ``adapted``: the model with adapters, if there are any, to use without them; by default, the one that
        is updated.
        """
        if self.lora:
            adapted = adapted or self.accelerator.unwrap_model(self.model)
            with adapted.disable_adapter():
                return self.forward(inputs, model=adapted)[0]
        return self.forward(inputs, model=self.start)[0]

    def _logprobs(self, model: str) -> Callable[[Inputs], Tensor]:
        if model == "reference" and (self.start is not None or self.lora):
            return self._in_turns(REFERENCE, lambda inputs: self.reference_logprobs(inputs, self.scorer))
        return self._in_turns(POLICY, super()._logprobs(model))

    def _likeliest(self, vocabulary: int | None) -> Callable[[Inputs], Tensor]:
        return self._in_turns(POLICY, super()._likeliest(vocabulary))

    def _in_turns(self, kind: int, rows: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
        """Make ``rows``, which calls a model once, a function in which all processes take part if they
        must."""
        turns = self.turns
        return (lambda inputs: turns.take(kind, lambda: rows(inputs))) if turns else rows

    @torch.no_grad()
    def _idle(self, kind: int) -> None:
        """Call the model that another process scores with."""
        end = [[self.tokenizer.eos_token_id]]
        inputs = Inputs.of(end, end, end)
        if kind == REFERENCE:
            self.reference_logprobs(inputs, self.scorer)
        else:
            self.forward(inputs, model=self.scorer)

    @property
    def alone(self) -> bool:
        """True if the other processes wait in vain for this one, which has failed in a call of theirs too."""
        return self.turns is not None and self.turns.broken

    def join(self) -> None:
        """Call this in all processes where they meet: one that waits takes part in what others score."""
        if self.turns:
            self.turns.join()

    # Sampling with a separate engine

    def changed(self) -> None:
        """Call this right before changing weights."""
        self.sampler_is_current = False
        self.version += 1

    def weights(self, model: Any = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of ``model`` once, by transformers' names, with adapters merged in.

        ``model``: by default the one that scores. If it is in shards, all processes must take all tensors.
        """
        model = model or self.scorer
        base = model.get_base_model() if self.lora else model
        named = merge_weights(base) if self.lora else base.state_dict().items()
        tied = base.all_tied_weights_keys
        return ((name, whole(value.detach())) for name, value in named if name not in tied)

    @property
    def generation_batch(self) -> int:
        batches = self.sampler is not None and self.sampler.makes_batches
        return sys.maxsize if batches else super().generation_batch

    def _generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], max_tokens: Sequence[int]
    ) -> list[Completion]:
        if self.sampler is None:
            with not_compiled():
                return super()._generate(prompts, seeds, max_tokens)
        self.update_sampler()
        return self.sampler.generate(prompts, seeds, max_tokens, self.poll)

    def update_sampler(self) -> None:
        """Give a separate sampler the present weights, unless it has them."""
        if self.sampler is not None and not self.sampler_is_current:
            self.sampler.update_weights(self.weights())
            self.sampler_is_current = True

    def _trajectory(self, prompt: list[int], completion: Completion) -> Trajectory:
        trajectory = super()._trajectory(prompt, completion)
        if self.sampler_differs:  # unknown until ``with_old_logp`` computes it
            return trajectory.with_columns(old_logp=torch.full_like(completion.logp, math.nan))
        return trajectory

    def logprob_mismatch(self, groups: Sequence[Group]) -> dict[str, float]:
        """Mean difference between the sampler's and this model's log-probabilities of the first rollouts.

        Empty if this model samples itself. Raises UserError if the difference exceeds what rounding can
        explain.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts][:COMPARED]
        if not self.sampler_differs or not rollouts:
            return {}
        scored = torch.cat(
            self.score([each.prompt_ids for each in rollouts], [each.token_ids for each in rollouts])
        )
        sampled = torch.cat([each.column("sampling_logp") for each in rollouts])
        mismatch = (scored - sampled)[~sampled.isnan()].abs().mean().item()
        if not self.sampling.staleness and not mismatch <= self.sampling.largest_mismatch(self.config):
            raise UserError(
                f"the sampler's log-probabilities are {mismatch:.2f} nats from the trainer's, a mean over "
                f"{len(scored)} tokens, so it does not sample from the model that is trained; "
                'set sampler.name = "transformers", or raise sampler.max_mismatch for mere rounding'
            )
        return {"sampler/mismatch": mismatch}

    def with_old_logp(self, groups: list[Group]) -> list[Group]:
        """Set ``old_logp`` of the policy's tokens to the trainer's log-probabilities, where it is unknown.

        Needed for several updates on the same rollouts.
        """
        return with_old_logp(self, groups)

    # Saving

    def save(self, directory: Path) -> None:
        """Write model and tokenizer in transformers' format, or the adapter in peft's."""
        if self.lora and self.lora.save == "merged":
            weights = self.weights(self.bare_model)
            merged = {name: value.cpu() for name, value in weights}  # a GPU may lack room for all
            self.bare_base.save_pretrained(directory, state_dict=merged)
            self.tokenizer.save_pretrained(directory)
        else:
            self.save_state(directory)

    def save_state(self, directory: Path) -> None:
        """Write the trained weights and the tokenizer."""
        self.bare_model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def load_state(self, directory: Path) -> None:
        """Load, in every process, what ``save_state`` wrote. Raises UserError if it is of another model."""
        self.changed()
        load = load_adapter if self.lora else self._load_weights
        if not self.shards:
            load(self.bare_model, directory)
            return
        with self.at_hand():
            failed = None
            if self.accelerator.is_main_process:
                try:
                    load(self.bare_model, directory)
                except UserError as error:
                    failed = error
            if failed := broadcast_object_list([failed])[0]:
                raise failed
            self.shards.scatter()

    def _load_weights(self, model: Any, directory: Path) -> None:
        weights = load_model(self.config.model_copy(update={"path": str(directory)}))[0].state_dict()
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError:  # a tensor of another size
            missing, unexpected = [], list(weights)
        if unexpected or set(missing) - set(model.all_tied_weights_keys):
            raise UserError(
                f"{directory.parent} holds another model than {self.field} names; resume with the "
                "configuration that the run was started with"
            )


def freeze_all_but_text(model: Any) -> None:
    """Freeze what text never reaches, such as a vision tower: several processes wait for a gradient of every
    trained weight."""
    base = transformers_model(model)
    parts = (part for part in (base.get_decoder(), base.get_output_embeddings()) if part is not None)
    reached = {id(weight) for part in parts for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in reached:
            weight.requires_grad_(False)


def disable_dropout(layer: nn.Module) -> nn.Module:
    """Disable the dropout that ``layer`` itself applies; that of its submodules depends on their own mode."""
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
    return layer
