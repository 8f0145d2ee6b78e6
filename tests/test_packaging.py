"""The installed wheel contains every document and example that the package names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shipped() -> set[Path]:
    patterns = [pattern for each in PROJECT["tool"]["setuptools"]["data-files"].values() for pattern in each]
    return {file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern)}


def test_documents_keep_their_relative_paths_when_installed() -> None:
    for place, patterns in PROJECT["tool"]["setuptools"]["data-files"].items():
        for pattern in patterns:
            assert Path("share/doc/handrail") / Path(pattern).parent == Path(place)


def test_a_wheel_has_every_document_and_example_that_the_package_names() -> None:
    sources = [
        file
        for ending in ("py", "jinja", "toml", "html")
        for file in (ROOT / "handrail").rglob(f"*.{ending}")
    ]
    named = {
        Path(name)
        for file in sources
        for name in re.findall(r"(?:docs|examples)/[\w/-]+\.\w+", file.read_text(encoding="utf-8"))
    }
    assert Path("docs/configuration.md") in named and named <= shipped()


def test_every_link_of_a_shipped_page_leads_to_a_shipped_file() -> None:
    pages = [file for file in shipped() if file.suffix == ".md"]
    assert len(pages) > 10
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            target = (ROOT / page.parent / link).resolve().relative_to(ROOT)
            assert target in shipped() or any(target in file.parents for file in shipped()), f"{page}: {link}"
