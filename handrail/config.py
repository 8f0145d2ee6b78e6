"""The configuration of a run: one TOML file, typed. The defaults are what we would start with ourselves."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from handrail.errors import UserError


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Source(Section):
    """Where problems come from, and how large a share of every step they fill."""

    path: str
    share: float = Field(1.0, gt=0)
    probe: str | None = None
    """The ``problems.jsonl`` of a ``handrail probe`` of this source; of its problems only those that ``keep`` names are trained on."""
    keep: list[Literal["all_wrong", "mixed", "all_right", "faulty"]] = Field(["all_wrong", "mixed"], min_length=1)
    """``faulty`` stands for every problem with a fault, whatever its rollouts did."""


def _one_source(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    return [{"path": item} if isinstance(item, str) else item for item in values] if isinstance(values, list) else values


class ModelConfig(Section):
    path: str
    """A Hugging Face model directory or name, a GGUF file, an adapter's directory, or ``builtin:NAME`` (see ``handrail backbone list``)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. Weights that learn are kept and saved in float32: in bfloat16, small updates would round away."""
    device: Literal["auto", "cpu"] = "auto"
    attention: str = "auto"
    """``eager``, ``sdpa``, ``flash_attention_2`` or another that transformers knows; ``auto`` leaves the choice to it."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, more time."""
    trust_remote_code: bool = False


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) by peft: only they learn, and the model's own weights are kept in ``model.dtype``."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """The layers that get one, by the ends of their names; ``all-linear`` is every linear layer but the head."""
    save: Literal["adapter", "merged"] = "adapter"
    """What ``model/`` holds in the end: the adapter alone, or a whole model with it merged in."""


class SamplerConfig(Section):
    """Who samples rollouts."""

    name: Literal["transformers", "vllm"] = "transformers"
    """``transformers`` samples with the model that is trained; ``vllm`` with vLLM in the same process, which takes its weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in; by default as ``model.dtype``."""
    cache_gib: float = Field(2.0, gt=0)
    """GiB of memory for vLLM's keys and values."""
    correction: float = Field(2.0, ge=0)
    """Tokens are weighted by how much likelier the trainer finds them than the sampler did, at most by this (truncated importance
    sampling); 0 weighs none. Where the trained model itself samples in float32, there is nothing to correct."""
    most_gap: float | None = Field(None, gt=0)
    """The run stops where the sampler's log-probabilities are further from the trainer's, in nats, a mean over tokens; by default 0.5, or
    0.01 where both compute in float32."""


class DataConfig(Section):
    train: Annotated[list[Source], BeforeValidator(_one_source), Field(min_length=1)]
    """One source or several, with shares: ``[{path = "hard.jsonl", share = 3}, {path = "easy.jsonl"}]``."""
    columns: dict[str, str] = {}
    """Our field -> the data's column, for layouts that are not recognised: ``{prompt = "question"}``."""
    chat: bool | None = None
    """Wrap a text prompt as a user message of the chat template; by default exactly when the tokenizer has one."""
    system: str | None = None
    """A system message for chat models."""
    prompt_template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """What a text prompt is written into."""
    plan_template: str = Field("{prompt}\n\nPlan:\n{plan}", pattern=r"(?s)\{prompt\}.*\{plan\}|\{plan\}.*\{prompt\}")
    """How a plan is shown to the policy where a method scores a reference with its plan (SORT)."""


class EvalConfig(Section):
    sets: dict[Annotated[str, Field(pattern=r"^[\w. =-]+$")], str] = {}
    """Name -> source of held-out problems; evaluated before the first step, at the end and every ``every`` steps."""
    every: int = Field(0, ge=0)
    limit: int = Field(256, ge=1)
    """At most so many problems of each set, the first ones."""
    samples: int = Field(1, ge=1)


class VerifierConfig(Section):
    name: str = "math"
    """``math`` (math-verify), ``exact``, ``normalised``, ``reasoning-gym``, ``task`` (built-in tasks), or your own ``module:function``."""
    extract: str | None = None
    """A regular expression; the last match's first group is the completion's answer (``exact`` and ``normalised``)."""
    timeout: float = Field(5.0, gt=0, le=86_400)
    """Seconds for one verdict; past it the worker is killed, and the completion is unverified and earns nothing."""
    memory_gib: float = Field(4.0, ge=0.05)
    """GiB of memory that a worker may take; what needs more gets no verdict."""
    workers: int = Field(2, ge=1)
    partial_credit: bool | None = None
    """Keep scores between 0 and 1; otherwise a score short of 1 is 0. By default on, but off for ``reasoning-gym`` and
    ``task``, where wrong answers may earn a hundredth."""


class RolloutConfig(Section):
    group_size: int = Field(8, ge=1)
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    """0 always takes the likeliest token: to evaluate, not to train."""
    require_end: bool = True
    """A completion cut off at ``max_tokens`` earns nothing, whatever it says."""
    batch_size: int = Field(256, ge=1)
    """Sequences sampled at once."""


class ExpertsConfig(Section):
    """The models that methods take advice from, where a method names them."""

    prm: str = ""
    """A process reward model's directory or ``builtin:NAME``, for the step judge ``prm``."""
    teacher: str = ""
    """A causal language model's directory or name, for the corrector ``model``."""


class EndpointConfig(Section):
    """A server that speaks the OpenAI chat-completions protocol, for judges, correctors and planners."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = Field(8, ge=1)
    timeout: float = Field(60.0, gt=0, le=86_400)
    retries: int = Field(4, ge=0)
    """Further tries, with back-off, on 408, 409, 429, 5xx, time-outs and cut connections."""
    answer_tokens: int = Field(4096, ge=1)
    """The longest answer, a model's reasoning included; a longer one counts as none."""
    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """Of all calls together, prompts and answers."""
    max_cost: float | None = Field(None, gt=0)
    """In the currency of the prices; needs both."""
    input_price: float | None = Field(None, ge=0)
    """For a million prompt tokens."""
    output_price: float | None = Field(None, ge=0)
    """For a million answer tokens."""
    cache: str = "runs/endpoint-cache.sqlite"
    """Answers by content of the question; shared by all runs."""
    pause_after: int = Field(10, ge=1)
    """So many failed questions in a row pause the run, with a checkpoint."""

    @model_validator(mode="after")
    def _secretless(self) -> EndpointConfig:
        # The configuration is written into every run directory.
        if re.search(r"//[^/]*@|\?", self.base_url):
            raise ValueError("base_url holds a name, a password or parameters; keep secrets in the environment variable of api_key_env")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError("api_key_env is not the name of an environment variable; put the key into one, and its name here")
        return self

    @model_validator(mode="after")
    def _priced(self) -> EndpointConfig:
        if self.max_cost is not None and None in (self.input_price, self.output_price):
            raise ValueError("max_cost needs input_price and output_price")
        return self


class TrainConfig(Section):
    steps: int = Field(200, ge=1)
    """At most so many; a budget may end the run before."""
    token_budget: int | None = Field(None, ge=1)
    """The run ends with the step in which so many tokens have been sampled."""
    seconds_budget: float | None = Field(None, gt=0)
    """The run ends with the step in which so many seconds have been spent on training, evaluation aside."""
    problems_per_step: int = Field(16, ge=1)
    updates_per_step: int = Field(1, ge=1)
    """Optimiser updates a step, each on an equal part of its problems."""
    learning_rate: float = Field(1e-6, gt=0, le=10)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to 0: with the share of steps or of token_budget that is spent, whichever is more."""
    warmup_steps: int = Field(0, ge=0)
    """Over so many steps the learning rate rises, from 0 in the first one, which therefore teaches nothing."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's; a larger one moves weights with small gradients less."""
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    most_skipped: int = Field(5, ge=1)
    """An update whose gradient is not finite is skipped; so many in a row end the run."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Padded tokens of one forward and backward pass; bounds the memory for logits."""
    seed: int = 0
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 keeps only the final model."""
    keep_last: int = Field(2, ge=1)
    """So many of the newest checkpoints are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are a multiple of this are kept too; 0 keeps no others."""
    samples_every: int = Field(10, ge=0)
    """Steps between those whose trajectories are written to samples.jsonl; 0 writes none."""

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
                f'the schedule {self.schedule} goes by steps or tokens, not by seconds; set token_budget, or schedule = "constant"'
            )
        return self


class CompareConfig(Section):
    """What ``handrail compare`` runs: each entry changes settings of the file it stands in."""

    seeds: list[int] = Field([0], min_length=1)
    runs: dict[str, dict[str, Any]] = {}


class Config(Section):
    model: ModelConfig
    data: DataConfig
    method: dict[str, Any] = {"name": "grpo"}
    """``name`` and the settings of that method (``handrail methods NAME``)."""
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
    def _samples_as_kept(self) -> Config:
        if self.lora and self.sampler.name == "transformers" and self.sampler.dtype not in ("auto", self.model.dtype):
            raise ValueError("with [lora] the trained model itself samples, in model.dtype; leave sampler.dtype out")
        return self

    @property
    def most_gap(self) -> float:
        exact = self.model.dtype == self.sampling_dtype == "float32"
        return self.sampler.most_gap or (0.01 if exact else 0.5)

    @property
    def sampling_dtype(self) -> str:
        return self.model.dtype if self.sampler.dtype == "auto" else self.sampler.dtype


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One sentence for the first thing wrong: the key's dotted name, what it should be, what stood there."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(([prefix] if prefix else []) + location)
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"there is no setting {key}; {hint}{more}"
    if first["type"] == "missing":
        return f"the setting {key} is missing{more}"
    if first["type"] == "value_error":
        return f"{key}: {first['msg'].removeprefix('Value error, ')}{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}{more}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        kinds = get_args(field.annotation) or (field.annotation,) if field else ()  # a section that may be missing is a union
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def set_value(tree: dict[str, Any], assignment: str) -> None:
    """Apply one ``section.key=value``; the value is TOML or, if it does not begin as TOML does, plain text.

    Raises UserError if it is no assignment, or if the value begins with a quote, bracket or brace and is not TOML.
    """
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set takes section.key=value, not {assignment!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if text.lstrip()[:1] in set("\"'[{"):
            reason = str(error).partition(" (at ")[0]  # the column counts from what we put before the value
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
    """Reads a TOML file, with ``section.key=value`` assignments applied over it. Raises UserError for whatever is wrong in it."""
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
    for assignment in assignments or []:
        set_value(tree, assignment)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "the configuration") -> Config:
    """Raises UserError, naming ``where``, if ``tree`` is not a configuration."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Config)}") from error
