"""Row layouts: from a row of the user's data to a problem.

A layout says by which columns it is recognised, which of them holds which field of ours, and what is left to be done to
the fields' values. To recognise one more layout, add it to ``LAYOUTS``. A column map is a layout that the user gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from handrail.problems import Message, Problem

Row = Mapping[str, Any]
Fields = dict[str, Any]

FIELDS = ("prompt", "answer", "reference", "references", "plan", "id")
REQUIRED = ("prompt", "answer")
ROLES = ("system", "user", "assistant")
ABSENT = object()


class BadRow(Exception):
    """A row that cannot be used: in which field (if in one), what is wrong with it, and what to do.

    ``what`` holds nothing of the row itself, so rows that are bad in the same way have the same field and ``what``.
    """

    def __init__(self, field: str | None, what: str, advice: str) -> None:
        super().__init__(field, what, advice)
        self.field, self.what, self.advice = field, what, advice


@dataclass(frozen=True)
class Layout:
    """``needs``: the columns it is recognised by; ``columns``: our field -> their column; ``refine``: what is left to do."""

    name: str
    needs: frozenset[str]
    columns: Mapping[str, str] = field(default_factory=dict)
    refine: Callable[[Fields], Fields] = lambda fields: fields

    def fits(self, columns: Iterable[str]) -> bool:
        return self.needs <= set(columns)

    def split(self, row: Row) -> tuple[Fields, dict[str, Any]]:
        """Our fields, and the columns that none of them took whole. Raises BadRow where a required one is not there."""
        paths = {name: self.columns.get(name, name) for name in FIELDS}
        fields = {name: value for name, path in paths.items() if (value := lookup(row, path)) is not ABSENT}
        for name in REQUIRED:
            if name not in fields:
                raise BadRow(
                    name,
                    f"there is no column '{paths[name]}'",
                    f"the row has {', '.join(row) or 'no columns'}: rename one, or name it in the column map, "
                    f'columns = {{{name} = "their column"}}',
                )
        return self.refine(fields), {key: value for key, value in row.items() if key not in paths.values()}


def lookup(row: Row, path: str) -> Any:
    """The value at a column name or a dotted path, or ``ABSENT``."""
    if path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    return lookup(row[head], rest) if dot and isinstance(row.get(head), Mapping) else ABSENT


def final_answer(text: str) -> str:
    r"""What the last ``\boxed{}`` holds or else what follows a last line's ``####``. Raises BadRow if neither is whole."""
    start = text.rfind(r"\boxed{") + len(r"\boxed")
    if start >= len(r"\boxed"):
        depth = 0
        for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                return text[start + 1 : token.start()].strip()
        raise BadRow("answer", r"its last \boxed{ is never closed", "complete the text")
    # Only at the end, because "#### " also begins a Markdown heading.
    if match := re.search(r"####([^\n]*)\s*\Z", text):
        return match[1].strip()
    raise BadRow("answer", "its text does not end in '#### ANSWER'", 'add it, or give the answer\'s column, columns = {answer = "..."}')


def _messages_to_references(fields: Fields) -> Fields:
    target = fields.get("reference")
    if not isinstance(target, list):
        return fields
    return fields | {"reference": [part["content"] if isinstance(part, dict) and "content" in part else part for part in target]}


def _answer_in_solution(fields: Fields) -> Fields:
    text = fields["answer"]
    return fields | {"answer": final_answer(text), "reference": text} if isinstance(text, str) else fields


def _gsm8k(fields: Fields) -> Fields:
    fields = _answer_in_solution(fields)
    text = fields.get("reference")
    return fields | {"reference": re.sub(r"<<[^\n]*?>>", "", text)} if isinstance(text, str) else fields


def _trl(fields: Fields) -> Fields:
    worked = re.search(r"\\boxed\{|####", str(fields["answer"]))
    return _answer_in_solution(fields) if worked else fields


NATIVE = Layout("native", frozenset({"prompt", "answer"}))
LAYOUTS = (
    NATIVE,
    Layout(
        "LUFFY",
        frozenset({"prompt", "target", "reward_model"}),
        {"answer": "reward_model.ground_truth", "reference": "target"},
        _messages_to_references,
    ),
    Layout("GSM8K", frozenset({"question", "answer"}), {"prompt": "question"}, _gsm8k),
    Layout("TRL", frozenset({"prompt", "solution"}), {"answer": "solution"}, _trl),
)


def recognise(columns: Iterable[str]) -> Layout:
    """The first layout that fits; else the native one, whose errors say which columns are missing."""
    present = frozenset(columns)
    return next((layout for layout in LAYOUTS if layout.fits(present)), NATIVE)


def to_problem(fields: Fields, metadata: dict[str, Any], default_id: str) -> Problem:
    """A problem of checked fields. Raises BadRow."""
    plan, id = _filled(fields.get("plan")), _filled(fields.get("id"))
    return Problem(
        id=default_id if id is None else _text_or_number("id", id),
        prompt=_prompt(fields["prompt"]),
        answer=_text_or_number("answer", fields["answer"]),
        references=(*_references("reference", fields), *_references("references", fields)),
        plan=None if plan is None else _text("plan", plan),
        metadata=metadata,
    )


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _text(field: str, value: object, wanted: str = "text") -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"it is {_kind(value)}", f"make it {wanted}")
    if not value.strip():
        raise BadRow(field, "it is empty", "fill it in, or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(field, "it holds half a character (a lone surrogate)", "write the character in full") from None
    return value


def _text_or_number(field: str, value: object) -> str:
    if value is None:
        raise BadRow(field, "it is empty (null)", "fill it in, or leave the row out")
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return _text(field, value, "text or a number")
    if not math.isfinite(value):
        raise BadRow(field, "it is NaN or infinite", "give a finite number, or text")
    return str(value)


def _prompt(value: object) -> str | list[Message]:
    if not isinstance(value, list):
        return _text("prompt", value, "text or a list of messages")
    if not value:
        raise BadRow("prompt", "it is empty", "fill it in, or leave the row out")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise BadRow("prompt", "a message lacks a role or a content of text", "write each as {role: ..., content: ...}")
        if message["role"] not in ROLES:
            raise BadRow("prompt", "a message has an unknown role", f"'{message['role']}' is none of {', '.join(ROLES)}")
    if value[-1]["role"] != "user":
        role = value[-1]["role"]
        raise BadRow("prompt", f"its last message is from the {role}", "end it with the user's message, which the policy is to answer")
    _text("prompt", value[-1]["content"])
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _filled(value: object) -> object | None:
    """None for blank text too: a CSV or Parquet file cannot leave an optional column out of one row."""
    return None if isinstance(value, str) and not value.strip() else value


def _references(field: str, fields: Fields) -> list[str]:
    value = _filled(fields.get(field))
    if value is None:
        return []
    if not isinstance(value, list):
        return [_text(field, value, "text or a list of texts")]
    parts = [part for part in map(_filled, value) if part is not None]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(field, "the list holds something that is not text", "write every reference as text")
    return [_text(field, part) for part in parts]
