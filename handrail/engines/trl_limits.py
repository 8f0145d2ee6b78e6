"""What the TRL adapter was tested with, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import trl
from trl import GRPOTrainer

from handrail._util.errors import UserError
from handrail.engines.hosted import checksum
from handrail.methods.base import Method

TESTED = "1.16"
SEAMS = {
    "__init__": "18f01b7a46c9",
    "_calculate_rewards": "736ae29b0838",
    "_compute_loss": "80295546bbdb",
    "_generate": "2a27fdf8f5e6",
    "_generate_and_score_completions": "1fa48922792d",
    "_generate_single_turn": "e0f02e4fc094",
    "_get_per_token_logps_and_entropies": "ea73c3909275",
    "_load_optimizer_and_scheduler": "5c1772becdfd",
    "_prepare_inputs": "f824e7fb0714",
    "_save_checkpoint": "ec91bde12364",
}
"""What the adapter overrides or calls, with the checksum of its source in the tested version."""

OBJECTIVE = {
    "beta": "kl",
    "delta": "",
    "entropy_coef": "entropy_bonus",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "importance_sampling_level": "ratio",
    "loss_type": "loss_normalizer",
    "multi_objective_aggregation": "",
    "off_policy_mask_threshold": "",
    "scale_rewards": "normalize_std",
    "top_entropy_quantile": "",
    "use_adaptive_entropy": "",
    "vllm_importance_sampling_clip_min": "",
}
"""Settings of TRL's objective, and the method's setting that replaces each, if any."""


def require_tested(version: str = trl.__version__) -> None:
    """Raise UserError, naming what has changed, unless this is the version that was tested."""
    changed = [name for name, known in SEAMS.items() if checksum(getattr(GRPOTrainer, name, None)) != known]
    if changed or version.split(".")[:2] != TESTED.split("."):
        what = f"changed {', '.join(changed)}" if changed else "not been tested"
        raise UserError(
            f"handrail.engines.trl builds on trl {TESTED}, and in trl {version} GRPOTrainer has {what}; "
            f'pip install "trl=={TESTED}.*"'
        )


def require_no_terms(terms: Sequence[Any]) -> None:
    """Raise UserError if there are terms beside a method that is an object."""
    if terms:
        raise UserError("terms: the method is an object, which has its own terms; give them to it")


def require_possible(method: Method[Any], args: Any, named: dict[str, Any]) -> None:
    """Raise UserError if the trainer's arguments ask for what a guided method cannot do inside TRL."""
    name = method.settings.name or method.name
    if method.needs_rollback:
        raise UserError(
            f"{name} goes back to earlier checkpoints, which TRL cannot; use npo, or handrail train"
        )
    if method.trained:
        raise UserError(
            f'{name} trains a critic beside the policy, which TRL cannot; set judge = "policy", or use '
            "handrail train"
        )
    require_no_objective(name, method, args)
    for what in ("tools", "rollout_func", "environment_factory"):
        if named.get(what):
            raise UserError(
                f"{what}: {name} reads and writes single-turn completions, and this would make them several "
                "turns; leave it out"
            )
    if args.mask_truncated_completions:
        raise UserError(
            f"GRPOConfig.mask_truncated_completions: {name} decides what a truncated completion is worth; "
            "leave it out"
        )
    if args.remove_unused_columns:
        raise UserError(
            f"GRPOConfig.remove_unused_columns would remove the columns that {name} learns from; leave it out"
        )
    update, generation = args.gradient_accumulation_steps, args.steps_per_generation
    if update % generation and generation % update:
        raise UserError(
            f"GRPOConfig: an update has {update} micro-batches (gradient_accumulation_steps) and a "
            f"generation {generation} (steps_per_generation), so some updates would have parts of several "
            "generations; make one a multiple of the other"
        )
    for setting, of_method, of_args in (
        ("num_generations", method.group_size, args.num_generations),
        ("max_completion_length", method.max_tokens, args.max_completion_length),
    ):
        if of_method != of_args:
            raise UserError(
                f"GRPOConfig.{setting} is {of_args}, but the method was made for {of_method}; make them equal"
            )


def require_no_objective(name: str, method: Method[Any], args: Any) -> None:
    """Raise UserError if ``args`` set TRL's objective, which the method's replaces."""
    defaults = {field.name: field.default for field in fields(args)}
    for setting, ours in OBJECTIVE.items():
        value = getattr(args, setting)
        if value == defaults[setting]:
            continue
        known = ours in type(method.settings).model_fields
        instead = f" and set {ours} in method= if you need it" if known else ""
        raise UserError(
            f"GRPOConfig.{setting} is {value!r}, but the objective is that of {name}; leave it out{instead}"
        )


def require_text(method: Method[Any], trainer: Any) -> None:
    """Raise UserError if the model or the data is of a kind that the adapter has no place for."""
    name = method.settings.name or method.name
    if trainer._is_vlm or {"image", "images"} & set(trainer.train_dataset.column_names or ()):
        raise UserError(f"{name} trains on text only inside TRL; leave out images, and give a tokenizer")
    if trainer.aux_loss_enabled:
        raise UserError(
            f"{name} has no place for the router's auxiliary loss; set GRPOConfig.router_aux_loss_coef = 0.0"
        )


require_tested()
