"""Row layouts: turn a row of the user's data into a problem.

A layout names the columns by which it is recognized, maps our fields to columns, and may convert the values
further. To recognize another layout, add it to ``LAYOUTS``. A column map is a layout that the user gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from handrail._util.errors import BadRow
from handrail._util.numerals import positional
from handrail._util.thinking import after_thinking, answer_start
from handrail.data.choices import are_choices, with_choices
from handrail.types.problem import Message, Problem

Row = Mapping[str, Any]
Fields = dict[str, Any]

REQUIRED = ("prompt", "answer")
OPTIONAL = ("reference", "references", "plan", "id")
FIELDS = (*REQUIRED, "choices", *OPTIONAL)
ROLES = ("system", "user", "assistant")
ABSENT = object()
NO_ANSWER = ("proof", "notfound")
"""The values of NuminaMath-1.5 for problems without an answer to compare with."""


@dataclass(frozen=True)
class Layout:
    """A map from our fields to the data's columns, and the conversion of their values.

    ``needs`` are the columns by which the layout is recognized (none for a column map). ``columns`` maps our
    fields to columns or dotted paths. ``worked`` is True if the answer's column holds worked solutions, from
    which the answer is extracted. ``exact`` is True if other answers are kept as they are, even in a box.
    ``refine`` makes any further conversion.
    """

    name: str
    needs: frozenset[str]
    columns: Mapping[str, str]
    worked: bool = False
    exact: bool = False
    refine: Callable[[Fields], Fields] = lambda fields: fields

    def split(self, row: Row) -> tuple[Fields, dict[str, Any]]:
        """Return our fields, and the other columns as metadata.

        A column of which a field takes only a part, by a dotted path, is metadata too; a value that could not
        be read is not. Raises BadRow if the row has no prompt or no answer, or a value that cannot be used.
        """
        found = {name: lookup(row, path) for name, path in self.columns.items()}
        fields = {name: value for name, value in found.items() if value is not ABSENT}
        for name, value in fields.items():
            if isinstance(value, BadRow):
                raise BadRow(name, value.what, value.advice)
        for name in REQUIRED:
            if name not in fields:
                advice = (
                    f"the row has {', '.join(row) or 'no columns'}: rename one, "
                    f'or name it in the column map, columns = {{{name} = "their column"}}'
                )
                raise BadRow(name, f"there is no column '{self.columns[name]}'", advice)
        if self.needs:  # a user who maps columns has decided to ignore the others, images included
            _refuse_images(row)
        fields = self.refine(
            _extract_answer(fields) if self.worked else fields if self.exact else _unbox(fields)
        )
        if fields.get("choices"):
            prompt, answer = with_choices(fields["prompt"], fields["answer"], fields["choices"])
            fields |= {"prompt": prompt, "answer": answer}
        used = set(self.columns.values())
        others = {key: value for key, value in row.items() if key not in used}
        return fields, {key: value for key, value in others.items() if not isinstance(value, BadRow)}

    def describe_fields(self, columns: Iterable[str]) -> str:
        """Tell the user which of our fields come from which of ``columns``."""
        present = set(columns)
        found = {
            name: path for name, path in self.columns.items() if {path, path.partition(".")[0]} & present
        }
        said = {name: name if name == path else f"{name} from {path}" for name, path in found.items()}
        if self.worked:
            column = self.columns["answer"]
            said["answer"] = rf"answer from the last \boxed{{}} or #### of {column}"
            said.setdefault("reference", f"reference from {column}")
        if "choices" in said:
            said["answer"] += " as a letter"
            said["choices"] += " written into the prompt"
        return ", ".join(said.values())


def lookup(row: Row, path: str) -> Any:
    """Return the value at a column name or a dotted path, else ``ABSENT``; a BadRow if it is unreadable."""
    if path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    inner = row.get(head) if dot else ABSENT
    return (
        lookup(inner, rest) if isinstance(inner, Mapping) else inner if isinstance(inner, BadRow) else ABSENT
    )


def final_answer(text: str) -> str | None:
    """Return what ``last_marked`` finds after the thinking: a draft in it is no answer. Raises BadRow."""
    return last_marked(after_thinking(text))


def last_marked(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, else the text after ``####`` in the last line, else None.

    Raises BadRow if the box is never closed.
    """
    start = text.rfind(r"\boxed{") + len(r"\boxed")
    if start >= len(r"\boxed"):
        depth = 0
        for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                return text[start + 1 : token.start()].strip()
        raise BadRow("answer", r"its last \boxed{ is never closed", "complete the text")
    # Only in the last line, because "#### " also begins a Markdown heading.
    match = re.search(r"####([^\n]*)\s*\Z", text)
    return match[1].strip() if match else None


def is_worked(answer: object) -> bool:
    r"""True if ``answer`` is a text with more than the answer, which is in ``\boxed{}`` or after ``####``."""
    try:
        found = last_marked(answer) if isinstance(answer, str) else None
    except BadRow:
        return True
    return found is not None and not _is_only(found, str(answer))


def _is_only(answer: str, text: str) -> bool:
    """True if ``text`` contains nothing but ``answer`` and its mark."""
    return re.sub(r"\\boxed|####|[{}$.\s]", "", text) == re.sub(r"[{}$.\s]", "", answer)


def _extract_answer(fields: Fields) -> Fields:
    """Extract the answer from a worked solution.

    The solution becomes the reference if the row has none, unless it is the bare answer.
    """
    text = fields["answer"]
    if text is None:
        return fields
    if not isinstance(text, str) or (answer := final_answer(text)) is None:
        part = " after the thinking" if isinstance(text, str) and answer_start(text) else ""
        what = rf"its text{part} holds no \boxed{{ANSWER}} and does not end in '#### ANSWER'"
        raise BadRow("answer", what, "add it, or leave the row out")
    reference = {} if _is_only(answer, text) or fields.get("reference") else {"reference": text}
    return fields | {"answer": answer} | reference


def _unbox(fields: Fields) -> Fields:
    """Remove the box or ``####`` from a bare answer. Raises BadRow for a worked solution."""
    text = fields["answer"]
    if is_worked(text):
        what = "it is a worked solution, and most rows have a bare answer"
        raise BadRow("answer", what, "keep only the answer")
    if not isinstance(text, str):
        return fields
    if text.strip().casefold() in NO_ANSWER:
        what = "it says that there is no answer to compare with ('proof' or 'notfound')"
        raise BadRow("answer", what, "leave the row out")
    answer = final_answer(text)
    return fields if answer is None else fields | {"answer": answer}


def _refuse_images(row: Row) -> None:
    for name, value in row.items():
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict) and part.get("bytes") for part in parts):
            advice = "leave the row out, or map the columns to ignore it"
            raise BadRow(name, "it holds an image, and handrail trains on text alone", advice)


def _without_calculator(fields: Fields) -> Fields:
    """Remove GSM8K's calculator annotations, ``<<48/2=24>>``, from the reference."""
    text = fields.get("reference")
    return fields | {"reference": re.sub(r"<<[^\n]*?>>", "", text)} if isinstance(text, str) else fields


def _verl(fields: Fields) -> Fields:
    """Turn messages into texts, and parse Skywork's answers, each a JSON list in a string: ``'["42"]'``."""
    answer, target = fields["answer"], fields.get("reference")
    if isinstance(answer, str) and answer.startswith('["'):
        with suppress(ValueError):
            fields = fields | {"answer": json.loads(answer)}
    if isinstance(target, list):
        texts = [part.get("content", part) if isinstance(part, dict) else part for part in target]
        fields = fields | {"reference": texts}
    return fields


def _with_context(fields: Fields) -> Fields:
    """Put the context, if there is one, before the prompt."""
    context, prompt = fields.pop("context", None), fields["prompt"]
    if not isinstance(context, str) or not context.strip():
        return fields
    return fields | {"prompt": f"{context}\n\n{prompt}"}


def _gpqa(fields: Fields) -> Fields:
    """Sort the choices, so that their order does not reveal the correct one."""
    wrong = [fields.pop(f"wrong_{number}", None) for number in (1, 2, 3)]
    return fields | {"choices": sorted([fields["answer"], *wrong], key=str)}


def _layout(
    name: str,
    needs: str,
    prompt: str,
    answer: str,
    reference: str = "reference",
    more: Mapping[str, str] = {},
    worked: bool = False,
    refine: Callable[[Fields], Fields] = lambda fields: fields,
) -> Layout:
    by_name = {field: field for field in OPTIONAL}
    columns = {"prompt": prompt, "answer": answer, **by_name, "reference": reference, **more}
    return Layout(name, frozenset(needs.split(", ")), columns, worked, refine=refine)


NATIVE = replace(_layout("native", "prompt, answer", "prompt", "answer"), exact=True)
QUESTION = _layout("question and answer", "question, answer", "question", "answer")
GSM8K = _layout("GSM8K", "question, answer", "question", "answer", worked=True, refine=_without_calculator)
TRUTH = "reward_model.ground_truth"
CONTEXT = {"context": "context"}
WRONG = {f"wrong_{number}": f"Incorrect Answer {number}" for number in (1, 2, 3)}
# Each has a name, the columns to recognize it by, and the columns of the prompt, answer and reference.
LAYOUTS = (
    NATIVE,
    _layout("LUFFY", "prompt, reward_model, target", "prompt", TRUTH, "target", refine=_verl),
    _layout("verl", "prompt, reward_model", "prompt", TRUTH, refine=_verl),
    _layout("TRL", "prompt, solution", "prompt", "solution"),
    QUESTION,
    _layout("MATH-500", "problem, answer", "problem", "answer", "solution"),
    _layout("MATH", "problem, solution", "problem", "solution", worked=True),
    _layout("AIME", "Problem, Answer", "Problem", "Answer", "Solution", {"id": "ID"}),
    _layout("OpenMath", "problem, expected_answer", "problem", "expected_answer", "generated_solution"),
    _layout(
        "OlympiadBench",
        "question, final_answer",
        "question",
        "final_answer",
        "solution",
        CONTEXT,
        refine=_with_context,
    ),
    _layout("s1K", "question, solution", "question", "solution"),
    _layout("ARC", "question, choices, answerKey", "question", "answerKey"),
    _layout("AQuA", "question, options, correct", "question", "correct"),
    _layout("GPQA", "Question, Correct Answer", "Question", "Correct Answer", more=WRONG, refine=_gpqa),
)


def column_map_layout(columns: Mapping[str, str]) -> Layout:
    """Return the layout of a column map.

    The prompt and the answer come from the columns of that name unless mapped; any other column that is not
    mapped is metadata.
    """
    return Layout("column map", frozenset(), {field: field for field in REQUIRED} | dict(columns), exact=True)


def recognize(rows: Sequence[Row]) -> Layout:
    """Return the first layout whose columns exist, else the native one, whose errors name what is missing.

    If most answers are worked solutions, all of them are taken to be.
    """
    columns = {name for row in rows for name in row}
    layout = next((layout for layout in LAYOUTS if layout.needs <= columns), NATIVE)
    answers = [answer for row in rows if isinstance(answer := lookup(row, layout.columns["answer"]), str)]
    if 2 * sum(map(is_worked, answers)) > len(answers):
        layout = GSM8K if layout is QUESTION else replace(layout, worked=True)
    choices = "choices" if "choices" in columns else "options"
    if layout.name == "native" and not any(are_choices(row.get(choices)) for row in rows):
        return layout  # not choices: a column of the user's own with the same name, kept as metadata
    return replace(layout, columns={**layout.columns, "choices": choices})


def to_problem(fields: Fields, metadata: dict[str, Any], default_id: str) -> Problem:
    """Check the fields and make them a problem. Raises BadRow."""
    plan, id = _none_if_blank(fields.get("plan")), _none_if_blank(fields.get("id"))
    return Problem(
        id=default_id if id is None else _text_or_number("id", id),
        prompt=_prompt(fields["prompt"]),
        answer=_text_or_number("answer", _single(fields["answer"])),
        references=(*_references("reference", fields), *_references("references", fields)),
        plan=None if plan is None else _text("plan", plan),
        metadata=metadata,
    )


def _kind(value: object) -> str:
    kinds = {
        bool: "true or false",
        int | float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _text(field: str, value: object, wanted: str = "text") -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"it is {_kind(value)}", f"make it {wanted}")
    if not value.strip():
        raise BadRow(field, "it is empty", "fill it in, or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError:
        what = "it holds half a character (a lone surrogate)"
        raise BadRow(field, what, "write the whole character") from None
    return value


def _single(answer: object) -> object:
    """Take the answer out of a list of one, as verl and OlympiadBench write it."""
    if not isinstance(answer, list):
        return answer
    if len(answer) != 1:
        advice = "give one answer, because a verifier compares with one"
        raise BadRow("answer", f"it is a list of {len(answer)}", advice)
    return answer[0]


def _text_or_number(field: str, value: object) -> str:
    if value is None:
        raise BadRow(field, "it is empty (null)", "fill it in, or leave the row out")
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return _text(field, value, "text or a number")
    try:
        return positional(value)
    except ValueError:
        raise BadRow(field, "it is NaN or infinite", "give a finite number, or text") from None
    except OverflowError:
        raise BadRow(field, "it is a number of hundreds of digits", "give it as text") from None


def _prompt(value: object) -> str | list[Message]:
    if not isinstance(value, list):
        return _text("prompt", value, "text or a list of messages")
    if not value:
        raise BadRow("prompt", "it is empty", "fill it in, or leave the row out")
    value = [_join_text_parts(message) for message in value]
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            what = "a message has no role or no text as content"
            raise BadRow("prompt", what, "write each as {role: ..., content: ...}")
        if message["role"] not in ROLES:
            advice = f"'{message['role']}' is none of {', '.join(ROLES)}"
            raise BadRow("prompt", "a message has an unknown role", advice)
    if value[-1]["role"] != "user":
        role = value[-1]["role"]
        advice = "end it with the user's message, because the policy answers that and continues no other"
        raise BadRow("prompt", f"its last message is from the {role}", advice)
    _text("prompt", value[-1]["content"])
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _join_text_parts(message: Any) -> Any:
    """Join the text parts of a multimodal message into one text."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) and "type" in part for part in parts):
        return message
    if other := [part["type"] for part in parts if part["type"] != "text"]:
        advice = f"remove its part of type {other[0]!r}, or leave the row out"
        raise BadRow("prompt", "a message holds more than text", advice)
    texts = [part.get("text") for part in parts]
    return {**message, "content": "".join(texts)} if all(isinstance(text, str) for text in texts) else message


def _none_if_blank(value: object) -> object | None:
    """Return None for blank text, because Parquet rows cannot leave out an optional column."""
    return None if isinstance(value, str) and not value.strip() else value


def _references(field: str, fields: Fields) -> list[str]:
    value = _none_if_blank(fields.get(field))
    if value is None:
        return []
    if not isinstance(value, list):
        return [_text(field, value, "text or a list of texts")]
    parts = [part for part in map(_none_if_blank, value) if part is not None]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(field, "the list holds something that is not text", "write every reference as text")
    return [_text(field, part) for part in parts]
