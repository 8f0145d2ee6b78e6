"""Write a first configuration for the user's model and data, for ``handrail init``."""

from __future__ import annotations

import math
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from accelerate import Accelerator

from handrail.data.config import DataConfig, Source
from handrail.data.load import load_problems
from handrail.methods import build
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.training.config import Config, parse_config
from handrail.training.lengths import TooLong, split_by_length
from handrail.training.policies import load_policy
from handrail.types.problem import Problem
from handrail.verifiers.audit import TOLERATED
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

GRADED = 64
"""The most problems to grade when choosing the verifier."""
MEASURED = 1000
"""The most problems whose references are measured to choose ``rollout.max_tokens``."""
WITHOUT_REFERENCES = 512
"""``rollout.max_tokens`` if there are no references to measure."""

SMALL = 300_000_000
"""A model with fewer weights learns next to nothing at the rate that is usual for billions of them."""


@dataclass(frozen=True)
class Verified:
    """A verifier, and how many of the graded texts it accepts."""

    name: str
    accepted: int
    graded: int
    texts: str

    @property
    def fits(self) -> bool:
        return self.accepted >= (1 - TOLERATED) * self.graded

    def __str__(self) -> str:
        return f"accepts {self.accepted} of the first {self.graded} {self.texts}"


def first_config(
    model: str, data: str, held_out: str | None, columns: Mapping[str, str], verifier: str, output: Path
) -> tuple[str, Verified]:
    """Return the text of a configuration file with comments, and the results of its verifier on the data.

    ``verifier`` is the default for the source; ``normalized`` replaces ``math`` if it accepts more. Raises
    UserError if the model or the data cannot be used.
    """
    problems = load_problems(data, columns)
    config = Config(
        model=ModelConfig(path=model),
        data=DataConfig(train=[Source(path=data)], columns=dict(columns)),
        rollout=RolloutConfig(max_tokens=1),
    )
    policy = load_policy(config, Accelerator(cpu=True))
    problems, long = split_by_length(policy, problems, "skip")
    tested, long_tested = split_by_length(
        policy, load_problems(held_out, columns) if held_out else [], "skip", references=False
    )
    prompts = [*problems, *tested]
    chosen = _verifier(problems, ["math", "normalized"] if verifier == "math" else [verifier])
    tokens, why = _max_tokens(policy, problems, prompts)
    rate = "2e-4" if policy.model.num_parameters() < SMALL else "1e-6"
    text = "\n".join(
        [
            *_head(model, data, output),
            *_inputs(model, data, problems, held_out, columns, policy.renderer.chat, [*long, *long_tested]),
            *_training(problems, chosen, tokens, why, rate),
        ]
    )
    written = parse_config(tomllib.loads(text), str(output))
    build(written.method, written.rollout)
    return text + "\n", chosen


def _verifier(problems: Sequence[Problem], names: Sequence[str]) -> Verified:
    """Choose the first verifier that fits, else the one that accepts the most texts.

    The texts are references, or the answers if no problem has a reference.
    """
    referenced = [problem for problem in problems if problem.references][:GRADED]
    items = [(problem, problem.references[0]) for problem in referenced]
    items = items or [(problem, problem.answer) for problem in problems[:GRADED]]
    tried = []
    for name in names:
        with VerifierPool(VerifierConfig(name=name, workers=1)) as pool:
            accepted = sum(verdict.reward > 0 for verdict in pool.grade(items))
        tried.append(Verified(name, accepted, len(items), "references" if referenced else "answers"))
        if tried[-1].fits:
            break
    return max(tried, key=lambda each: each.accepted)


def _max_tokens(
    policy: TransformersPolicy, problems: Sequence[Problem], prompts: Sequence[Problem]
) -> tuple[int, str]:
    """Return ``rollout.max_tokens`` and the reason for it.

    It is 1.5 times the longest reference, but no more than the context has room for.
    """
    lengths = [
        len(policy.renderer.reference(problem, text))
        for problem in problems[:MEASURED]
        for text in problem.references
    ]
    wanted = 16 * math.ceil(1.5 * max(lengths) / 16) if lengths else WITHOUT_REFERENCES
    why = (
        f"the longest reference has {max(lengths)} tokens"
        if lengths
        else "there is no reference to tell how long a solution is"
    )
    if policy.context is None:
        return wanted, why
    room = policy.context - max(len(policy.renderer.prompt(problem)) for problem in prompts)
    return min(wanted, room), f"{why}; prompts leave room for {room}"


def _head(model: str, data: str, output: Path) -> list[str]:
    shown_model, shown_data, file = (shlex.quote(str(text)) for text in (model, data, output))
    return [
        "# Written by `handrail init`. Before training:",
        f"#   handrail check {shown_data} --config {file}",
        "#     shows the first problem as the model sees it, and warns about faults in the data",
        f"#   handrail probe {shown_model} {shown_data} --config {file}",
        "#     finds which problems give a signal, and which method and group size suit them",
        f"# To train:  handrail train {file}",
        "# `handrail config` describes every setting.",
        "# For completion in an editor, run `handrail config --schema > handrail.schema.json`",
        "# and make this the first line:",
        "# #:schema ./handrail.schema.json",
    ]


def _inputs(
    model: str,
    data: str,
    problems: Sequence[Problem],
    held_out: str | None,
    columns: Mapping[str, str],
    chat: bool,
    too_long: Sequence[TooLong],
) -> list[str]:
    referenced = sum(bool(problem.references) for problem in problems)
    have = f"{len(problems)} problems, {referenced} of them with a reference"
    if held_out:
        sets = _line(f"sets = {_inline({'held_out': held_out})}", "accuracy is measured on these problems")
    else:
        sets = _line(
            '# sets = { held_out = "held-out.jsonl" }', "to measure accuracy, name problems not trained on"
        )
    system = '# system = "Solve the problem step by step."'
    return [
        "",
        "[model]",
        _line(_pair("path", model), "the model to train"),
        _line('# dtype = "bfloat16"', "computes in bfloat16, which takes less memory; for GPUs"),
        "",
        _line("# [lora]", "trains adapters instead of all weights, which takes much less memory"),
        _line("# rank = 16", "size of the adapters"),
        "",
        "[data]",
        _line(_pair("train", data), have),
        *([_line('too_long = "skip"', f"leaves out {len(too_long)} problems, first {too_long[0]}")]
          if too_long else []),
        *([_line(f"columns = {_inline(columns)}", "our field = your column")] if columns else []),
        _line(system, "instructions; ask for the ending of your references, if they share one") if chat
        else _line('# prompt_template = "{prompt}\\n"',
                   "text around each prompt; end it with the white space before a reference"),
        "",
        "[eval]",
        sets,
        _line("every = 50", "steps between evaluations"),
    ]  # fmt: skip


def _training(
    problems: Sequence[Problem], verifier: Verified, max_tokens: int, why: str, rate: str
) -> list[str]:
    guided = any(problem.references for problem in problems)
    method, reason = (
        ("grpo+sft", "learns from rollouts and references") if guided else ("grpo", "needs no references")
    )
    return [
        "",
        "[verifier]",
        _line(_pair("name", verifier.name), f"{verifier}"),
        "",
        "[rollout]",
        _line("group_size = 8", "completions of each problem"),
        _line(f"max_tokens = {max_tokens}", f"longest completion; {why}"),
        "",
        "[method]",
        _line(_pair("name", method), f"{reason}; `handrail methods` lists others"),
        "",
        "[train]",
        _line("steps = 200", "number of steps"),
        _line(f"problems_per_step = {min(16, len(problems))}", "problems of each step"),
        _line(
            f"learning_rate = {rate}",
            "usual for all weights of a model of this size; adapters need more, about 1e-4",
        ),
        _line('schedule = "constant"', 'or "linear" or "cosine", which fall to 0 at the end'),
        _line("checkpoint_every = 50", "steps between checkpoints, from which `--resume` continues"),
    ]


def _line(setting: str, comment: str) -> str:
    return f"{setting:<34}  # {comment}"


def _pair(key: str, value: str) -> str:
    return tomli_w.dumps({key: value}).strip()


def _inline(table: Mapping[str, str]) -> str:
    return "{ " + ", ".join(_pair(key, value) for key, value in table.items()) + " }"
