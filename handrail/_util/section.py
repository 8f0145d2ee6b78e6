"""Base class for sections of the configuration, each defined beside what it configures."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from handrail._util.errors import UserError

Parsed = TypeVar("Parsed", bound=BaseModel)

RENAMED = {
    "correction": "importance_weight_cap",
    "least_right": "min_correct_prefix",
    "most_gap": "max_mismatch",
    "most_skipped": "max_skipped_updates",
    "normaliser": "loss_normalizer",
    "strength": "imitation_coef",
    "tries": "max_attempts",
}
"""Keys of earlier configurations, and what they are called now."""
SHOWN = 100
"""The most characters to show of a value."""


class Section(BaseModel):
    """A section of the configuration: immutable, and unknown keys are an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def validated(model: type[Parsed], values: Any, prefix: str = "") -> Parsed:
    """Parse a section. Raises UserError, naming the key below ``prefix``, if a value cannot be used."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, model, prefix)) from error


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted keys; items of lists of tables are numbered from 1, as in ``data.train[1].path``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flat(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            out |= flat({f"{name}[{number}]": item for number, item in enumerate(value, 1)})
        else:
            out[name] = value
    return out


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Describe the first error in one sentence: the dotted key, what it should be, and the value found."""
    first = error.errors()[0]
    location = list(first["loc"])
    key = _dotted([prefix, *location] if prefix else location)
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    if first["type"] == "extra_forbidden":
        known, name = _keys(model, location[:-1]), str(location[-1])
        renamed = RENAMED.get(name, "")
        near = [renamed] if renamed in known else difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"there is no setting {key}; {hint}{more}"
    if first["type"] == "missing":
        return f"the setting {key} is missing{more}"
    where = f"{key}: " if key else ""
    if first["type"] == "value_error":
        return f"{where}{first['msg'].removeprefix('Value error, ')}{more}"
    should = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] in ("dict_type", "model_type"):
        should = f"input should be a table, {_example(location, _keys(model, location), first['input'])}"
    found = repr(first["input"])
    return f"{where}{should}, not {found if len(found) <= SHOWN else found[: SHOWN - 1] + '…'}{more}"


def _dotted(location: Sequence[str | int]) -> str:
    """Write a key with the items of lists counted from 1: ``method.terms[1].name``."""
    parts = [f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _example(location: Sequence[str | int], keys: Sequence[str], found: object) -> str:
    """Write a table with one of its ``keys``; text that was given instead is taken for a name or path."""
    free = "name" if {"method", "terms", "sets"} & {*location} else "key"  # tables whose keys vary
    key = next((key for key in ("path", "name", "train") if key in keys), keys[0] if keys else free)
    value = json.dumps(found) if isinstance(found, str) and key in ("path", "name", "train") else "…"
    return f"{{ {key} = {value} }}"


def _keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an item of a list, whose model is known already
            continue
        field = model.model_fields.get(part)
        # An optional section is a union with None, a list of sections has them as its items.
        kinds = get_args(field.annotation) or (field.annotation,) if field else ()
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
