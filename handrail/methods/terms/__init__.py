"""Registry of terms: small changes of rewards and advantages that work under any method.

Your own subclass of Term can be anywhere: ``terms = [{ name = "my_file.py:MyTerm" }]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from handrail._util.errors import UserError
from handrail._util.imports import load_attribute
from handrail._util.section import explain
from handrail.methods.base import Term
from handrail.methods.terms.ace import Ace
from handrail.methods.terms.arm import Arm

TERMS: dict[str, type[Term]] = {"ace": Ace, "arm": Arm}


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
    elif name in TERMS:
        cls = TERMS[name]
    else:
        near = difflib.get_close_matches(name, TERMS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(TERMS)}"
        raise UserError(f"{where}: there is no term {name!r}; {hint}")
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(explain(error, cls, where)) from error
