"""The public interface as text: names and signatures. A change shows up as a diff of tests/api.txt.

To accept a change, run ``python -m tests.test_api > tests/api.txt``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import handrail

TEXT = Path(__file__).with_name("api.txt")


def members(name: str, cls: type) -> Iterator[str]:
    """Return the public methods, properties and annotated attributes that the class itself defines."""
    for attribute, kind in sorted(vars(cls).get("__annotations__", {}).items()):
        if not attribute.startswith("_"):
            yield f"{name}.{attribute}: {kind}"
    for attribute, value in sorted(vars(cls).items()):
        if attribute.startswith("_") and attribute not in ("__init__", "__call__"):
            continue
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if inspect.isfunction(value):
            yield f"{name}.{attribute}{signature(value)}"
        elif isinstance(value, property) and value.fget:
            yield f"{name}.{attribute} -> {inspect.signature(value.fget).return_annotation}"


def signature(function: Callable[..., object]) -> str:
    return re.sub(r"<function .*? at 0x\w+>", "<function>", str(inspect.signature(function)))


def interface() -> Iterator[str]:
    for name in sorted(handrail.__all__):
        value = getattr(handrail, name)
        if inspect.isclass(value):
            yield f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
            yield from members(name, value)
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"
        else:
            yield f"{name}: {type(value).__name__}"


def test_the_public_interface_equals_tests_api_txt() -> None:
    assert list(interface()) == TEXT.read_text().splitlines()


def test_every_public_name_is_imported_on_first_use() -> None:
    assert all(getattr(handrail, name) is not None for name in handrail.__all__)


if __name__ == "__main__":
    print("\n".join(interface()))
