"""A process reward model as step judge, in the layout of Qwen2.5-Math-PRM or of TRL's PRMTrainer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

from handrail._util.errors import UserError
from handrail.experts.judges import Scores
from handrail.models.batching import Inputs, by_budget
from handrail.models.builtin import locate
from handrail.types.problem import Problem

SEPARATOR = "<extra_0>"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


class ChatLayout:
    """Layout of Qwen2.5-Math-PRM: the steps are the last turn of a chat.

    Each step is followed by ``<extra_0>``, the token that carries its score.
    """

    def __init__(self, tokenizer: Any, system: str = SYSTEM) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
        if self.separator in (None, tokenizer.unk_token_id):
            raise UserError(f"its tokenizer has no token {SEPARATOR}")
        if not tokenizer.chat_template:
            raise UserError("its tokenizer has no chat template")
        self._around(Problem("the trial prompt", "x", ""))

    def encode(self, problem: Problem, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode an attempt; return its tokens and the indices of those that carry the scores of its
        steps."""
        before, after = self._around(problem)
        return _chain(self.tokenizer, before, steps, [self.separator], after)

    def _around(self, problem: Problem) -> tuple[list[int], list[int]]:
        """Tokens before and after the steps."""
        prompt = problem.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            text = self.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": SEPARATOR}], tokenize=False
            )
        except Exception as error:  # a template is a program and can raise anything
            raise UserError(
                f"{problem.where or problem.id}: the process reward model's chat template refuses it: {error}"
            ) from error
        before, found, after = text.rpartition(SEPARATOR)
        if not found:
            raise UserError("its chat template leaves out the assistant's words")
        around = [self.tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
        return around[0], around[1]


class PlainLayout:
    """Layout of TRL's PRMTrainer: the prompt, then the steps, each followed by a line break with its
    score."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.separator = tokenizer.encode("\n", add_special_tokens=False)
        if not self.separator:
            raise UserError("its tokenizer drops line breaks, which carry the scores in this layout")

    def encode(self, problem: Problem, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        prompt = problem.prompt
        text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        before = start + self.tokenizer.encode(text, add_special_tokens=False)
        return _chain(self.tokenizer, before, steps, self.separator, [])


def _chain(
    tokenizer: Any, before: list[int], steps: Sequence[str], separator: list[int], after: list[int]
) -> tuple[list[int], list[int]]:
    """Chain tokens around and between steps.

    Steps come from a model, so special tokens written in them are encoded as text, or dropped if that is
    impossible.
    """
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids(SEPARATOR)} - {
        tokenizer.unk_token_id
    }
    tokens, ends = list(before), []
    for step in steps:
        words = tokenizer.encode(step.strip(), add_special_tokens=False, split_special_tokens=True)
        tokens += [token for token in words if token not in special] + separator
        ends.append(len(tokens) - 1)
    return tokens + after, ends


class PrmJudge:
    """A Hugging Face process reward model, from a directory or ``builtin:NAME``; implements ``StepJudge``.

    Only safetensors are read, and no code from the checkpoint is run: the body is transformers' own model of
    that type, the head comes from the weights ``score.*``. Attention is causal, as in the released code.
    """

    def __init__(
        self, path: str, device: str | torch.device = "cpu", dtype: str = "float32", batch_tokens: int = 8192
    ) -> None:
        """``batch_tokens``: maximum number of tokens per forward pass, padding included."""
        self.device, self.batch_tokens = torch.device(device), batch_tokens
        directory = Path(locate(path, "experts.prm"))
        if not (directory / "config.json").is_file():
            raise UserError(
                f"experts.prm: {path} is not a Hugging Face model directory (it has no config.json)"
            )
        try:
            # AutoTokenizer would load any tokenizer as Qwen's, because of the model's type.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            self.model, report = AutoModel.from_pretrained(
                directory,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            self.head = _head(directory, self.model.config)
            if report["missing_keys"]:
                raise UserError(f"it lacks the weights {min(report['missing_keys'])}")
            self.layout = (
                ChatLayout(tokenizer) if isinstance(self.head, nn.Sequential) else PlainLayout(tokenizer)
            )
            self._encode(Problem("the trial prompt", "x", ""), ["x"])
        except Exception as error:  # a damaged file can raise anything
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"experts.prm: {path} cannot be used as a process reward model: {first_line}"
            ) from error
        self.model.to(self.device).eval()
        self.head.to(self.device, self.model.dtype)
        self.context: int | None = getattr(self.model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        encoded = [self._encode(problem, steps) if steps else ([], []) for problem, steps in attempts]
        out: list[Scores | None] = [
            [] if len(tokens) <= (self.context or math.inf) else None for tokens, _ in encoded
        ]
        todo = [index for index, (_, ends) in enumerate(encoded) if ends and out[index] is not None]
        for part in by_budget(
            [()] * len(todo), [len(encoded[index][0]) for index in todo], self.batch_tokens, "padded"
        ):
            indices = [todo[place] for place in part]
            for index, scores in zip(
                indices, self._score([encoded[index] for index in indices]), strict=True
            ):
                out[index] = [score if math.isfinite(score) else None for score in scores.tolist()]
        return out

    def _encode(self, problem: Problem, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode an attempt with the layout. Raises UserError if a token has no embedding."""
        tokens, ends = self.layout.encode(problem, steps)
        embeddings = len(self.model.get_input_embeddings().weight)
        if max(tokens) >= embeddings:
            token = self.layout.tokenizer.convert_ids_to_tokens(max(tokens))
            raise UserError(
                f"{problem.where or problem.id}: the token {token!r} has the id {max(tokens)}, but the "
                f"process reward model has embeddings for {embeddings} tokens only; use the tokenizer that "
                "belongs to it"
            )
        return tokens, ends

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        inputs = Inputs.of([()] * len(rows), [tokens for tokens, _ in rows]).to(self.device)
        hidden = self.model(
            input_ids=inputs.completion, attention_mask=inputs.completion_mask, use_cache=False
        ).last_hidden_state
        return [
            self.head(states[ends]).float().softmax(-1)[:, 1]
            for states, (_, ends) in zip(hidden, rows, strict=True)
        ]


def _head(directory: Path, config: Any) -> nn.Module:
    """Load the head: two layers (``score.0``, ``score.2``), or the single layer of a token classifier
    (``score``)."""
    index = directory / "model.safetensors.index.json"
    files = (
        json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if index.is_file()
        else {"score.": "model.safetensors"}
    )
    weights: dict[str, Tensor] = {}
    for file in {file for name, file in files.items() if name.startswith("score.")}:
        with safe_open(directory / file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys() if name.startswith("score.")}  # noqa: SIM118
    width, classifies = config.hidden_size, "ForTokenClassification" in str(config.architectures)
    head: nn.Module = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    if "score.0.weight" not in weights and classifies:
        head = nn.Linear(width, 2, bias="score.bias" in weights)
    expected = {f"score.{name}": value.shape for name, value in head.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != expected:
        raise UserError(
            "it has no head of two classes: neither score.0 and score.2, nor a token classifier's score"
        )
    head.load_state_dict({name.removeprefix("score."): value for name, value in weights.items()})
    return head
