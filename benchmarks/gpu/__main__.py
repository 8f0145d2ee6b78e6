"""How fast Handrail is on this GPU, in parts: ``python -m benchmarks.gpu --minutes 8``.

Every part writes a JSON file to the results' folder after each of its rows. A part that was cut off goes on
with the rows that it lacks; one that is whole is not run again. The page docs/gpu.md is written from the
files after each part. ``--prepare DIR`` gathers beforehand, where there is a network, what a machine lacks.
``--tiny`` runs everything in miniature, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts
from benchmarks.gpu.page import write_page
from benchmarks.gpu.travel import prepare

Result = dict[str, Any]


def run(folder: Path, sizes: parts.Sizes, minutes: float, only: list[str], page: Path) -> None:
    """Run the parts that have no whole result yet, while time is left."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    for name in parts.PARTS:
        file = folder / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        finished = bool(before) and not before.keys() & {"failed", "cut_off"}
        if finished or (only and name not in only) or time.monotonic() > ends:
            print(f"{name}: {'done before' if finished else 'left out'}", flush=True)
            continue
        goes_on = "cut_off" in before and before["device"] == parts.device_name()
        measure(name, sizes, file, ends, before if goes_on else {})
        print(f"{name}: {file.read_text()[:2000]}", flush=True)
        write_page(folder, page)


def measure(name: str, sizes: parts.Sizes, file: Path, ends: float, found: Result) -> None:
    """Run a part, and write to ``file`` what it has found whenever it may be cut off.

    What goes wrong in one part is its result, so that the others are still measured.
    """
    started, earlier = time.monotonic(), found.get("wall_seconds", 0.0)
    found = {key: value for key, value in found.items() if key not in ("failed", "cut_off")}

    def write(**more: Any) -> None:
        seconds = round(earlier + time.monotonic() - started, 1)
        about = {"device": parts.device_name(), "wall_seconds": seconds}
        file.write_text(json.dumps(found | about | more, indent=1) + "\n")

    try:
        for _ in parts.PARTS[name](sizes, file.parent, ends - time.monotonic(), found):
            write(cut_off=True)
            if time.monotonic() > ends:
                return
        write()
    except Exception as error:
        write(cut_off=True, failed=f"{type(error).__name__}: {error}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="Start no further part or row after this many minutes."
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
