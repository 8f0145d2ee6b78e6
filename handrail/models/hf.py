"""A Hugging Face causal language model as a policy: it samples, and it scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from handrail._util.memory import enough_memory
from handrail._util.processes import dealt_back
from handrail.data.config import PromptFormat
from handrail.models.attention import share_on_cpu
from handrail.models.batching import Inputs, by_budget
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.models.generate import Drawn, Share, decode, positions
from handrail.models.loading import load_model
from handrail.models.renderer import Renderer
from handrail.types import Origin, Problem, Trajectory

log = logging.getLogger("handrail")


def can_share_prompts(model: Any) -> bool:
    """Whether completions can be read behind a prompt that was read before: attention can, a recurrent state goes on by one token only."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


class TransformersPolicy:
    """Implements ``handrail.models.Policy``. Probabilities are those of the sampling temperature throughout, or of 1 where it is 0."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig | None = None,
        prompts: PromptFormat | None = None,
        accelerator: Accelerator | None = None,
        micro_batch_tokens: int = 8192,
        field: str = "model.path",
    ) -> None:
        """``micro_batch_tokens``: most tokens of one forward pass, padding included.

        Raises UserError, naming ``field``, if the model cannot be loaded.
        """
        self.config, self.rollout = model, rollout or RolloutConfig()
        self.accelerator = accelerator or Accelerator(cpu=model.device == "cpu")
        self.micro_batch_tokens = micro_batch_tokens
        self.poll: Callable[[], None] = lambda: None
        """Called between the tokens of what is sampled; what it raises ends the sampling."""
        loaded, self.tokenizer = load_model(model, field, self.kept_in)
        ends = loaded.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        embeddings = len(loaded.get_input_embeddings().weight)
        self.renderer = Renderer(self.tokenizer, prompts or PromptFormat(), model.path, embeddings, ends, field)
        self.end, self.ends = self.renderer.end, self.renderer.ends
        if self.renderer.warning:
            log.warning("%s", self.renderer.warning)
        if self.accelerator.device.type == "cpu" and model.attention == "auto":
            share_on_cpu(loaded)
        self.shares_prompts = can_share_prompts(loaded)
        with enough_memory("load"):
            self.model = self._prepared(loaded)
        self.temperature = self.rollout.temperature or 1.0

    @property
    def kept_in(self) -> str:
        """The precision of the weights."""
        return self.config.dtype

    def _prepared(self, model: Any) -> Any:
        return model.to(self.accelerator.device).requires_grad_(False)

    @property
    def bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def context(self) -> int | None:
        limit = getattr(self.bare_model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def encode_prompt(self, problem: Problem, plan: str | None = None) -> list[int]:
        return self.renderer.prompt(problem, plan)

    def encode_completion(self, text: str, end: bool = True, plain: bool = False) -> list[int]:
        return self.renderer.completion(text, end, plain)

    def encode_reference(self, problem: Problem, text: str) -> list[int]:
        return self.renderer.reference(problem, text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.renderer.text(tokens)

    @property
    def drawn_at_once(self) -> int:
        return self.rollout.batch_size

    def sample(self, prompts: Sequence[list[int]], n: int, max_tokens: int | None = None) -> list[list[Trajectory]]:
        rollout = self.rollout
        flat = [prompt for prompt in prompts for _ in range(n)]
        drawn: list[Trajectory] = []
        for at in range(0, len(flat), self.drawn_at_once):
            part = flat[at : at + self.drawn_at_once]
            drawn += map(self._trajectory, part, self._draw(part, max_tokens or rollout.max_tokens))
        return [drawn[place * n : (place + 1) * n] for place in range(len(prompts))]

    def sample_together(self, prompts: Sequence[list[int]], n: int) -> list[list[Trajectory]]:
        processes, rank, device = self.accelerator.num_processes, self.accelerator.process_index, self.accelerator.device
        if processes == 1:
            return self.sample(prompts, n)
        flat = [prompt for prompt in prompts for _ in range(n)]
        drawn: list[Trajectory] = []
        for at in range(0, len(flat), self.drawn_at_once):
            part = flat[at : at + self.drawn_at_once]
            share = Share(len(part), range(rank, len(part), processes))
            mine = part[rank::processes]
            own = list(map(self._trajectory, mine, self._draw(mine, self.rollout.max_tokens, share))) if mine else []
            everybodys = gather_object([(share.taken, own)])
            share.catch_up(max(taken for taken, _ in everybodys), device)
            drawn += dealt_back([each for _, each in everybodys])
        return [drawn[place * n : (place + 1) * n] for place in range(len(prompts))]

    def _draw(self, prompts: list[list[int]], max_tokens: int, share: Share | None = None) -> list[Drawn]:
        return decode(self.bare_model.eval(), prompts, max_tokens, self.rollout.temperature, self.ends, self.poll, share)

    def _trajectory(self, prompt: list[int], drawn: Drawn) -> Trajectory:
        origin = [Origin.POLICY] * len(drawn.tokens)
        text = self.decode(drawn.tokens)
        return Trajectory(prompt, drawn.tokens, text, origin, list(drawn.logp), drawn.entropy, finished=drawn.finished)

    def forward(self, inputs: Inputs, with_entropy: bool = False, model: Any = None) -> tuple[Tensor, Tensor | None]:
        """(log π [B, T], entropy [B, T] or None), float32, of the completions' tokens, with gradient.

        ``model`` stands in for the one that synchronises gradients between processes.
        """
        pieces, at, found = self._logits(inputs, model or self.model), 0, []
        for logits in pieces:
            found.append(self._log_probs(logits, inputs.completion[:, at : at + logits.shape[1]], with_entropy))
            at += logits.shape[1]
        logp = torch.cat([piece[0] for piece in found], 1)
        return logp, torch.cat([piece[1] for piece in found], 1) if with_entropy else None

    def _logits(self, inputs: Inputs, model: Any) -> list[Tensor]:
        """Those that predict the completions' tokens, [B, T, V] in pieces of T. Only these are ever computed."""
        mask, width = inputs.whole_mask, inputs.completion.shape[1]
        if width == 1 or not (self.shares_prompts and inputs.share_prompts):
            out = model(
                input_ids=inputs.whole, attention_mask=mask, position_ids=positions(mask), logits_to_keep=width + 1, use_cache=False
            )
            return [out.logits[:, :-1]]
        cache = DynamicCache(config=self.bare_model.config.get_text_config(decoder=True))
        # Through the bare model: the one that synchronises must be called as often in every process.
        first = self.bare_model(
            input_ids=inputs.prompt, attention_mask=inputs.prompt_mask, position_ids=positions(inputs.prompt_mask),
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[inputs.prompt_of]  # fmt: skip
        cache.reorder_cache(inputs.prompt_of)
        rest = model(
            input_ids=inputs.completion[:, :-1], attention_mask=mask[:, :-1],
            position_ids=positions(mask)[:, inputs.prompt.shape[1] : -1], past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
        return [first, rest]

    def _log_probs(self, logits: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        norm = logits.logsumexp(-1)
        logp = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - norm
        return logp, norm - (torch.softmax(logits, -1) * logits).sum(-1) if with_entropy else logp

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Tensor]:
        model = self.bare_model.eval()  # processes may score different numbers of batches
        out: list[Tensor] = [torch.empty(0)] * len(prompts)
        lengths = list(map(len, completions))
        for part in by_budget(prompts, lengths, self.micro_batch_tokens, self.shares_prompts):
            inputs = Inputs.of([prompts[i] for i in part], [completions[i] for i in part]).to(self.accelerator.device)
            logp, _ = self.forward(inputs, model=model)
            for index, row in zip(part, logp.cpu(), strict=True):
                out[index] = row[: lengths[index]]
        return out
