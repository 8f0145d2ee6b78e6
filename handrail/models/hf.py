"""A Hugging Face causal language model as a policy that samples and scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from handrail._util.errors import UserError
from handrail._util.memory import enough_memory
from handrail.data.config import PromptFormat
from handrail.models import attention, packing
from handrail.models.attention import use_ours
from handrail.models.batching import Inputs, Layout, by_budget
from handrail.models.cached import positions
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.models.generate import Completion, generate
from handrail.models.head import is_last, log_probs, skipped
from handrail.models.loading import load_model
from handrail.models.packing import Packed, can_pack
from handrail.models.policy import limits_of
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Trajectory

log = logging.getLogger("handrail")


def can_share_prompts(model: Any) -> bool:
    """True if the model can read completions after a cached prompt.

    Attention can; a recurrent state can only advance by one token at a time.
    """
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def load_with_renderer(
    config: ModelConfig,
    prompts: PromptFormat,
    field: str = "model.path",
    dtype: str = "float32",
    empty: bool = False,
) -> tuple[Any, Renderer]:
    """Load (model, renderer), on the CPU; ``empty`` as for ``load_model``.

    Raises UserError, naming ``field``, if the model or its chat template cannot be used.
    """
    model, tokenizer = load_model(config, field, dtype, empty)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    embeddings = len(model.get_input_embeddings().weight)
    return model, Renderer(tokenizer, prompts, config.path, embeddings, ends, field)


class TransformersPolicy:
    """Implementation of ``Policy``.

    All probabilities are at the sampling temperature, or at 1 if that is 0.
    """

    def __init__(
        self,
        model: ModelConfig | str,
        rollout: RolloutConfig | None = None,
        prompts: PromptFormat | None = None,
        accelerator: Accelerator | None = None,
        micro_batch_tokens: int = 8192,
        field: str = "model.path",
    ) -> None:
        """``micro_batch_tokens``: maximum number of tokens per forward pass, padding included.

        Raises UserError, naming ``field``, if the model cannot be loaded.
        """
        model = ModelConfig(path=model) if isinstance(model, str) else model
        self.config, self.rollout = model, rollout or RolloutConfig()
        self.accelerator = accelerator or Accelerator(cpu=model.device == "cpu")
        self.micro_batch_tokens = micro_batch_tokens
        self.poll: Callable[[], None] = lambda: None
        """Called before every sampled token; an exception that it raises ends the sampling."""
        prompts = prompts or PromptFormat()
        loaded, self.renderer = load_with_renderer(
            model, prompts, field, self.param_dtype, not self.reads_weights
        )
        self.tokenizer = self.renderer.tokenizer
        if self.renderer.warning:
            log.warning("%s", self.renderer.warning)
        if model.attention == "auto":
            use_ours(loaded)
        self.layout: Layout = "shared" if can_share_prompts(loaded) else "padded"
        with enough_memory("load"):
            self.model = self._prepare(loaded)
            with self.autocast():  # on its device, because some attention kernels exist there only
                self.head_is_last = is_last(self.scorer.eval())
                if loaded.config._attn_implementation == attention.NAME and can_pack(self.scorer):
                    self.layout = "packed"
        self.temperature = self.rollout.temperature or 1.0

    @property
    def param_dtype(self) -> str:
        """Number type of the weights."""
        return self.config.dtype

    @property
    def reads_weights(self) -> bool:
        """True if this process loads the weights, and does not get them from another one."""
        return True

    def autocast(self) -> torch.autocast:
        """Compute in ``model.dtype``, whatever the number type of the weights."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _prepare(self, model: Any) -> Any:
        return model.to(self.accelerator.device).requires_grad_(False)

    @property
    def bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def scorer(self) -> Any:
        """The model that scores; processes may score different numbers of batches."""
        return self.bare_model

    @property
    def context(self) -> int | None:
        limit = getattr(self.bare_model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def max_tokens(self) -> int:
        return self.rollout.max_tokens

    @property
    def generation_batch(self) -> int:
        """Maximum number of sequences to generate at once."""
        return self.rollout.batch_size

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        limits = limits_of(self, prompts, max_tokens)
        return list(map(self._trajectory, prompts, self.complete(prompts, seeds, limits)))

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], max_tokens: Sequence[int]
    ) -> list[Completion]:
        """Sample one completion per prompt, as tokens."""
        out: list[Completion] = []
        for at in range(0, len(prompts), self.generation_batch):
            part = slice(at, at + self.generation_batch)
            out += self._generate(prompts[part], seeds[part], max_tokens[part])
        return out

    def _generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], max_tokens: Sequence[int]
    ) -> list[Completion]:
        model, temperature = self.bare_model.eval(), self.rollout.temperature
        return generate(model, prompts, seeds, max_tokens, temperature, self.renderer.ends, self.poll)

    def _trajectory(self, prompt: list[int], completion: Completion) -> Trajectory:
        tokens, logp = completion.tokens, completion.logp
        columns = {"sampling_logp": logp, "old_logp": logp, "entropy": completion.entropy}
        text = self.renderer.text(tokens.tolist())
        return Trajectory(
            prompt, tokens, torch.full_like(tokens, Author.POLICY), columns, text, completion.finished
        )

    def forward(
        self, inputs: Inputs, with_entropy: bool = False, model: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log π [B, T] of the targets and the entropy ([B, T] or None), float32, with gradient.

        Both are on the model's device; ``inputs`` are on the CPU, where they are packed. ``model``
        replaces the wrapped model, which synchronizes gradients between processes.
        """
        hidden, head, places = self._hidden(inputs, model or self.model)
        targets = inputs.targets.to(hidden.device).view(-1, 1)[places]
        logp, entropy = log_probs(hidden, head, targets, self.temperature, with_entropy, self.config.compile)
        shape = inputs.completion.shape
        spread = None if entropy is None else unpack(entropy, places, shape)
        return unpack(logp[:, 0], places, shape), spread

    def _hidden(self, inputs: Inputs, model: Any) -> tuple[Tensor, nn.Module, Tensor]:
        """Return what the output layer reads before each completion token, [N, D], that layer, and the place
        of each of the N tokens among the completions' [B·T]."""
        device, head = self.accelerator.device, self.accelerator.unwrap_model(model).get_output_embeddings()
        with skipped(head) if self.head_is_last else nullcontext():
            if self.layout == "packed":
                packed = Packed.of(inputs).to(device)
                hidden, places = packing.forward(model, packed), packed.completion
            else:
                hidden = self._outputs(inputs.to(device), model).flatten(0, 1)
                places = torch.arange(inputs.completion.numel(), device=device)
        return hidden, head if self.head_is_last else nn.Identity(), places

    def _outputs(self, inputs: Inputs, model: Any) -> Tensor:
        """Return what the model puts out for the token before each completion token, [B, T, V]."""
        mask, width = inputs.whole_mask, inputs.completion.shape[1]
        if width == 1 or not (self.layout == "shared" and inputs.share_prompts):
            out = model(
                input_ids=inputs.whole,
                attention_mask=mask,
                position_ids=positions(mask),
                logits_to_keep=width + 1,
                use_cache=False,
            )
            return torch.as_tensor(out.logits[:, :-1])
        bare = self.accelerator.unwrap_model(model)
        cache = DynamicCache(config=bare.config.get_text_config(decoder=True))
        # The bare model, because every process must call the wrapped (synchronizing) one equally often.
        first = bare(
            input_ids=inputs.prompt,
            attention_mask=inputs.prompt_mask,
            position_ids=positions(inputs.prompt_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[inputs.prompt_of]
        cache.reorder_cache(inputs.prompt_of)
        rest = model(
            input_ids=inputs.completion[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions(mask)[:, inputs.prompt.shape[1] : -1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        return torch.cat([first, rest], 1)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        return self._score(prompts, completions, self._logprobs(model), targets)

    def _logprobs(self, model: str) -> Callable[[Inputs], Tensor]:
        """Return the function that computes log π [B, T] under ``model``, see ``score``."""
        if model != "policy":
            raise UserError(
                f"there is no model {model!r} to score with; declare it in the models of the method or the "
                "term"
            )
        scorer = self.scorer.eval()
        return lambda inputs: self.forward(inputs, model=scorer)[0]

    @torch.no_grad()
    def top_tokens(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        vocabulary: int | None = None,
    ) -> list[Tensor]:
        if model != "policy":
            raise UserError(f"there are no likeliest tokens of {model!r}; ask the policy or the teacher")
        return self._score(prompts, completions, self._likeliest(vocabulary))

    def _likeliest(self, vocabulary: int | None) -> Callable[[Inputs], Tensor]:
        """Return the function that finds the likeliest tokens [B, T], see ``top_tokens``."""
        scorer = self.scorer.eval()

        def likeliest(inputs: Inputs) -> Tensor:
            hidden, head, places = self._hidden(inputs, scorer)
            top = [head(rows)[:, :vocabulary].argmax(-1) for rows in torch.split(hidden, 1024)]
            return unpack(torch.cat(top), places, inputs.completion.shape)

        return likeliest

    def _score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        rows: Callable[[Inputs], Tensor],
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute ``rows``, a value for each token such as its log-probability, in micro-batches."""
        targets = completions if targets is None else targets
        out: list[Tensor] = [torch.empty(0)] * len(prompts)
        lengths = list(map(len, completions))
        for part in by_budget(prompts, lengths, self.micro_batch_tokens, self.layout):
            inputs = Inputs.of(
                [prompts[i] for i in part], [completions[i] for i in part], [targets[i] for i in part]
            )
            for index, row in zip(part, rows(inputs).cpu(), strict=True):
                out[index] = row[: lengths[index]].clone()
        return out


def unpack(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Put values [N] at ``places`` [N] of a flattened tensor of ``shape``, zeros elsewhere."""
    return values.new_zeros(shape.numel()).scatter(0, places, values).view(shape)
