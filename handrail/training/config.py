"""Configuration of a run: one typed TOML file. The defaults are what we would start with ourselves."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from handrail._util.errors import UserError
from handrail._util.numerals import TOO_MANY_DIGITS
from handrail._util.section import Section, explain
from handrail.data.config import DataConfig
from handrail.experts.config import EndpointConfig, ExpertsConfig
from handrail.models.config import LoraConfig, ModelConfig, RolloutConfig, SamplerConfig
from handrail.verifiers.config import VerifierConfig


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    sets: dict[Annotated[str, Field(pattern=r"^[\w. =-]+$")], Annotated[str, Field(min_length=1)]] = {}
    """Held-out sources by name; each is evaluated before the first step, after the last one, and every
    ``eval.every`` steps."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates only before and after training."""
    limit: int = Field(256, ge=1)
    """Maximum number of problems to evaluate per set, taken from its beginning."""
    samples: int = Field(1, ge=1)
    """Completions of each held-out problem."""


class TrainConfig(Section):
    """Training: length, batch, optimizer (AdamW), checkpoints."""

    steps: int = Field(200, ge=1)
    """Number of steps; a budget may end the run earlier."""
    token_budget: int | None = Field(None, ge=1)
    """End the run after the step in which the total number of sampled tokens, those of repairs, hints and
    other guidance included, reaches this."""
    seconds_budget: float | None = Field(None, gt=0)
    """End the run after the step in which the seconds spent training, evaluation excluded, reach this."""
    problems_per_step: int = Field(16, ge=1)
    """Problems per step, with one group of completions each."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer updates per step, each on an equal share of the step's problems."""
    learning_rate: float = Field(1e-6, gt=0, le=10)
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate decays to 0 as steps or token_budget are used up, whichever is further along;
    ``constant`` does not decay."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps over which the learning rate rises from 0; the first has rate 0 and changes nothing."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW's β1 and β2."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's ε; a larger value slows down weights with small gradients."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Maximum gradient norm; a larger gradient is scaled down to it."""
    max_skipped_updates: int = Field(5, ge=1)
    """End the run after this many consecutive skipped updates; an update is skipped if its gradient is not
    finite."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Maximum number of tokens per forward and backward pass, padding included unless rows are packed; lower
    it if memory runs out."""
    fsdp: bool = False
    """Keep only a shard of weights, gradients and optimizer state in each of several processes (FSDP2);
    ``accelerate launch --use_fsdp --fsdp_version 2`` turns it on too."""
    seed: int = 0
    """Seed of all randomness in the run."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 keeps only the final model."""
    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep the checkpoints of steps that are multiples of this; 0 keeps no others."""
    trackers: list[
        Literal["wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
    ] = []
    """Experiment trackers to log to besides TensorBoard, through Accelerate: ``["wandb"]``; each needs its
    own package."""
    tracker_project: str = Field("handrail", min_length=1)
    """Project name in the trackers."""
    samples_every: int = Field(10, ge=0)
    """Write the trajectories of every N-th step to ``samples.jsonl``; 0 writes none."""

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.problems_per_step % self.updates_per_step:
            raise ValueError("problems_per_step must be a multiple of updates_per_step")
        return self

    @model_validator(mode="after")
    def _ends(self) -> TrainConfig:
        if self.token_budget and self.seconds_budget:
            raise ValueError("token_budget and seconds_budget are both set; choose one")
        if self.schedule != "constant" and self.seconds_budget:
            raise ValueError(
                f"the schedule {self.schedule} goes by steps or tokens, not by seconds; set token_budget, or "
                'schedule = "constant"'
            )
        return self


class CompareConfig(Section):
    """The runs of ``handrail compare``."""

    seeds: list[int] = Field([0], min_length=1)
    """Seeds; each run is trained once with every seed."""
    runs: dict[str, dict[str, Any]] = {}
    """Runs by name, each with its changes to the settings of this file: ``LUFFY = {method = {name =
    "luffy"}}``."""


class Config(Section):
    model: ModelConfig
    data: DataConfig
    method: dict[str, Any] = {"name": "grpo"}
    """Name of the method (``handrail methods``) and its settings (``handrail methods NAME``)."""
    verifier: VerifierConfig = VerifierConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampler: SamplerConfig = SamplerConfig()
    lora: LoraConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    experts: ExpertsConfig = ExpertsConfig()
    endpoint: EndpointConfig | None = None
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _sampler_dtype(self) -> Config:
        if (
            self.lora
            and self.sampler.name == "transformers"
            and self.sampler.dtype not in ("auto", self.model.dtype)
        ):
            raise ValueError(
                "with [lora] the trained model itself samples, in model.dtype; leave sampler.dtype out"
            )
        return self


def set_value(tree: dict[str, Any], assignment: str) -> None:
    """Apply one assignment ``section.key=value``; a value that is not TOML is plain text.

    Raises UserError if it is not an assignment, or if the value starts with a quote, bracket or brace but is
    not TOML.
    """
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set takes section.key=value, not {assignment!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        if not isinstance(error, tomllib.TOMLDecodeError | RecursionError):
            raise UserError(f"--set {name.strip()}: {TOO_MANY_DIGITS}; give a smaller number") from error
        if text.lstrip()[:1] in set("\"'[{"):
            reason = str(error).partition(" (at ")[0]  # the column would include our "value = "
            raise UserError(
                f"--set {name.strip()}: the value begins with {text.lstrip()[0]} and is not TOML ({reason}); "
                "write text as \"...\" with backslashes doubled, or as '...' to keep them as they are"
            ) from error
        value = text
    *sections, key = name.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {assignment}: {section} is not a section")
    tree[key] = value


def load_config(path: str | Path, assignments: list[str] | None = None) -> Config:
    """Read a TOML file and apply ``section.key=value`` assignments to it.

    Raises UserError for any error in it.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read") from None
    except ValueError:
        raise UserError(f"{path} cannot be read: {TOO_MANY_DIGITS}; give a smaller number") from None
    for assignment in assignments or []:
        set_value(tree, assignment)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "the configuration") -> Config:
    """Validate a configuration. Raises UserError, naming ``where``, if it is invalid."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Config)}") from error
