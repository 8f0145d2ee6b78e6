"""How fast Handrail is on this GPU, in parts: ``python -m benchmarks.gpu --minutes 8``.

Every part writes a JSON file to the results' folder and is not run again; the page docs/gpu.md is written
from them after each. ``--prepare DIR`` gathers beforehand, where there is a network, what a machine lacks.
``--tiny`` runs everything in miniature, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts
from benchmarks.gpu.page import write_page
from benchmarks.gpu.travel import prepare

Result = dict[str, Any]


def run(folder: Path, sizes: parts.Sizes, minutes: float, only: list[str], page: Path) -> None:
    """Run the parts that have no result yet, while time is left for another."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    for name, part in parts.PARTS.items():
        file, left = folder / f"{name}.json", ends - time.monotonic()
        finished = file.exists() and "failed" not in json.loads(file.read_text())
        if finished or (only and name not in only) or left < 0:
            print(f"{name}: {'done before' if finished else 'left out'}", flush=True)
            continue
        started = time.monotonic()
        found = attempt(lambda part=part, left=left: part(sizes, folder, left))  # type: ignore[misc]
        found |= {"device": parts.device_name(), "wall_seconds": round(time.monotonic() - started, 1)}
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(found)[:2000]}", flush=True)
        write_page(folder, page)


def attempt(part: Callable[[], Result]) -> Result:
    """Run a part. What goes wrong in one is its result, so that the others are still measured."""
    try:
        return part()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="Start no further part after this many minutes."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"), help="page to write")
    parser.add_argument("--only", default="", help=f"parts, separated by commas: {','.join(parts.PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="in miniature, on a CPU too")
    parser.add_argument("--prepare", type=Path, help="gather wheels and weights in this folder, and end")
    parser.add_argument("--present", type=Path, help="pip freeze of the machine with the GPU, for --prepare")
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare(options.prepare, options.present)
    only = [name for name in options.only.split(",") if name]
    run(options.output, parts.TINY if options.tiny else parts.FULL, options.minutes, only, options.page)


if __name__ == "__main__":
    main(sys.argv[1:])
