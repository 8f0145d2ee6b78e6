"""Signals, locks and orphaned processes: what a run does when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from itertools import count
from pathlib import Path

import pytest

from handrail import train
from handrail._util.errors import Paused, UserError
from handrail._util.files import locked
from handrail._util.interrupts import Interrupts
from handrail.training.config import EvalConfig, load_config
from tests.conftest import config
from tests.forks import start
from tests.reliability.kills import killed_and_resumed
from tests.reliability.processes import finished, job, left_behind, steps, wait_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_run_continues_exactly(
    number: signal.Signals, tmp_path: Path, whole: dict[str, str]
) -> None:
    file, run = job(tmp_path), tmp_path / "run"
    # Only the signal causes a checkpoint.
    command = ("train", file, "--output", run, "--set", "train.checkpoint_every=0")
    process = start(*command)
    wait_for(lambda: steps(run) >= 1)
    process.send_signal(number)
    code, said = finished(process)
    done = steps(run) - 1
    assert code == 75 and f"stopped by {number.name}; step {done} is checkpointed" in " ".join(said.split())
    assert [path.name for path in (run / "checkpoints").iterdir()] == [
        f"step-{done:06d}"
    ] and "Traceback" not in said
    code, said = finished(start(*command, "--resume"))
    assert code == 0, said
    assert left_behind(run) == whole


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    file, run = (
        job(tmp_path, train={"steps": 1000}, rollout={"max_tokens": 48, "batch_size": 1}),
        tmp_path / "run",
    )
    process = start("train", file, "--output", run)
    wait_for(lambda: steps(run) >= 2)
    os.killpg(process.pid, signal.SIGSTOP)  # so that both are delivered before it can react to the first
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    code, said = finished(process, 20)
    assert -code in (signal.SIGINT, signal.SIGTERM) and "Traceback" not in said


def test_a_run_stops_between_two_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is asked to stop while its third token is sampled."""
    polls, check = count(1), Interrupts.check
    asked = []

    def counted(self: Interrupts) -> None:
        asked.append(next(polls))
        if asked[-1] == 3:
            Interrupts.ask("a test")
        check(self)

    monkeypatch.setattr(Interrupts, "check", counted)
    config = load_config(job(tmp_path)).model_copy(update={"eval": EvalConfig()})
    with pytest.raises(Paused, match="stopped by a test; step 0 is checkpointed"):
        train(config, tmp_path / "run")
    assert asked == [1, 2, 3] and steps(tmp_path / "run") == 1


SLOW = """
import time

def slow(problem, completion):
    open(problem.metadata["begun"], "w").close()
    time.sleep(50)
"""


def ask_when(file: Path) -> None:
    wait_for(file.exists)
    Interrupts.ask("a test")


def test_a_run_stops_while_it_waits_for_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    begun = tmp_path / "begun"
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"prompt": "1 + 1 =", "answer": "2", "begun": str(begun)}) + "\n"
    )
    verifier = {"name": f"{tmp_path / 'slow.py'}:slow", "timeout": 60, "extract": None}
    settings = config(
        data={"train": str(tmp_path / "data.jsonl")},
        verifier=verifier,
        rollout={"require_end": False},  # so that every completion is graded
        train={"problems_per_step": 1, "checkpoint_every": 1},
    )
    asking = threading.Thread(target=ask_when, args=[begun])
    asking.start()
    started = time.monotonic()
    with pytest.raises(Paused, match=r"stopped by a test; step \d is checkpointed"):
        train(settings, tmp_path / "run")
    asking.join()
    assert time.monotonic() - started < 50  # before the first verdict


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts("") as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.asked == "SIGTERM"
            interrupts.check()  # the current work cannot be abandoned
            with pytest.raises(Paused), interrupts.abandonable():
                raise AssertionError("the block was entered")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_runs_never_write_one_directory(tmp_path: Path) -> None:
    file, run = job(tmp_path, train={"steps": 1000}), tmp_path / "run"
    first = start("train", file, "--output", run)
    wait_for(lambda: steps(run) >= 2)
    code, said = finished(start("train", file, "--output", run, "--resume"))
    first.kill()
    assert (
        code == 2
        and f"another process is writing {run}; wait for it, or choose another --output"
        in " ".join(said.split())
    )
    first.wait()
    with locked(run):  # the kernel has released it
        pass
    with (
        locked(tmp_path / "other"),
        pytest.raises(UserError, match="another process"),
        locked(tmp_path / "other"),
    ):
        raise AssertionError("the block was entered")


COMPARED = ("--methods", "grpo,luffy", "--jobs", "2")


def workers(parent: int) -> list[int]:
    """The processes that a comparison's runs are in: forks of one that it has started."""
    return [
        worker for server in children(parent, "multiprocessing.forkserver") for worker in children(server)
    ]


def children(parent: int, command: str = "") -> list[int]:
    said = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in said.splitlines() if command in line]


def test_a_stopped_comparison_stops_its_runs_with_checkpoints_and_continues(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    file, out = job(tmp_path), tmp_path / "out"
    command = ("compare", file, "--output", out, *COMPARED, "--set", "train.checkpoint_every=0")
    process = start(*command)
    wait_for(lambda: any(steps(path) >= 1 for path in out.glob("*/*")))
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals all processes of a command
    code, said = finished(process)
    assert code == 75 and "run the same command again to continue" in said and "Traceback" not in said
    begun = {path.parent.name: steps(path) for path in out.glob("*/*/checkpoints")}
    assert begun and not list(out.glob("*/*/summary.json"))
    code, said = finished(start(*command))
    assert code == 0, said
    assert left_behind(out / "luffy/seed-0") == whole


def test_no_run_of_a_comparison_outlives_it(tmp_path: Path) -> None:
    file, out = job(tmp_path, train={"steps": 1000}), tmp_path / "out"
    process = start("compare", file, "--output", out, *COMPARED)
    wait_for(lambda: len(list(out.glob("*/*/metrics.jsonl"))) == 2)
    running = workers(process.pid)
    assert len(running) == 2
    process.kill()
    wait_for(lambda: not any(Path(f"/proc/{each}/cmdline").exists() for each in running), seconds=20)


def test_a_killed_worker_is_reported_in_one_sentence(tmp_path: Path) -> None:
    file, out = job(tmp_path, train={"steps": 1000}), tmp_path / "out"
    process = start("compare", file, "--output", out, *COMPARED)
    wait_for(lambda: len(list(out.glob("*/*/metrics.jsonl"))) == 2)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    code, said = finished(process)
    assert code == 75 and "was killed, perhaps out of memory" in said and "Traceback" not in said


@pytest.mark.parametrize(("kills", "steps"), [(1, 8), pytest.param(3, 30, marks=pytest.mark.long)])
def test_a_run_that_is_killed_has_the_files_of_an_undisturbed_one(
    kills: int, steps: int, tmp_path: Path
) -> None:
    """Killed once while it writes a checkpoint, and repeatedly."""
    moments, same = killed_and_resumed(tmp_path, kills, steps, life=4.0, seed=1, start=start)
    assert moments.total() == kills and moments["it wrote a checkpoint"] and same
