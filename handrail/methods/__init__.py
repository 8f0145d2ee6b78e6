"""Registry of methods.

A paper is one file here; your own can be anywhere: ``name = "my_file.py:MyMethod"``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from handrail._util.errors import UserError
from handrail._util.imports import load_attribute
from handrail._util.section import explain
from handrail.methods.actguide import ActGuide
from handrail.methods.autonpo import AutoNpo
from handrail.methods.base import Method, MethodSettings, Term
from handrail.methods.calibrl import CalibRL
from handrail.methods.cso import Cso
from handrail.methods.dmpo import Dmpo
from handrail.methods.grpo import Grpo
from handrail.methods.int import InT
from handrail.methods.luffy import Luffy
from handrail.methods.npo import Npo
from handrail.methods.scope import Scope
from handrail.methods.sft import Dft, GrpoSft, Sft, SftOnFailures
from handrail.methods.sort import Sort
from handrail.methods.stride import Stride
from handrail.methods.terms import TERMS, build_term, refusal, require_compatible
from handrail.methods.tgpo import Tgpo
from handrail.models.config import RolloutConfig

_ALL: tuple[type[Method[Any]], ...] = (
    Grpo, Sft, GrpoSft, SftOnFailures, Dft,
    Luffy, Sort, Scope,
    ActGuide, AutoNpo, CalibRL, Cso, Dmpo, InT, Npo, Stride, Tgpo,
)  # fmt: skip
METHODS: dict[str, type[Method[Any]]] = {cls.name: cls for cls in _ALL}


VARIANTS = {
    "dapo": 'clip_high = 0.28, loss_normalizer = "token" and skip_dead_groups = true',
    "drgrpo": 'normalize_std = false and loss_normalizer = "constant"',
    "gspo": 'ratio = "sequence", clip_low = 3e-4 and clip_high = 4e-4',
}
"""Methods that grpo is with these settings, by their names without punctuation."""


def find(name: str) -> type[Method[Any]]:
    """Return the class of a method, whose name may be in capitals. Raises UserError if there is none."""
    if name.lower() in METHODS:
        return METHODS[name.lower()]
    if ":" in name:
        cls = load_attribute(name, "method.name")
        if isinstance(cls, type) and issubclass(cls, Method):
            return cls
        raise UserError(f"method.name: {name} is not a subclass of handrail.Method")
    if variant := VARIANTS.get(re.sub(r"[\W_]", "", name.lower())):
        raise UserError(f'method.name: {name} is grpo with {variant}; set these, and method.name = "grpo"')
    near = difflib.get_close_matches(name.lower(), METHODS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(METHODS)}"
    raise UserError(f"method.name: there is no method {name!r}; {hint}")


def build(
    settings: dict[str, Any],
    rollout: RolloutConfig,
    cls: type[Method[Any]] | None = None,
    terms: Sequence[Term] = (),
) -> Method[Any]:
    """Build the method that a ``[method]`` section describes; ``cls``, if given, replaces the class it names.

    ``terms``: more of them, after those of the settings. Raises UserError if a name or setting is unknown, or
    if groups are too small for the method.
    """
    cls = cls or find(str(settings.get("name", "grpo")))
    if rollout.group_size < cls.smallest_group:
        name = cls.name or cls.__name__
        raise UserError(
            f"rollout.group_size is {rollout.group_size}, and {name} compares the members of a group with "
            f"each other; set it to {cls.smallest_group} or more"
        )
    try:
        parsed: MethodSettings = cls.Settings.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain(error, cls.Settings, "method")) from error
    terms = [*(build_term(each, place) for place, each in enumerate(parsed.terms, 1)), *terms]
    if terms and not cls.uses_advantages:
        raise UserError(
            f"method.terms: {cls.name} has no advantages that a term could change; leave them out"
        )
    require_compatible([term.name for term in terms])
    for term in terms:
        if why := cls.refuses.get(term.name):
            raise UserError(f"method.terms: {cls.name} and {term.name} exclude each other, because {why}")
    return cls(parsed, rollout.group_size, rollout.max_tokens, terms)


def verbs(cls: type[Method[Any]] | type[Term]) -> list[str]:
    """Verbs that a method or a term has of its own, in the order in which they are called."""
    base: type = Method if issubclass(cls, Method) else Term
    every = ("samples", "reward", "guide", "observe", "learn", "credit", "surrogate")
    own = {
        verb for verb in (*every, "advantages") if getattr(cls, verb, None) is not getattr(base, verb, None)
    }
    own |= {"credit"} if "advantages" in own else set()
    return [verb for verb in every if verb in own]


def combinations(cls: type[Method[Any]]) -> tuple[list[str], dict[str, str]]:
    """The terms that a method can have, and those that it refuses, with the reason."""
    if not cls.uses_advantages:
        return [], {"all terms": "it has no advantages that a term could change"}
    return [name for name in TERMS if name not in cls.refuses], dict(cls.refuses)


def term_combinations(name: str) -> tuple[list[str], dict[str, str]]:
    """The methods and terms that a term can be combined with, and those that it refuses, with the reason."""
    others = {other: refusal(name, other) for other in TERMS if other != name}
    refused = {f"term {other}": why for other, why in others.items() if why}
    refused |= {
        f"method {key}": cls.refuses.get(name, "it has no advantages that a term could change")
        for key, cls in METHODS.items()
        if name in cls.refuses or not cls.uses_advantages
    }
    kinds = [*(f"method {key}" for key in METHODS), *(f"term {key}" for key in others)]
    return [kind for kind in kinds if kind not in refused], refused
