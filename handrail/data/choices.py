"""Multiple choice: list the lettered choices in the prompt and make the correct letter the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from handrail._util.errors import BadRow

TWO_TEXTS = "make them a list of two texts or more, or {text: [...], label: [...]}"


def are_choices(value: object) -> bool:
    """True if ``value`` is a list of at least two texts or numbers, or ARC's object with such a list."""
    if isinstance(value, dict):
        value = value.get("text")
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(each, str | int | float) for each in value)
    )


def with_choices(prompt: Any, answer: object, choices: Any) -> tuple[Any, object]:
    """Return the prompt with the choices listed, and the letter of the answer. Raises BadRow.

    ``answer`` is a letter, the index of the choice (from 0, as in MMLU), or the text of the choice. Choices
    that the prompt already lists with their letters are not added again.
    """
    labels, texts = _read(choices)
    label = labels[_answer_index(answer, labels, texts)]
    question = prompt[-1]["content"] if _is_chat(prompt) else prompt
    if not isinstance(question, str) or _lists_choices(question, labels, texts):
        return prompt, label
    question += "\n\n" + "\n".join(f"{each}. {text}" for each, text in zip(labels, texts, strict=True))
    return ([*prompt[:-1], {**prompt[-1], "content": question}] if _is_chat(prompt) else question), label


def _read(choices: Any) -> tuple[Sequence[str], list[str]]:
    if not are_choices(choices):
        raise BadRow("choices", "this is not a list of at least two choices", TWO_TEXTS)
    labels: Sequence[str] = ascii_uppercase
    if isinstance(choices, dict):
        labels, choices = choices.get("label") or labels, choices["text"]
    if len(choices) > len(labels):
        raise BadRow("choices", "there are more choices than labels", "leave some out")
    if not all(isinstance(each, str) for each in choices):
        raise BadRow("choices", "one of them is not text", "write each as text")
    texts = [each.strip() for each in choices]
    # AQuA's choices begin with their letter: A)21
    pairs = zip(labels, texts, strict=False)
    marked = [re.match(rf"\(?{re.escape(label)}[).:]\s*(.*)", text, re.DOTALL) for label, text in pairs]
    return labels[: len(texts)], [match[1] for match in marked if match] if all(marked) else texts


def _answer_index(answer: object, labels: Sequence[str], texts: list[str]) -> int:
    """Return the index of the correct choice."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            what = "no choice has this number, counting from 0"
            raise BadRow("answer", what, "count from 0, or give the letter")
        return answer
    text = answer.strip() if isinstance(answer, str) else None
    found = {place for names in (labels, texts) for place, name in enumerate(names) if name == text}
    if len(found) != 1:
        both, neither = (
            "it is the letter of one choice and the text of another",
            "it is neither a choice's letter nor a choice",
        )
        what = both if found else neither
        raise BadRow("answer", what, "give the letter of the correct choice, or its number, counting from 0")
    return found.pop()


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list) and bool(prompt) and isinstance(prompt[-1], dict) and "content" in prompt[-1]
    )


def _lists_choices(question: str, labels: Sequence[str], texts: list[str]) -> bool:
    pairs = zip(labels, texts, strict=True)
    lines = (rf"\b{re.escape(label)}[).:\]]\s*{re.escape(text)}" for label, text in pairs)
    return re.search(r".*?".join(lines), question, re.DOTALL) is not None
