"""What a method and its terms do together: learn, keep state, and ask experts."""

from __future__ import annotations

from typing import Any

from handrail.experts.registry import Experts
from handrail.methods.base import Method, State, Stateful


def observers(method: Method[Any]) -> list[Stateful]:
    """The method and those of its terms that observe groups."""
    return [each for each in (method, *method.terms) if type(each).observe is not Stateful.observe]


def state_of(method: Method[Any]) -> State:
    """State of the method and its terms for a checkpoint."""
    return {"method": method.state(), "terms": [term.state() for term in method.terms]}


def restore(method: Method[Any], state: State) -> None:
    """Restore from ``state_of()``, which may be part of a larger state."""
    method.load_state(state["method"])
    for term, own in zip(method.terms, state["terms"], strict=True):
        term.load_state(own)


def require_experts(method: Method[Any], experts: Experts) -> None:
    """Raise UserError if an expert or a teacher that the method or a term asks cannot be loaded."""
    asking = {"method": method.experts}
    asking |= {f"method.terms[{place}]": term.experts for place, term in enumerate(method.terms, 1)}
    for section, named in asking.items():
        for role, name in named.items():
            experts.check(role, name, f"{section}.{role}")
    if "teacher" in method.models:
        experts.white_box(experts.policy)
