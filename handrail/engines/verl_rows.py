"""Samples as the rows that verl's workers read, and the loss that these compute on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.utils.padding import no_padding_2_padding

from handrail.methods import build
from handrail.methods.base import Method
from handrail.methods.batch import Sample, TokenBatch, token_batch
from handrail.methods.losses import token_loss
from handrail.models.config import RolloutConfig
from handrail.types.trajectory import Author, Trajectory

OURS = "handrail_"
"""Prefix of the fields with a TokenBatch's columns; verl itself reads none of them."""


def nest(rows: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """Nested tensor of rows of any lengths."""
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


def plain_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]) -> dict[str, Tensor]:
    """The fields that verl computes log-probabilities from."""
    whole = [
        torch.cat([torch.tensor(prompt), completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    mask = nest([torch.ones_like(completion) for completion in completions])
    return {
        "prompts": nest(prompts),
        "responses": nest(completions),
        "input_ids": nest(whole),
        "position_ids": nest([torch.arange(len(row)) for row in whole]),
        "response_mask": mask,
        "loss_mask": mask,
    }


def arrange(live: Sequence[Sample], processes: int, size: int, end: int) -> list[Sample]:
    """Order samples so that verl's equal split gives every process rows of similar lengths.

    Adds samples without credit, of the token ``end``, up to a multiple of ``size``.
    """
    nothing = Sample(Trajectory.by(Author.REFERENCE, [end], [end]))
    rows = [nothing] * (-len(live) % size)
    rows += sorted(live, key=lambda each: len(each.trajectory.prompt_ids) + len(each.trajectory))
    return [row for process in range(processes) for row in rows[process::processes]]


def training_rows(samples: Sequence[Sample], **settings: Any) -> TensorDict:
    """Rows to train on; ``settings``: what verl's workers want to know of the update."""
    members = [sample.trajectory for sample in samples]
    rows = plain_rows([each.prompt_ids for each in members], [each.token_ids for each in members])
    batches = [token_batch([sample]) for sample in samples]
    for name in sorted({name for batch in batches for name in batch.columns}):
        rows[f"{OURS}{name}"] = nest([batch[name][0] for batch in batches])
    for name in ("mask", "author", "entropy_coef", "kl_coef"):
        rows[f"{OURS}{name}"] = nest([getattr(batch, name)[0] for batch in batches])
    return get_tensordict(rows, settings)


def columns_of(data: TensorDict) -> TokenBatch:
    """Undo ``training_rows`` for a micro-batch."""
    columns = {
        name.removeprefix(OURS): torch.nested.to_padded_tensor(data[name], 0)
        for name in data.keys()  # noqa: SIM118  # iterating over a TensorDict gives its rows
        if name.startswith(OURS)
    }
    own = {name: columns.pop(name) for name in ("mask", "author", "entropy_coef", "kl_coef")}
    return TokenBatch(columns=columns, **own)


def describe(method: Method[Any]) -> str:
    """Return, as JSON, all that the method's surrogate depends on; ``rebuild`` reads it in any directory."""
    settings = method.settings.model_dump(mode="json", exclude={"terms"}, exclude_unset=True)
    where, colon, name = (method.settings.name or method.name).rpartition(":")
    where = str(Path(where).absolute()) if where.endswith(".py") else where
    settings["name"] = f"{where}{colon}{name}"
    return json.dumps([settings, method.group_size, method.max_tokens])


@cache
def rebuild(described: str) -> Method[Any]:
    """Build a method, without its terms, from what ``describe`` returned."""
    settings, group_size, max_tokens = json.loads(described)
    return build(settings, RolloutConfig(group_size=group_size, max_tokens=max_tokens))


def loss(
    model_output: Mapping[str, Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    method: str,
    importance_weight_cap: float,
) -> tuple[Tensor, dict[str, float]]:
    """``token_loss`` in the form of verl's own losses.

    ``method``: as ``describe`` returns it. A worker builds the method itself, because a method from a file of
    one's own cannot be sent to it.
    """
    built, batch = rebuild(method), columns_of(data)
    logp = no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy")
    metrics = {}
    if entropy is not None:
        entropy = no_padding_2_padding(entropy, data)
        own = (batch.author == Author.POLICY) * batch.mask
        metrics["entropy"] = float((entropy.detach() * own).sum() / own.sum().clamp(min=1))
    reference = batch.columns.pop("reference_logp", None)
    value = token_loss(
        built, logp, batch, entropy if built.entropy_bonus else None, reference, importance_weight_cap
    )
    # verl averages gradients over processes, but sums them over micro-batches.
    return value * data["dp_size"], metrics
