"""Imports between packages point one way and form no cycle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    "_util",
    "types",
    "data",
    "models",
    "verifiers",
    "experts",
    "methods",
    "engines",
    "training",
    "eval",
    "cli",
    "__main__",
]
"""Packages, lowest first; docs/design.md describes them."""


def modules() -> dict[str, Path]:
    return {
        ".".join(file.with_suffix("").relative_to(ROOT).parts).removesuffix(".__init__"): file
        for file in (ROOT / "handrail").rglob("*.py")
    }


def imports(tree: ast.AST) -> Iterator[str]:
    """Return what is imported from the package when the code runs, including imports inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "handrail":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        yield from imports(node)


def module_of(name: str, known: dict[str, Path]) -> str:
    return name if name in known else name.rpartition(".")[0]


def test_every_module_belongs_to_a_listed_package() -> None:
    strangers = {name for name in modules() if name != "handrail" and name.split(".")[1] not in ROOMS}
    assert not strangers


def test_no_module_imports_from_a_higher_package() -> None:
    known, upward = modules(), []
    for name, file in known.items():
        if name == "handrail":
            continue
        for target in imports(ast.parse(file.read_text())):
            place, below = name.split(".")[1], module_of(target, known).split(".")
            if len(below) > 1 and ROOMS.index(below[1]) > ROOMS.index(place):
                upward.append(f"{name} imports {target}")
    assert not upward


def test_there_are_no_import_cycles() -> None:
    known = modules()
    graph = {
        name: {module_of(target, known) for target in imports(ast.parse(file.read_text()))}
        - {"handrail", name}
        for name, file in known.items()
        if name != "handrail"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_verifier_starts_without_costly_imports() -> None:
    """A run starts one process for every core, and another one after every timeout."""
    code = "import sys, handrail.verifiers.worker; print({'pydantic', 'torch', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_models_are_loaded_without_the_compiler() -> None:
    """Every process of a run would wait for its import, for over a second."""
    code = "import sys, handrail.models.head; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
