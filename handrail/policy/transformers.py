"""A Hugging Face causal language model as the policy: sampled, scored and trained in one process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from handrail.backbones import locate
from handrail.batch import MicroBatch, by_budget, collate
from handrail.config import Config, ModelConfig
from handrail.errors import UserError
from handrail.problems import Problem
from handrail.trajectory import Origin, Trajectory


def load_model(config: ModelConfig, field: str = "model.path") -> tuple[Any, Any]:
    """(model, tokenizer) from a directory, a hub name or ``builtin:NAME``; safetensors only.

    Raises UserError, naming ``field``, where there is no such model.
    """
    path = locate(config.path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{field}: {config.path} is not a Hugging Face model directory (it has no config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="float32", use_safetensors=True, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # a damaged file can raise anything
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{field}: {config.path} cannot be loaded as a causal language model: {first_line}") from error
    if any("RewardModel" in name for name in model.config.architectures or []):
        raise UserError(f"{field}: {config.path} is a reward model, not a causal language model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{field}: the tokenizer of {config.path} has no end-of-sequence token, so no completion could end")
    return model, tokenizer


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the log-probability of every sampled token and the entropy it was drawn from, without keeping logits."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.logp: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.settle(input_ids)
        self.last = torch.log_softmax(scores.float() / self.temperature, -1)
        self.entropy.append(-(self.last.exp() * self.last.clamp(min=torch.finfo(torch.float32).min)).sum(-1))
        return scores

    def settle(self, input_ids: Tensor) -> None:
        """Reads what was drawn from the last distribution; to be called once more after the last token."""
        if self.last is not None:
            self.logp.append(self.last.gather(-1, input_ids[:, -1:]).squeeze(-1))


class TransformersPolicy:
    """Implements ``handrail.policy.Policy``. Probabilities are those of the sampling temperature throughout, or of 1 where it is 0."""

    def __init__(self, config: Config, accelerator: Accelerator, field: str = "model.path", trained: bool = True) -> None:
        self.config = config
        self.accelerator = accelerator
        model, self.tokenizer = load_model(config.model, field)
        ends = model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # A model's own generation defaults (top-k, repetition penalty) would sample from another distribution than is trained.
        self.saved_generation_config, model.generation_config = model.generation_config, GenerationConfig()
        self.model = accelerator.prepare(model) if trained else model.to(accelerator.device).requires_grad_(False)
        self.temperature = config.rollout.temperature or 1.0
        self.chat = bool(self.tokenizer.chat_template) if config.data.chat is None else config.data.chat
        if self.chat and not self.tokenizer.chat_template:
            raise UserError(f"data.chat is on, but the tokenizer of {config.model.path} has no chat template; set data.chat = false")
        self.end = self._turn_end()

    @property
    def bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def context(self) -> int | None:
        """The longest sequence the model takes, where it says so."""
        limit = getattr(self.bare_model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def encode_prompt(self, problem: Problem, plan: str | None = None) -> list[int]:
        if self.chat or not isinstance(problem.prompt, str):
            return self._encode_chat(problem, plan)
        return list(self.tokenizer.encode(self._text(problem.prompt, plan)))

    def _text(self, prompt: str, plan: str | None) -> str:
        data = self.config.data
        text = data.prompt_template.replace("{prompt}", prompt)
        if plan is None:
            return text
        parts = {"{prompt}": text, "{plan}": plan}  # in one go: either may hold the other's mark
        return re.sub(r"\{prompt\}|\{plan\}", lambda mark: parts[mark[0]], data.plan_template)

    def _encode_chat(self, problem: Problem, plan: str | None) -> list[int]:
        where = problem.where or f"problem {problem.id}"
        if not self.chat:
            raise UserError(
                f"{where}, field prompt: it is chat messages, but "
                + (
                    "data.chat is off"
                    if self.tokenizer.chat_template
                    else f"{self.config.model.path} has no chat template; give it as text"
                )
            )
        prompt = problem.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages[-1] = {**messages[-1], "content": self._text(messages[-1]["content"], plan)}
        if self.config.data.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.data.system})
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UserError(f"{where}, field prompt: the chat template refuses it: {error}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_completion(self, text: str, end: bool = True, plain: bool = False) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return [*tokens, *([self.end] if end else [])]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _turn_end(self) -> int:
        """The end token that the chat template puts behind the assistant's words; it need not be the tokenizer's."""
        if self.chat:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
            rendered = self.tokenizer.encode(self.tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
            last = next((token for token in reversed(rendered) if token in self.ends), None)
            if last is not None:
                return int(last)
        return int(self.tokenizer.eos_token_id)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]], n: int, max_tokens: int | None = None) -> list[list[Trajectory]]:
        flat = [prompt for prompt in prompts for _ in range(n)]
        size = self.config.rollout.batch_size
        limit = max_tokens or self.config.rollout.max_tokens
        drawn = [trajectory for at in range(0, len(flat), size) for trajectory in self._sample(flat[at : at + size], limit)]
        return [drawn[place * n : (place + 1) * n] for place in range(len(prompts))]

    def _sample(self, prompts: list[list[int]], max_tokens: int) -> list[Trajectory]:
        model, device = self.bare_model.eval(), self.accelerator.device
        input_ids, attention_mask, _ = collate(prompts, [[]] * len(prompts))
        recorder = Recorder(self.temperature)
        # EOS for padding: rows are cut at their first end token, and prompts are masked by length, so it cannot be mistaken.
        generation = GenerationConfig(
            do_sample=self.config.rollout.temperature > 0, temperature=self.temperature, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
            eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        output = model.generate(
            input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=generation,
            logits_processor=LogitsProcessorList([recorder]),
        )  # fmt: skip
        recorder.settle(output)
        tokens = output[:, input_ids.shape[1] :].tolist()
        logp, entropy = torch.stack(recorder.logp, 1).tolist(), torch.stack(recorder.entropy, 1).tolist()
        return [self._trajectory(*row) for row in zip(prompts, tokens, logp, entropy, strict=True)]

    def _trajectory(self, prompt: list[int], tokens: list[int], logp: list[float], entropy: list[float]) -> Trajectory:
        end = next((at + 1 for at, token in enumerate(tokens) if token in self.ends), None)
        tokens = tokens[:end]
        text = self.decode(tokens)
        return Trajectory(prompt, tokens, text, [Origin.POLICY] * len(tokens), list(logp[:end]), entropy[:end], finished=end is not None)

    def forward(self, batch: MicroBatch, with_entropy: bool = False, model: Any = None) -> tuple[Tensor, Tensor | None]:
        """(log π [B, T], entropy [B, T] or None), float32, of the batch's completion tokens, with gradient.

        ``model`` stands in for the one that synchronises gradients between processes.
        """
        width = batch.completion.shape[1]
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        # Only the completions' logits are ever computed.
        logits = (model or self.model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, logits_to_keep=width + 1,
            use_cache=False,
        ).logits[:, :-1].float() / self.temperature  # fmt: skip
        norm = logits.logsumexp(-1)
        logp = logits.gather(-1, batch.completion.unsqueeze(-1)).squeeze(-1) - norm
        if not with_entropy:
            return logp, None
        return logp, norm - (torch.softmax(logits, -1) * logits).sum(-1)

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Tensor]:
        model = self.bare_model.eval()  # processes may score different numbers of batches
        device = self.accelerator.device
        out: list[Tensor] = [torch.empty(0)] * len(prompts)
        lengths = [(len(p), len(c)) for p, c in zip(prompts, completions, strict=True)]
        for part in by_budget(lengths, self.config.train.micro_batch_tokens):
            tensors = collate([prompts[i] for i in part], [completions[i] for i in part])
            ids, mask, completion = (tensor.to(device) for tensor in tensors)
            logp, _ = self.forward(MicroBatch(ids, mask, completion, streams=None), model=model)  # type: ignore[arg-type]
            for index, row in zip(part, logp.cpu(), strict=True):
                out[index] = row[: lengths[index][1]]
        return out

    def save(self, directory: Path) -> None:
        """Writes model and tokenizer so that ``AutoModelForCausalLM.from_pretrained`` loads them."""
        model = self.bare_model
        model.generation_config, sampling = self.saved_generation_config, model.generation_config
        # Some published models state a temperature without do_sample, which is refused on saving.
        model.generation_config.do_sample = True
        model.save_pretrained(directory)
        model.generation_config = sampling
        self.tokenizer.save_pretrained(directory)
