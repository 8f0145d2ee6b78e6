"""Base class for sections of the configuration, each defined beside what it configures."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

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


class Section(BaseModel):
    """A section of the configuration: immutable, and unknown keys are an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Describe the first error in one sentence: the dotted key, what it should be, and the value found."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(([prefix] if prefix else []) + location)
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys(model, location[:-1])
        renamed = RENAMED.get(location[-1], "")
        near = [renamed] if renamed in known else difflib.get_close_matches(location[-1], known, 1)
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
        # An optional section is a union with None.
        kinds = get_args(field.annotation) or (field.annotation,) if field else ()
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
