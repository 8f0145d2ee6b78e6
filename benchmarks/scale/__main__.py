"""Predict what a step costs on 8, 64 and 1,024 GPUs: ``python -m benchmarks.scale``.

Computes formulas and simulation, which takes about a minute on a CPU, prints the tables and writes them
between their markers in docs/scale.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.scale.assumptions import fitted
from benchmarks.scale.page import blocks, filled


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"), help="page to write into")
    options = parser.parse_args(arguments)
    found = blocks(fitted())
    print("\n\n".join(found.values()))
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(filled(page, found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
