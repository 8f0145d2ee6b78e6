"""Settings of the training data and its prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from handrail._util.section import Section


class Source(Section):
    """A source of training problems, and its share of every step."""

    path: str = Field(min_length=1)
    """A data file, a directory, a dataset, ``task:NAME?key=value`` or ``reasoning-gym:FAMILY?key=value``."""
    share: float = Field(1.0, gt=0)
    """The source's share of the problems of a step, relative to the shares of the other sources."""
    probe: str | None = None
    """The ``problems.jsonl`` that ``handrail probe`` wrote for this source; train only on its problems of the
    kinds in ``keep``."""
    keep: list[Literal["all_wrong", "mixed", "all_right", "faulty"]] = Field(
        ["all_wrong", "mixed"], min_length=1
    )
    """The kinds of probed problems to train on; a problem with a fault counts as ``faulty``, whatever its
    rollouts."""


def _one_source(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    return (
        [{"path": item} if isinstance(item, str) else item for item in values]
        if isinstance(values, list)
        else values
    )


class TrainingData(Section):
    """The training data."""

    train: Annotated[
        list[Source], BeforeValidator(_one_source, str | list[str | Source]), Field(min_length=1)
    ]
    """One source, or a list of sources with shares: ``[{path = "hard.jsonl", share = 3}, {path =
    "easy.jsonl"}]``."""
    columns: dict[str, str] = {}
    """Map from our fields to the data's columns, for data whose layout is not recognized: ``{prompt =
    "question"}``."""
    too_long: Literal["refuse", "skip"] = "refuse"
    """What to do if problems exceed the model's context: ``refuse`` stops the run and says how many,
    ``skip`` leaves them out."""


class PromptFormat(Section):
    """How a problem becomes the prompt that the model sees."""

    chat: bool | None = None
    """Wrap a text prompt in the tokenizer's chat template, as the user's message (default: on if the
    tokenizer has a template)."""
    system: str | None = None
    """System message for chat models; a prompt with its own system message keeps that one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra arguments of the chat template, by name: ``{enable_thinking = false}``."""
    prompt_template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """Template for text prompts: the prompt replaces ``{prompt}``."""
    plan_template: str = Field(
        "{prompt}\n\nPlan:\n{plan}", pattern=r"\{prompt\}[\s\S]*\{plan\}|\{plan\}[\s\S]*\{prompt\}"
    )
    """Template for a prompt with its plan; SORT scores references after this prompt."""


class DataConfig(PromptFormat, TrainingData):
    """The training data and the format of its prompts."""
