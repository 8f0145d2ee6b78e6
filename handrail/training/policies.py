"""Load the policies and experts that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from handrail._util.errors import UserError
from handrail._util.processes import sharding
from handrail.experts.registry import Experts, require_same_tokens
from handrail.methods.base import Method
from handrail.models.generate import Sampler
from handrail.models.hf import TransformersPolicy
from handrail.models.policy import Policy
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import Config


def load_policy(
    config: Config, accelerator: Accelerator, path: str = "", field: str = "model.path"
) -> TransformersPolicy:
    """Load the configured model, or the one at ``path``, for sampling and scoring.

    Raises UserError, naming ``field``, if it cannot be loaded.
    """
    model = config.model.model_copy(update={"path": path or config.model.path})
    return TransformersPolicy(
        model, config.rollout, config.data, accelerator, config.train.micro_batch_tokens, field
    )


def load_trainable_policy(
    config: Config,
    accelerator: Accelerator,
    keep_start: bool = False,
    own_sampler: Callable[[TrainablePolicy], Sampler] | None = None,
    field: str = "model.path",
) -> TrainablePolicy:
    """Load the configured model for training; ``keep_start`` and ``own_sampler`` as for TrainablePolicy.

    Raises UserError, naming ``field``, if it cannot be loaded.
    """
    return TrainablePolicy(
        config.model,
        config.rollout,
        config.data,
        accelerator,
        config.train.micro_batch_tokens,
        config.lora,
        config.sampler,
        config.train.seed,
        keep_start,
        sharding(config.train.fsdp),
        own_sampler,
        field,
    )


def require_trainable(config: Config, method: Method[Any], samples_elsewhere: bool) -> None:
    """Raise UserError if the run cannot train the models that the method names in ``trained``."""
    name = method.settings.name or method.name
    if unknown := method.trained - {"critic"}:
        raise UserError(f'{name} trains {min(unknown)!r}; besides the policy, only "critic" can be trained')
    elsewhere = samples_elsewhere or config.sampler.name != "transformers"
    if method.trained and (elsewhere or sharding(config.train.fsdp)):
        instead = ', or set method.judge = "policy"' if "judge" in type(method.settings).model_fields else ""
        raise UserError(
            f"{name} trains a critic beside the policy, which does not work with FSDP, vLLM or --samplers; "
            f"leave them out{instead}"
        )


def load_critic(config: Config, accelerator: Accelerator, policy: TrainablePolicy) -> TrainablePolicy:
    """Load the model that the method trains beside ``policy``.

    Raises UserError if it cannot be loaded, or reads other tokens, or fewer, than the policy.
    """
    path = config.experts.critic or config.model.path
    field = "experts.critic" if config.experts.critic else "model.path"
    changed = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    critic = load_trainable_policy(changed, accelerator, policy.keep_start, field=field)
    require_same_tokens(policy.renderer, critic.renderer, f"{field}: {path}")
    if critic.context is not None and (policy.context is None or critic.context < policy.context):
        raise UserError(
            f"{field}: the context of {path} is {critic.context}, and the policy's {policy.context}; choose "
            "a critic that can read as much"
        )
    return critic


def load_experts(config: Config, accelerator: Accelerator, policy: Policy | None = None) -> Experts:
    """Set up the experts of ``[experts]`` and ``[endpoint]``; ``policy`` is the one in training, if any."""

    def load(path: str, field: str) -> Policy:
        return load_policy(config, accelerator, path, field)

    return Experts(config.experts, config.endpoint, load, policy, accelerator.device, config.model.dtype)
