"""What ``accelerate launch`` asks for, in environment variables; what cannot be honoured is refused."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from handrail._util.errors import UserError

OFF = ("", "no", "false", "0", "none")
USE_FSDP = "ACCELERATE_USE_FSDP"
LOAD_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables of torchrun and of the MPI launchers, one of which tells a process its number."""

SHARD = "to shard the model, use FSDP2 (--use_fsdp --fsdp_version 2)"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_USE_DEEPSPEED": (OFF, f"DeepSpeed is not supported; {SHARD}"),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, f"Megatron-LM is not supported; {SHARD}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        OFF,
        "a parallelism_config is not supported (tensor, context and sequence parallelism, replicas of "
        "shards); leave it out, and FSDP2 shards over all processes",
    ),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": (
        OFF,
        "SageMaker's own data parallelism is not supported; start with torchrun",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (
        OFF,
        "compiling the model (dynamo_backend) is not supported; set dynamo_backend to no",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        (*OFF, "1"),
        "gradient_accumulation_steps is not supported; every update accumulates all of its micro-batches, "
        "whose size is train.micro_batch_tokens",
    ),
}
"""Variable -> the values that change nothing, and the sentence for any other value."""
REFUSED_WITH_FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "FSDP of version 1 is not supported; set fsdp_version to 2"),
    "FSDP_OFFLOAD_PARAMS": (OFF, "fsdp_offload_params is not supported; set it to false"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("", "transformer_based_wrap", "no_wrap"),
        "fsdp_auto_wrap_policy can only be TRANSFORMER_BASED_WRAP or NO_WRAP",
    ),
    "FSDP_SHARDING_STRATEGY": (
        ("", "full_shard", "1"),
        "fsdp_sharding_strategy belongs to version 1; leave it out, and set fsdp_reshard_after_forward",
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("", "true", "false"),
        "fsdp_reshard_after_forward can only be true or false",
    ),
    "FSDP_STATE_DICT_TYPE": (
        ("", "sharded_state_dict"),
        "fsdp_state_dict_type can only be SHARDED_STATE_DICT; checkpoints hold the weights whole in any case",
    ),
    "FSDP_FORWARD_PREFETCH": (OFF, "fsdp_forward_prefetch belongs to version 1; set it to false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        OFF,
        "fsdp_activation_checkpointing is not supported; set model.gradient_checkpointing = true instead",
    ),
    "FSDP_IGNORED_MODULES": (OFF, "fsdp_ignored_modules is not supported; leave it out"),
}


@dataclass(frozen=True)
class Fsdp:
    """Settings of FSDP2. ``layers``: class names of the layers that are gathered one at a time; by default,
    those that transformers names; with none, the model is gathered at once."""

    layers: tuple[str, ...] | None = None
    reshard_after_forward: bool = True
    load_once: bool = True  # only the first process of each host reads the weights from disk


def require_precision(environment: Mapping[str, str], dtype: str) -> None:
    """Raise UserError if ``accelerate launch`` asks for another number type than ``model.dtype``."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if dtype == "bfloat16" else "no"):
        raise UserError(
            f"accelerate launch: mixed_precision is {precision}, but model.dtype is {dtype}; leave "
            "mixed_precision out, because model.dtype decides"
        )


def read(environment: Mapping[str, str]) -> Fsdp | None:
    """Return the settings of FSDP2, or None if it is not asked for.

    Raises UserError for what cannot be honoured.
    """
    refuse(environment, REFUSED)
    # Without GPUs, accelerate launch starts several processes only as "multi-GPU", or through MPI.
    lone = not any(name in environment for name in RANKS)
    if lone and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch has started one process in place of several, as it does without GPUs; add "
            "--multi_gpu, which starts them on the CPU too, or use torchrun"
        )
    if environment.get(USE_FSDP, "").lower() in OFF:
        return None
    refuse({"FSDP_VERSION": "1", **environment}, REFUSED_WITH_FSDP)
    names = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    layers = tuple(name.strip() for name in names.split(",")) if names else None
    return Fsdp(
        () if environment.get("FSDP_AUTO_WRAP_POLICY", "").lower() == "no_wrap" else layers,
        environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
        environment.get(LOAD_ONCE, "true").lower() not in OFF,
    )


def refuse(environment: Mapping[str, str], table: Mapping[str, tuple[Collection[str], str]]) -> None:
    """Raise UserError if a variable has a value that ``table`` does not list."""
    for name, (harmless, sentence) in table.items():
        if environment.get(name, "").lower() not in harmless:
            raise UserError(f"accelerate launch: {sentence}")


@cache
def launched() -> Fsdp | None:
    """``read`` this process's environment, once, and take FSDP out of it.

    Accelerate would shard as well, on a GPU, and transformers would load no other model's weights.
    """
    asked = read(os.environ)
    os.environ.pop(USE_FSDP, None)
    return asked


@contextmanager
def weights_read_once(fsdp: Fsdp | None) -> Iterator[None]:
    """Let transformers read weights in the first process of each host only; all others get zeros."""
    before = {name: os.environ.get(name) for name in (USE_FSDP, LOAD_ONCE)}
    if fsdp and fsdp.load_once:
        os.environ |= {USE_FSDP: "true", LOAD_ONCE: "true"}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
