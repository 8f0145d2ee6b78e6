"""Registry of terms: small changes of rewards and advantages that work under any method.

Your own subclass of Term can be anywhere: ``terms = [{ name = "my_file.py:MyTerm" }]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from handrail._util.errors import UserError
from handrail._util.imports import load_attribute
from handrail._util.section import explain
from handrail.methods.base import Term
from handrail.methods.terms.ace import Ace
from handrail.methods.terms.arm import Arm
from handrail.methods.terms.dmpo import DmpoMatching
from handrail.methods.terms.fapo import Fapo
from handrail.methods.terms.imentor import Imentor
from handrail.methods.terms.olr import Olr
from handrail.methods.terms.overlong import Overlong
from handrail.methods.terms.pacr import Pacr
from handrail.methods.terms.prorag import Prorag
from handrail.methods.terms.tgpo import TgpoAdvantage

TERMS: dict[str, type[Term]] = {
    "ace": Ace, "arm": Arm, "dmpo": DmpoMatching, "fapo": Fapo, "imentor": Imentor, "olr": Olr,
    "overlong": Overlong, "pacr": Pacr, "prorag": Prorag, "tgpo": TgpoAdvantage,
}  # fmt: skip


def build_term(settings: Mapping[str, Any], place: int) -> Term:
    """Build the term that an item of ``method.terms`` describes.

    Raises UserError for unknown names and settings.
    """
    where = f"method.terms[{place}]"
    name = str(settings.get("name", ""))
    if ":" in name:
        cls = load_attribute(name, where)
        if not (isinstance(cls, type) and issubclass(cls, Term)):
            raise UserError(f"{where}: {name} is not a subclass of handrail.Term")
    elif name.lower() in TERMS:
        cls, settings = TERMS[name.lower()], {**settings, "name": name.lower()}
    else:
        near = difflib.get_close_matches(name.lower(), TERMS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(TERMS)}"
        raise UserError(f"{where}: there is no term {name!r}; {hint}")
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(explain(error, cls, where)) from error


def refusal(one: str, other: str) -> str:
    """Why two terms, by name, cannot be combined; empty if they can."""
    pairs = ((one, other), (other, one))
    return next((TERMS[a].refuses[b] for a, b in pairs if a in TERMS and b in TERMS[a].refuses), "")


def require_compatible(names: Sequence[str]) -> None:
    """Raise UserError if terms of these names cannot be combined, or not in this order."""
    for place, name in enumerate(names):
        for earlier in names[:place]:
            if name == earlier and name in TERMS:
                raise UserError(f"method.terms: {name} is there twice; leave one of them out")
            if why := refusal(name, earlier):
                raise UserError(f"method.terms: {earlier} and {name} exclude each other, because {why}")
            if name in TERMS and earlier in TERMS[name].precedes:
                raise UserError(
                    f"method.terms: put {name} before {earlier}, whose rewards it would overwrite"
                )
