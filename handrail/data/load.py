"""Load problems from files, Hugging Face datasets, built-in tasks and reasoning-gym families."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handrail._util.errors import BadRow, UserError
from handrail.data.layouts import ABSENT, FIELDS, Layout, column_map_layout, lookup, recognize, to_problem
from handrail.data.rows import Row, brief, read
from handrail.data.tasks import TASKS
from handrail.types.problem import Problem


@dataclass(frozen=True)
class Loaded:
    """The problems of a source, and how they were read."""

    problems: list[Problem]
    layout: str
    """The layout that was recognized, or ``column map``, ``task`` or ``reasoning-gym``."""
    fields: str = ""
    """Which of our fields come from which column."""
    note: str = ""
    """The split that was chosen, if there are several and the source names none."""


@dataclass(frozen=True)
class Summary:
    """The counts that ``handrail check`` prints for a source."""

    source: str
    problems: int
    with_references: int
    references: int
    with_plan: int
    duplicates: int
    """Problems with exactly the prompt of an earlier one; ``duplicate_ids`` is the first such pair."""
    duplicate_ids: tuple[str, str] | None
    contradictions: int
    """Prompts with more than one answer; ``contradiction_ids`` are the first two problems that disagree."""
    contradiction_ids: tuple[str, str] | None


def load_problems(source: str, columns: Mapping[str, str] = {}) -> list[Problem]:
    """Return the problems of a source; see ``load``. Raises UserError."""
    return load(source, columns).problems


def load(source: str, columns: Mapping[str, str] = {}) -> Loaded:
    """Read a source and recognize its layout.

    A source is a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a directory of such files or of
    ``save_to_disk`` (``PATH#SPLIT``), a Hugging Face dataset (``NAME:CONFIG#SPLIT``),
    ``task:NAME?key=value&...`` or ``reasoning-gym:FAMILY?key=value&...``. ``columns`` maps our fields to the
    data's columns and so replaces recognition; tasks and reasoning-gym families have no columns and ignore
    it. Raises UserError, naming the file and line or row, for anything that cannot be used.
    """
    for kind, make in GENERATORS.items():
        if source.startswith(f"{kind}:"):
            return Loaded(make(source), kind)
    rows, note = read(source)
    if not rows:
        raise UserError(f"{source}: it is empty; give it at least one row")
    objects = [row.value for row in rows if isinstance(row.value, dict)]
    names = list(dict.fromkeys(name for row in objects for name in row))
    layout = _column_map(source, columns, objects, names) if columns else recognize(objects)
    return Loaded(_problems(rows, layout), layout.name, layout.describe_fields(names), note)


def describe(problems: list[Problem], source: str) -> Summary:
    """Count the problems, references and plans of a source, and find repeated prompts."""
    first: dict[str, Problem] = {}
    repeated: list[tuple[str, str]] = []
    contradicted: dict[str, tuple[str, str]] = {}
    for problem in problems:
        key = json.dumps(problem.prompt)
        earlier = first.setdefault(key, problem)
        if earlier is not problem:
            repeated.append((earlier.id, problem.id))
            if earlier.answer != problem.answer:
                contradicted.setdefault(key, (earlier.id, problem.id))
    return Summary(
        source=source,
        problems=len(problems),
        with_references=sum(bool(problem.references) for problem in problems),
        references=sum(len(problem.references) for problem in problems),
        with_plan=sum(problem.plan is not None for problem in problems),
        duplicates=len(repeated),
        duplicate_ids=next(iter(repeated), None),
        contradictions=len(contradicted),
        contradiction_ids=next(iter(contradicted.values()), None),
    )


def _column_map(
    source: str, columns: Mapping[str, str], rows: list[dict[str, Any]], names: list[str]
) -> Layout:
    for field, path in columns.items():
        if field not in FIELDS:
            raise UserError(
                f"{source}: the column map has the unknown field '{field}'; "
                f"the fields are {', '.join(FIELDS)}"
            )
        if rows and all(lookup(row, path) is ABSENT for row in rows):
            raise UserError(
                f"{source}, field {field}: the column map names the column '{path}', "
                f"which does not exist; the columns are {', '.join(names)}"
            )
    return column_map_layout(columns)


def _problems(rows: list[Row], layout: Layout) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}
    bad: list[tuple[Row, BadRow]] = []
    for row in rows:
        try:
            problem = _problem(row, layout)
            if problem.id in places:
                advice = f"'{problem.id}' is also the id of {places[problem.id]}: change one of them"
                raise BadRow("id", "another row has the same id", advice)
        except BadRow as error:
            bad.append((row, error))
        else:
            places[problem.id] = row.place
            problems.append(problem)
    if bad:
        objects = [row.value for row in rows if isinstance(row.value, dict)]
        filled = {
            field
            for field, column in layout.columns.items()
            if any(lookup(each, column) is not ABSENT for each in objects)
        }
        raise UserError(
            _error_message([(row.place, _of_this_row(error, row, layout, filled)) for row, error in bad])
        )
    return problems


def _problem(row: Row, layout: Layout) -> Problem:
    if isinstance(row.value, BadRow):
        raise row.value
    if not isinstance(row.value, dict):
        raise BadRow(None, "the row is not an object", 'write it as {"prompt": ..., "answer": ...}')
    return replace(to_problem(*layout.split(row.value), default_id=row.id), where=row.place)


def _of_this_row(error: BadRow, row: Row, layout: Layout, filled: Collection[str]) -> BadRow:
    """Return ``error``, or another if this row lacks a field that other rows have (``filled``)."""
    column = layout.columns.get(error.field or "")
    if column is None or not isinstance(row.value, dict) or lookup(row.value, column) is not ABSENT:
        return error
    if error.field not in filled:
        return error
    return BadRow(
        error.field, f"this row has no {error.field}", f"fill in its '{column}', or leave the row out"
    )


def _error_message(bad: list[tuple[str, BadRow]]) -> str:
    place, first = bad[0]
    more = sum((error.field, error.what) == (first.field, first.what) for _, error in bad) - 1
    where = f"{place}, field {first.field}" if first.field else place
    others = f" (and in {more} more row{'s' * (more > 1)})" if more else ""
    return f"{where}: {first.what}{others}; {first.advice}"


# Generated problems


def _options(source: str) -> tuple[str, dict[str, str]]:
    """Parse the name and the options of ``kind:NAME?key=value&key=value``."""
    name, _, query = source.partition(":")[2].partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{source}: '{part}' is not an option; write key=value, with & between options")
        if key in options:
            raise UserError(f"{source}: the option '{key}' is given twice; leave one out")
        if value[:1] in set("\"'[{"):
            raise UserError(
                f"{source}: the option '{key}' has the value {value}; write it without quotes or brackets"
            )
        options[key] = value
    return name, options


def _task(source: str) -> list[Problem]:
    name, given = _options(source)
    if name not in TASKS:
        raise UserError(f"{source}: there is no task '{name}'; the tasks are {', '.join(TASKS)}")
    task = TASKS[name]
    types = {key: kind for key, kind in get_type_hints(task.problems).items() if key != "return"}
    defaults = {
        key: parameter.default for key, parameter in inspect.signature(task.problems).parameters.items()
    }
    for key in given:
        if key not in types:
            raise UserError(f"{source}: the task has no option '{key}'; its options are {', '.join(types)}")
    options = defaults | {key: _convert(source, key, value, types[key]) for key, value in given.items()}
    for key, allowed in task.ranges(options).items():
        if options[key] not in allowed:
            raise UserError(
                f"{source}: {key} is {options[key]}; here it must be from {allowed[0]} to {allowed[-1]}"
            )
    return task.problems(**options)


def _convert(source: str, key: str, text: str, kind: Any) -> object:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise UserError(f"{source}: {key} is '{text}'; it must be one of {', '.join(get_args(kind))}")
        return text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{source}: {key} is '{text}'; it must be a whole number") from None


def _reasoning_gym(source: str) -> list[Problem]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    family, given = _options(source)
    if family not in DATASETS:
        near = difflib.get_close_matches(family, DATASETS) or sorted(DATASETS)
        raise UserError(
            f"{source}: reasoning-gym has no family '{family}'; did you mean one of {', '.join(near)}?"
        )
    fields = dataclasses.fields(DATASETS[family][1])
    config = {
        field.name: field.default for field in fields if isinstance(field.default, int | float | str | None)
    }
    options = {"size": 1000, "seed": 0} | _gym_options(source, given, config)
    try:
        entries = list(reasoning_gym.create_dataset(family, **options))
    except Exception as error:  # families raise different exceptions, some only when they generate an entry
        raise UserError(
            f"{source}: reasoning-gym refuses these options ({brief(error)}); change them"
        ) from error
    if any(entry["answer"] is None for entry in entries):
        raise UserError(
            f"{source}: this family's problems have no single answer to compare with; choose another family"
        )
    return [
        _gym_problem(source, family, options["seed"], number, entry) for number, entry in enumerate(entries)
    ]


def _gym_options(source: str, given: dict[str, str], config: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, text in given.items():
        name = "size" if key == "n" and "n" not in config else key  # n_queens has an n of its own
        if name not in config:
            raise UserError(
                f"{source}: the family takes no option '{key}' here; its options are n, {', '.join(config)}"
            )
        if name in options:
            raise UserError(f"{source}: n and size are the same option; leave one out")
        value = options[name] = _parse(text)
        if isinstance(value, str) and not isinstance(config[name], str | None):
            raise UserError(f"{source}: {key} is '{text}'; it must be a value like {config[name]!r}")
        if name in ("size", "seed") and type(value) is not int:
            raise UserError(f"{source}: {key} is '{text}'; it must be a whole number")
    if options.get("size", 1) < 1:
        raise UserError(f"{source}: the number of problems is {options['size']}; it must be at least 1")
    return options


def _parse(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _gym_problem(source: str, family: str, seed: int, number: int, entry: dict[str, Any]) -> Problem:
    metadata = {**entry["metadata"], "source_dataset": family}
    fields = {"prompt": entry["question"], "answer": entry["answer"], "reference": metadata.get("answer_cot")}
    try:
        return to_problem(fields, metadata, default_id=f"{family}-{seed}-{number}")
    except BadRow as error:
        raise UserError(_error_message([(f"{source}, row {number + 1}", error)])) from error


GENERATORS: dict[str, Callable[[str], list[Problem]]] = {"task": _task, "reasoning-gym": _reasoning_gym}
