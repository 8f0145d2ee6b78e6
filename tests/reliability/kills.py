"""Kill a run at random moments, resume it, and compare its files with those of an undisturbed run:
``python -m tests.reliability.kills --kills 100``.

Half of the kills wait until a checkpoint is being written. The others come at a random moment in the life of
a process, including its start.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.forks import Fork
from tests.reliability.processes import finished, job, left_behind, start


def being_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*")) or (run / ".model").exists()


def kill_once(process: subprocess.Popen[str] | Fork, run: Path, rng: random.Random, life: float) -> str:
    """Wait for the moment, at most ``life`` seconds away, and kill the process. Return what it was doing, or
    ``ended`` if it finished first."""
    at_checkpoint = rng.random() < 0.5
    deadline = time.monotonic() + rng.uniform(0, life)
    while process.poll() is None:
        if at_checkpoint and being_written(run):
            time.sleep(rng.uniform(0, 0.02))
            break
        if not at_checkpoint and time.monotonic() > deadline:
            break
        time.sleep(0.0005)
    writing = being_written(run)
    if process.poll() is not None:
        return "ended"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return "it wrote a checkpoint" if writing else "it did anything else"


def killed_and_resumed(
    directory: Path,
    kills: int,
    steps: int,
    life: float = 12.0,
    seed: int = 0,
    start: Callable[..., subprocess.Popen[str] | Fork] = start,
) -> tuple[Counter[str], bool]:
    """Return when the kills came, and whether the files of the run equal those of an undisturbed run to the
    bit."""
    rng = random.Random(seed)
    train = {"steps": steps, "checkpoint_every": 1, "keep_last": 2}
    file, run, whole = job(directory, train=train), directory / "run", directory / "whole"
    code, said = finished(start("train", file, "--output", whole), 3600)
    assert code == 0, said
    moments: Counter[str] = Counter()
    while moments.total() < kills:
        process = start("train", file, "--output", run, *(["--resume"] if run.exists() else []))
        moment = kill_once(process, run, rng, life)
        if moment == "ended":
            code, said = finished(process)
            raise SystemExit(
                f"the run ended with code {code} before it was killed {kills} times; give it more "
                f"--steps\n{said}"
            )
        moments[moment] += 1
    code, said = finished(start("train", file, "--output", run, "--resume"), 3600)
    assert code == 0, said
    return moments, left_behind(run) == left_behind(whole)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--life", type=float, default=12.0, help="seconds, at most, from a start to a kill at a random moment"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        moments, same = killed_and_resumed(Path(directory), **vars(options))
    when = ", ".join(f"{n} while {what}" for what, n in moments.items())
    print(f"killed {moments.total()} times ({when}); to the bit as undisturbed: {same}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
