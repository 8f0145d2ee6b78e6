"""Predict what a step costs on 8, 64 and 1,024 GPUs: ``python -m benchmarks.scale``.

Computes formulas and simulation, which takes about a minute on a CPU, prints the tables and writes them
between their markers in docs/scale.md and docs/models.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.scale.assumptions import fitted
from benchmarks.scale.page import filled, pages


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="directory of the pages")
    options = parser.parse_args(arguments)
    for name, found in pages(fitted()).items():
        print("\n\n".join(found.values()))
        page = options.docs / name
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
