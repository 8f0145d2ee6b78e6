"""The engine's settings in verl's configuration, what it was tested with, and what it refuses."""

from __future__ import annotations

from functools import wraps
from typing import Any

import verl.utils.config
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.core_algos import register_adv_est
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.llm_server import LLMServerClient

from handrail._util.errors import UserError
from handrail._util.section import Section, validated
from handrail.engines.hosted import checksum
from handrail.experts.config import EndpointConfig, ExpertsConfig
from handrail.methods.base import Method, Term

NAME = "handrail"
"""Name of the trainer, of the advantage estimator and of the section ``algorithm.handrail``."""
TESTED = "0.9.1"
SEAMS: dict[Any, dict[str, str]] = {
    PPOTrainer: {
        "__init__": "6f938d77859b",
        "_setup": "248aee497276",
        "_init_dataloader": "86cf3749e087",
        "_fetch_one_gen_batch": "d62e586d5205",
        "_step_once": "efdd4abe161c",
        "_balance_batch": "f9b6e887d750",
        "_compute_old_log_prob": "b2630e6178ed",
        "_compute_ref_log_prob": "f4d69ef51b12",
        "_compute_advantage": "2a4a2aa4a475",
        "_update_actor": "d7009bd8a69d",
        "_compute_metrics": "9c5c55578788",
        "_load_checkpoint": "bb446d77c48a",
        "_save_checkpoint": "8c2435b577e5",
    },
    PPOTrainerSync: {
        "on_sample_end": "16f25f1081e0",
        "on_step_end": "a759d37bd53d",
    },
    ActorRolloutRefWorker: {
        "init_model": "d1598903d824",
        "set_loss_fn": "a655a9cfc08a",
        "update_actor": "c33d51030774",
        "compute_log_prob": "bea185dbc789",
        "compute_ref_log_prob": "0184bf0ad741",
    },
    TrainingWorker: {
        "train_mini_batch": "02b50b03fe7d",
        "train_batch": "9107065b72b6",
        "infer_batch": "57bba17563c3",
    },
    AgentLoopWorkerTQ.__ray_metadata__.modified_class: {
        "_run_prompt": "3d9bca6b0ea5",
        "_agent_loop_postprocess": "523edacbff73",
    },
    RewardLoopManager: {
        "compute_rm_score": "e7d723775b69",
    },
    LLMServerClient: {
        "generate": "45f4cf4029f0",
    },
    verl.utils.config: {
        "validate_config": "ab4096deecfe",
    },
}
"""What the engine overrides, calls or relies on, with the checksum of its source in the tested version."""

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
OBJECTIVE: dict[str, tuple[Any, str]] = {
    "algorithm.gamma": (1.0, ""),
    "algorithm.lam": (1.0, ""),
    "algorithm.norm_adv_by_std_in_grpo": (True, "normalize_std"),
    "algorithm.use_kl_in_reward": (False, "kl"),
    "algorithm.use_pf_ppo": (False, ""),
    f"{ACTOR}.clip_ratio": (0.2, "clip_low"),
    f"{ACTOR}.clip_ratio_low": (0.2, "clip_low"),
    f"{ACTOR}.clip_ratio_high": (0.2, "clip_high"),
    f"{ACTOR}.clip_ratio_c": (3.0, "dual_clip"),
    f"{ACTOR}.entropy_coeff": (0, "entropy_bonus"),
    f"{ACTOR}.loss_agg_mode": ("token-mean", "loss_normalizer"),
    f"{ACTOR}.loss_scale_factor": (None, ""),
    f"{ACTOR}.policy_loss.loss_mode": ("vanilla", "ratio"),
    f"{ACTOR}.use_kl_loss": (False, "kl"),
}
"""Settings of verl's objective: their defaults, and the method's setting that replaces each, if any."""

CORRECTION = "algorithm.rollout_correction"
ABSENT: dict[str, tuple[Any, str]] = {
    f"{CORRECTION}.bypass_mode": (False, "the ratio is to the weights at the start of the step"),
    f"{CORRECTION}.rollout_rs": (None, "no rollout is rejected"),
    f"{CORRECTION}.rollout_is_batch_normalize": (False, "importance weights are not normalized"),
    f"{ACTOR}.shuffle": (False, "an update takes the problems in the data loader's order"),
    f"{ACTOR}.use_prefix_grouper": (False, "rows of several problems are trained together"),
    f"{ROLLOUT}.multi_turn.enable": (False, "completions have a single turn"),
    f"{ROLLOUT}.agent.default_agent_loop": ("single_turn_agent", "completions have a single turn"),
    f"{ROLLOUT}.agent.agent_loop_manager_class": (None, "rollouts come from verl's own agent loops"),
    "trainer.v1.sync.parameter_sync_step": (
        1,
        "a step has train_batch_size / ppo_mini_batch_size updates",
    ),
    "trainer.critic_warmup": (0, "there is no critic"),
}
"""Settings that a method leaves no room for: their defaults, and why."""


CHOSEN: dict[str, Any] = {
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": NAME,
    "algorithm.adv_estimator": NAME,
}
"""Settings without which verl runs another trainer than ours."""


class VerlSettings(Section):
    """Settings in ``algorithm.handrail``."""

    method: str | dict[str, Any] = "grpo"
    """A name, settings with a ``name``, or a TOML file with a section ``[method]``."""
    terms: list[str | dict[str, Any]] = []
    """Terms, by name or with settings; added to those of ``method``."""
    columns: dict[str, str] = {}
    """As ``data.columns``; without it, the layout of the dataset is recognized."""
    verifier: str | dict[str, Any] | None = None
    """Handrail's verifier, by name or with settings, in place of verl's rewards."""
    correct_by: str = "acc"
    """What a reward function returns besides the score and tells if a completion is correct; the score if it
    returns no such thing."""
    correct_from: float = 1.0
    """Its lowest value for a correct completion."""
    experts: ExpertsConfig = ExpertsConfig()
    """As ``[experts]``."""
    endpoint: EndpointConfig | None = None
    """As ``[endpoint]``."""
    plan_template: str = ""
    """As ``data.plan_template``."""

    @property
    def plain(self) -> bool:
        """True if everything is verl's own."""
        return self.method == "grpo" and not self.terms


def settings_of(config: DictConfig) -> VerlSettings:
    """Read ``algorithm.handrail``.

    Raises UserError if it is missing or has an unknown or wrong setting, and as ``require_chosen``.
    """
    given = config.algorithm.get(NAME)
    if given is None:
        raise UserError(f"algorithm.{NAME} is missing; name a method: +algorithm.{NAME}.method=sort")
    require_chosen(config)
    return validated(VerlSettings, OmegaConf.to_container(given, resolve=True), f"algorithm.{NAME}")


def require_chosen(config: DictConfig) -> None:
    """Raise UserError if ``config`` names a method, and another trainer, which would ignore it."""
    given = {setting: OmegaConf.select(config, setting) for setting in CHOSEN}
    wrong = [setting for setting, value in given.items() if value != CHOSEN[setting]]
    if wrong and config.algorithm.get(NAME) is not None:
        raise UserError(
            f"{' and '.join(f'{setting} is {given[setting]}' for setting in wrong)}, so verl would ignore "
            f"algorithm.{NAME}; set {' '.join(f'{setting}={CHOSEN[setting]}' for setting in wrong)}"
        )


def checksums() -> dict[Any, dict[str, str]]:
    """Checksums of ``SEAMS`` in the installed version; empty for what is not there."""
    return {
        owner: {name: checksum(getattr(owner, name, None)) for name in names}
        for owner, names in SEAMS.items()
    }


def require_tested(version: str = verl.__version__) -> None:
    """Raise UserError, naming what has changed, unless this is the version that was tested."""
    found = checksums()
    changed = [
        f"{owner.__name__}.{name}"
        for owner, known in SEAMS.items()
        for name in known
        if found[owner][name] != known[name]
    ]
    if changed or version != TESTED:
        what = f"{', '.join(changed)} changed" if changed else "nothing has been tested"
        raise UserError(
            f"handrail.engines.verl builds on verl {TESTED}, and in verl {version} {what}; "
            f'pip install "verl=={TESTED}"'
        )


def require_possible(method: Method[Any], config: DictConfig) -> None:
    """Raise UserError if the configuration asks for what a guided method cannot do inside verl."""
    name = method.settings.name or method.name
    if method.needs_rollback:
        raise UserError(
            f"{name} goes back to earlier checkpoints, which verl cannot; use npo, or handrail train"
        )
    if method.trained:
        raise UserError(
            f'{name} trains a critic beside the policy, which verl cannot; set judge = "policy", or use '
            "handrail train"
        )
    if "teacher" in method.models:
        raise UserError(
            f"{name} or one of its terms reads a teacher's probabilities, and verl's trainer process has no "
            "GPU to run a teacher on; use handrail train"
        )
    needs_all = type(method).guide is not Method.guide or any(
        type(term).reward is not Term.reward or type(term).guide is not Term.guide for term in method.terms
    )
    if config.algorithm.filter_groups.enable and needs_all:
        raise UserError(
            f"algorithm.filter_groups drops groups before {name} or one of its terms sees them; "
            f"leave it out, and set skip_dead_groups in algorithm.{NAME}.method if you need it"
        )
    require_no_objective(name, method, config)
    require_logps(name, method, config)
    for setting, (default, why) in ABSENT.items():
        value = OmegaConf.select(config, setting)
        if value is not None and value != default:
            raise UserError(f"{setting} is {value}, but with {name} {why}; leave it out")
    importance_weight_cap(config)
    require_parts(name, method, config)
    batch, update = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if batch % update:
        raise UserError(
            f"data.train_batch_size is {batch} and {ACTOR}.ppo_mini_batch_size {update}, so one update of a "
            "step would be smaller than the others; make the first a multiple of the second"
        )


def require_no_objective(name: str, method: Method[Any], config: DictConfig) -> None:
    """Raise UserError if ``config`` sets verl's objective, which the method's replaces."""
    for setting, (default, ours) in OBJECTIVE.items():
        value = OmegaConf.select(config, setting)
        if value == default:
            continue
        known = ours in type(method.settings).model_fields
        instead = f" and set {ours} in algorithm.handrail.method if you need it" if known else ""
        raise UserError(f"{setting} is {value}, but the objective is that of {name}; leave it out{instead}")


def require_logps(name: str, method: Method[Any], config: DictConfig) -> None:
    """Raise UserError if something needs log-probabilities that verl's servers do not return."""
    needing = [name] if method.needs_sampling_logp else []
    needing += [term.name for term in method.terms if term.needs_sampling_logp]
    needing += [f"{CORRECTION}.rollout_is"] if config.algorithm.rollout_correction.rollout_is else []
    if needing and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise UserError(
            f"{ROLLOUT}.calculate_log_probs is False, so verl's servers return no log-probabilities, which "
            f"{needing[0]} needs; leave it out"
        )


def require_parts(name: str, method: Method[Any], config: DictConfig) -> None:
    """Raise UserError if verl would run a part that the engine has no place for, or lacks one it needs."""
    strategy, reward = config.actor_rollout_ref.actor.strategy, config.reward.reward_model
    if need_critic(config):
        raise UserError(f"critic.enable: {name} has no critic; leave it out")
    if strategy not in ("fsdp", "fsdp2"):
        raise UserError(f"{ACTOR}.strategy is {strategy}, but {name} needs fsdp or fsdp2; set it to fsdp2")
    before = config.actor_rollout_ref.ref
    if "reference" in method.models and not (
        before.log_prob_use_dynamic_bsz or before.log_prob_micro_batch_size_per_gpu
    ):
        raise UserError(
            f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu is missing; set it, because {name} "
            "asks the model before training for log-probabilities"
        )
    if is_distillation_enabled(config.get("distillation")):
        raise UserError(f"distillation.enabled: {name} brings its own loss; leave it out")
    if reward.enable and not reward.enable_resource_pool:
        raise UserError(
            f"reward.reward_model.enable: {name} grades while the model in training holds the GPUs; set "
            "reward.reward_model.enable_resource_pool=True"
        )


def importance_weight_cap(config: DictConfig) -> float:
    """Cap on importance weights, 0 for none. Raises UserError for weights that are not per token."""
    correction = config.algorithm.rollout_correction
    if correction.rollout_is is None:
        return 0.0
    if correction.rollout_is != "token":
        raise UserError(
            f"{CORRECTION}.rollout_is is {correction.rollout_is}, but tokens are weighted one by one; set it "
            "to token"
        )
    try:
        return float(correction.rollout_is_threshold)
    except ValueError:
        raise UserError(
            f"{CORRECTION}.rollout_is_threshold is {correction.rollout_is_threshold}, but importance weights "
            "have an upper bound only; give one number"
        ) from None


def become_synchronous(config: DictConfig, plain: bool, reference: bool) -> None:
    """Make ``config`` that of verl's synchronous trainer; verl takes any mode but "sync" for asynchronous.

    ``plain``: True if the advantages are verl's own. ``reference``: True if the model before training is
    needed.
    """
    with open_dict(config):
        config.trainer.v1.trainer_mode = "sync"
        if plain:
            config.algorithm.adv_estimator = "grpo"
        if reference:
            config.actor_rollout_ref.actor.use_kl_loss = True  # so that verl loads it


verls_validate_config = verl.utils.config.validate_config


@wraps(verls_validate_config)
def validate_config(config: DictConfig, *rest: Any, **named: Any) -> None:
    """Refuse, before verl's command starts anything, a method that its trainer would ignore."""
    require_chosen(config)
    verls_validate_config(config, *rest, **named)


verl.utils.config.validate_config = validate_config


@register_adv_est(NAME)  # type: ignore[untyped-decorator]
def refuse(**_: Any) -> Any:
    """Stop any other trainer that is given this estimator."""
    raise UserError(
        f"algorithm.adv_estimator={NAME} needs Handrail's trainer; set trainer.v1.trainer_mode={NAME}, and "
        "leave trainer.use_v1 at True"
    )
