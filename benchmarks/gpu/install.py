"""Install what ``python -m benchmarks.gpu --prepare DIR`` gathered, on the machine with the GPU:
``python benchmarks/gpu/install.py DIR``.

Run it as a file, because nothing else of this repository can be imported yet.
"""

import os
import subprocess
import sys
from pathlib import Path

WEIGHTS = Path("models/smollm2-135m")


def join(directory: Path) -> None:
    """Join the pieces of large files."""
    for first in sorted(directory.rglob("*.part00")):
        whole = first.with_suffix("")
        pieces = sorted(whole.parent.glob(f"{whole.name}.part*"))
        with whole.open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
        for piece in pieces:
            piece.unlink()


def install(directory: Path) -> None:
    """Install the packages, and write the weights to models/ if there are any."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    if wheels := sorted(map(str, directory.glob("*.whl"))):
        subprocess.run([*pip, *wheels], check=True)
    for source in sorted(map(str, directory.glob("*.tar.gz"))):  # only some tasks need these
        if subprocess.run([*pip, "--no-build-isolation", source]).returncode:
            print(f"{source} cannot be built here and is left out", file=sys.stderr)
    weights = directory / "weights"
    if list(weights.glob("*.whl")) and not WEIGHTS.exists():
        here = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(weights.resolve())}
        fetch = [sys.executable, "-m", "handrail.cli", "model", "fetch", WEIGHTS.name]
        subprocess.run(fetch, check=True, env=here)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    join(directory)
    install(directory)
