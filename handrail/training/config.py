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

from handrail._util.errors import UserError


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Source(Section):
    """A source of training problems, and its share of every step."""

    path: str
    """A data file, a directory, a dataset, ``task:NAME?key=value`` or ``reasoning-gym:FAMILY?key=value``."""
    share: float = Field(1.0, gt=0)
    """The source's share of the problems of a step, relative to the shares of the other sources."""
    probe: str | None = None
    """The ``problems.jsonl`` that ``handrail probe`` wrote for this source; only its problems of the kinds in
    ``keep`` are trained on."""
    keep: list[Literal["all_wrong", "mixed", "all_right", "faulty"]] = Field(["all_wrong", "mixed"], min_length=1)
    """The kinds of probed problems to train on; ``faulty`` means every problem with a fault, whatever its
    rollouts did."""


def _one_source(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    return [{"path": item} if isinstance(item, str) else item for item in values] if isinstance(values, list) else values


class ModelConfig(Section):
    """The model to train."""

    path: str
    """A Hugging Face model directory or hub name, a GGUF file, an adapter's directory, or ``builtin:NAME``
    (``handrail model list``)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type for computing; trained weights are always kept and saved in float32, because bfloat16
    rounds small updates away."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto`` uses a GPU if there is one; ``cpu`` never does."""
    attention: str = "auto"
    """Attention implementation by its transformers name (``eager``, ``sdpa``, ``flash_attention_2``);
    ``auto`` lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; turn this on only if you trust the model's author."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685), by peft. If this section is present, only the adapters are trained; the model's own
    weights stay in ``model.dtype``."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter, by the ends of their names; ``all-linear`` means every linear layer except
    the output layer."""
    save: Literal["adapter", "merged"] = "adapter"
    """What ``model/`` holds after training: the adapter alone, or the whole model with the adapter merged
    in."""


class SamplerConfig(Section):
    """The engine that samples rollouts."""

    name: Literal["transformers", "vllm"] = "transformers"
    """``transformers`` samples with the model in training; ``vllm`` runs vLLM in the same process and copies
    the weights to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type that the sampler computes in; ``auto`` means ``model.dtype``."""
    cache_gib: float = Field(2.0, gt=0)
    """Memory for vLLM's KV cache, in GiB."""
    correction: float = Field(2.0, ge=0)
    """Cap of the importance weights (trainer's over sampler's probability of a token) that correct for a
    sampler that differs from the trainer; 0 turns the correction off, and a float32 model that samples for
    itself needs none."""
    most_gap: float | None = Field(None, gt=0)
    """Stop the run if the sampler's and the trainer's log-probabilities differ by more than this, in nats, as
    a mean over tokens; the default is 0.01 if both compute in float32, else 0.5."""


class DataConfig(Section):
    """The training data, and how its prompts are written."""

    train: Annotated[list[Source], BeforeValidator(_one_source, str | list[str | Source]), Field(min_length=1)]
    """One source, or a list of sources with shares: ``[{path = "hard.jsonl", share = 3}, {path =
    "easy.jsonl"}]``."""
    columns: dict[str, str] = {}
    """The data's column for each of our fields, if the layout is not recognised: ``{prompt =
    "question"}``."""
    too_long: Literal["refuse", "skip"] = "refuse"
    """Treatment of problems that exceed the model's context: ``refuse`` stops with their number, ``skip``
    leaves them out."""
    chat: bool | None = None
    """Wrap a text prompt in the tokenizer's chat template, as the user's message; by default on if the
    tokenizer has a template."""
    system: str | None = None
    """System message for chat models; a prompt that brings its own system message keeps it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, by the names that it uses: ``{enable_thinking = false}``."""
    prompt_template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """Template for text prompts: the prompt replaces ``{prompt}``."""
    plan_template: str = Field("{prompt}\n\nPlan:\n{plan}", pattern=r"\{prompt\}[\s\S]*\{plan\}|\{plan\}[\s\S]*\{prompt\}")
    """Template for a prompt with its plan, which SORT uses to score a reference."""


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    sets: dict[Annotated[str, Field(pattern=r"^[\w. =-]+$")], str] = {}
    """Held-out sources by name; each is evaluated before the first step, after the last one, and every
    ``eval.every`` steps."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates only before and after training."""
    limit: int = Field(256, ge=1)
    """Most problems to evaluate of each set, from its beginning."""
    samples: int = Field(1, ge=1)
    """Completions of each held-out problem."""


class VerifierConfig(Section):
    """The verifier, which grades completions."""

    name: str = "math"
    """``math``, ``exact``, ``normalised``, ``reasoning-gym``, ``task`` (built-in tasks), or your own
    ``module:function``."""
    extract: str | None = None
    """Regular expression that finds the answer in a completion: the verifier sees the first group of the last
    match."""
    timeout: float = Field(5.0, gt=0, le=86_400)
    """Seconds for one verdict; a worker that takes longer is killed, and its completion is unverified and
    earns nothing."""
    memory_gib: float = Field(4.0, ge=0.05)
    """Memory of one worker, in GiB; a completion that needs more gets no verdict."""
    workers: int = Field(2, ge=1)
    """Processes that grade in parallel."""
    correct_from: float = Field(1.0, gt=0, le=1)
    """A completion is correct if its score is at least this; below it is wrong, whatever it is paid."""
    partial_credit: bool | None = None
    """Pay the score itself instead of 1 for correct and 0 for wrong; by default on, except for
    ``reasoning-gym`` and ``task``, whose scorers may give a wrong answer a hundredth."""


class RolloutConfig(Section):
    """Rollouts: the completions that the policy samples."""

    group_size: int = Field(8, ge=1)
    """Completions in the group of each problem; LUFFY counts the reference as one of them."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion in tokens; a longer one is cut off."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 always takes the likeliest token, which suits evaluation but not training."""
    require_end: bool = True
    """A completion that is cut off at ``max_tokens`` earns nothing, whatever it says."""
    batch_size: int = Field(256, ge=1)
    """Sequences sampled at once; lower it if memory runs out."""


class ExpertsConfig(Section):
    """Other models that a method asks for advice, if its settings name them."""

    prm: str = ""
    """Process reward model for the step judge ``prm``: a directory or ``builtin:NAME``."""
    teacher: str = ""
    """Causal language model for the corrector ``model``: a directory or hub name."""


class EndpointConfig(Section):
    """A server with the OpenAI chat-completions protocol, for judges, correctors and planners."""

    base_url: str
    """Address of the server, without password and parameters."""
    model: str
    """Name of the model on the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; the key itself is never written anywhere."""
    concurrency: int = Field(8, ge=1)
    """Questions asked at the same time."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds to wait for an answer."""
    retries: int = Field(4, ge=0)
    """Further attempts, with growing pauses, after status 408, 409, 429 or 5xx, a timeout or a lost
    connection."""
    answer_tokens: int = Field(4096, ge=1)
    """Longest answer in tokens, the model's reasoning included; a longer answer counts as none."""
    max_calls: int | None = Field(None, ge=1)
    """Budget of requests; once it is spent, further questions go unanswered."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget of tokens, prompts and answers together; once it is spent, further questions go unanswered."""
    max_cost: float | None = Field(None, gt=0)
    """Budget of money, in the currency of the two prices, which it needs; once it is spent, further questions
    go unanswered."""
    input_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens."""
    output_price: float | None = Field(None, ge=0)
    """Price of a million answer tokens."""
    cache: str = "runs/endpoint-cache.sqlite"
    """File that keeps every answer, so that no run asks the same question twice."""
    pause_after: int = Field(10, ge=1)
    """Pause the run, with a checkpoint, after this many failed questions in a row."""

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
    """Training: length, batch, optimizer (AdamW), checkpoints."""

    steps: int = Field(200, ge=1)
    """Number of steps; a budget may end the run earlier."""
    token_budget: int | None = Field(None, ge=1)
    """End the run after the step in which the number of sampled tokens reaches this."""
    seconds_budget: float | None = Field(None, gt=0)
    """End the run after the step in which the seconds of training, without evaluation, reach this."""
    problems_per_step: int = Field(16, ge=1)
    """Problems of each step, one group of completions each."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer updates of each step, each on an equal part of the step's problems."""
    learning_rate: float = Field(1e-6, gt=0, le=10)
    """Highest learning rate, which follows the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to 0 as steps or token_budget are used up, whichever is further;
    ``constant`` does not fall."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0; the first of them has rate 0 and changes nothing."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW's β1 and β2."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's ε; a larger one slows down the weights with small gradients."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    most_skipped: int = Field(5, ge=1)
    """End the run after this many skipped updates in a row; an update is skipped if its gradient is not
    finite."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most tokens of one forward and backward pass, padding included; lower it if memory runs out."""
    seed: int = 0
    """Seed of all randomness in the run."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 keeps only the final model."""
    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Keep also the checkpoints of every step that is a multiple of this; 0 keeps no others."""
    samples_every: int = Field(10, ge=0)
    """Steps between those whose trajectories are written to ``samples.jsonl``; 0 writes none."""

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
    """The runs of ``handrail compare``."""

    seeds: list[int] = Field([0], min_length=1)
    """Seeds; every run is trained once with each."""
    runs: dict[str, dict[str, Any]] = {}
    """Runs by name; each changes some settings of this file: ``LUFFY = {method = {name = "luffy"}}``."""


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
