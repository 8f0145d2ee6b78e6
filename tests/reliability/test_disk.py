"""Full and read-only disks, jumping clocks, deleted and damaged files: each has a defined result, and nothing
is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from handrail import train
from handrail._util.errors import Paused, UserError
from handrail._util.files import damage, remove_directory, whole_directory
from handrail._util.interrupts import Interrupts
from handrail.training.checkpoint import checkpoints
from handrail.training.config import Config, load_config
from tests.forks import start
from tests.reliability import processes
from tests.reliability.processes import finished, job, left_behind, steps, wait_for

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount a separate disk with options such as a size; skip the test if this user may not mount one."""
    there = tmp_path / "disk"

    def mounted(options: str) -> Path:
        there.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", there], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return there

    yield mounted
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "--lazy", there], capture_output=True)


def words(said: str) -> str:
    return " ".join(said.split())


def test_a_full_disk_stops_the_run_with_its_checkpoints_whole(
    mount: Mount, tmp_path: Path, whole: dict[str, str]
) -> None:
    file, run = job(tmp_path), mount("size=30m") / "run"
    command = ("train", file, "--output", run, "--set", "train.keep_last=100")
    code, said = finished(start(*command))
    kept = checkpoints(run / "checkpoints")
    assert code == 75 and kept and "Traceback" not in said
    assert f"no room for the checkpoint of step {len(kept) + 1}: it takes about " in words(said), said
    assert f"{kept[-1]} is whole; make room, then go on with --resume" in words(said)
    assert not any(map(damage, kept)) and not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=500m", tmp_path / "disk"], check=True)
    code, said = finished(start(*command, "--resume"))
    assert code == 0, said
    assert left_behind(run) == whole


def test_a_run_stops_if_the_disk_is_full_when_a_line_is_written(mount: Mount, tmp_path: Path) -> None:
    run = mount("size=200k") / "run"
    with pytest.raises(
        Paused, match="no room left in .*its checkpoints are intact: make room, then go on with --resume"
    ):
        train(settings(tmp_path, "train.checkpoint_every=0", "train.samples_every=1"), run)


def test_a_read_only_disk_is_reported_in_one_sentence(mount: Mount, tmp_path: Path) -> None:
    disk = mount("size=10m,ro")
    with pytest.raises(UserError, match="cannot be (created|written) .*choose another --output"):
        train(settings(tmp_path), disk / "run")


JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 3600, -86400, 1e6, -1e6])
time.time = lambda: real() + next(jumps)
"""


def test_a_jumping_clock_changes_nothing(tmp_path: Path, whole: dict[str, str]) -> None:
    file = job(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    code, said = finished(
        processes.start(
            *("train", file, "--output", tmp_path / "run"), environment={"PYTHONPATH": str(tmp_path)}
        )
    )
    assert code == 0, said
    assert left_behind(tmp_path / "run") == whole
    assert "-" not in (tmp_path / "run/timings.jsonl").read_text().replace("e-", "")  # no negative seconds


def test_a_run_directory_that_is_deleted_is_reported_in_one_sentence(tmp_path: Path) -> None:
    file, run = job(tmp_path, train={"steps": 1000}), tmp_path / "run"
    process = start("train", file, "--output", run)
    wait_for(lambda: steps(run) >= 2)
    run.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    code, said = finished(process)
    assert code == 2 and f"{run} was deleted or renamed while it was being written" in words(said), said
    assert "Traceback" not in said


def settings(directory: Path, *changes: str) -> Config:
    return load_config(job(directory), list(changes))


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop after its fourth step, with checkpoints of its last three."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("stopped")

    def stop(step: int, *_: object) -> None:
        if step == 4:
            Interrupts.ask("a test")

    with pytest.raises(Paused):
        train(settings(directory, "train.keep_last=3"), directory / "run", progress=stop)
    assert [path.name for path in checkpoints(directory / "run/checkpoints")] == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]
    return directory / "run"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same as ``whole``, but from this process, because another number of threads may round
    differently."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("undisturbed")
    train(settings(directory), directory / "run")
    return left_behind(directory / "run")


def test_a_damaged_checkpoint_is_named_and_skipped(
    stopped: Path, undisturbed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    fourth, third = stopped / "checkpoints/step-000004", stopped / "checkpoints/step-000003"
    flip(fourth / "optimizer.safetensors")
    (third / "state.json").unlink()
    (stopped / "checkpoints/.step-000005").mkdir()  # files that a killed run was writing
    train(settings(stopped.parent, "train.keep_last=3"), stopped, resume=True)
    (record,) = [record.getMessage() for record in caplog.records if record.name == "handrail"]
    assert f"{fourth} cannot be used: optimizer.safetensors differs from its checksum" in record
    assert (
        f"{third} cannot be used: state.json is missing; going on from {stopped / 'checkpoints/step-000002'}"
        in record
    )
    assert left_behind(stopped) == undisturbed


@pytest.mark.parametrize("sums", ["{}", "[]", "5", "null", '{"model": 1}', '{"state.json": null}'])
def test_invalid_checksum_files_count_as_damage(sums: str, stopped: Path) -> None:
    (stopped / "checkpoints/step-000004/checksums.json").write_text(sums)
    assert damage(stopped / "checkpoints/step-000004") and not damage(stopped / "checkpoints/step-000003")


def test_checkpoints_written_after_a_damaged_one_are_kept(stopped: Path, undisturbed: dict[str, str]) -> None:
    for step in (3, 4):
        flip(stopped / f"checkpoints/step-{step:06d}/optimizer.safetensors")

    def stop_in_step_3(step: int, *_: object) -> None:
        if step == 3:  # the first call reports the step from which the run was resumed
            Interrupts.ask("a test")

    with pytest.raises(Paused, match="step 3 is checkpointed"):
        train(settings(stopped.parent, "train.keep_last=1"), stopped, resume=True, progress=stop_in_step_3)
    assert [path.name for path in checkpoints(stopped / "checkpoints")] == ["step-000003"]
    train(settings(stopped.parent), stopped, resume=True)
    assert left_behind(stopped) == undisturbed


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (
            "checkpoints",
            "has no checkpoint of the run's 4 steps; restore one, or start over with another --output",
        ),
        ("metrics.jsonl", "has no metrics.jsonl and holds something else; choose another --output"),
        ("config.toml", "there is no configuration file"),
    ],
)
def test_a_run_with_missing_files_is_not_restarted(gone: str, words: str, stopped: Path) -> None:
    shutil.rmtree(stopped / gone) if (stopped / gone).is_dir() else (stopped / gone).unlink()
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        train(settings(stopped.parent), stopped, resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_if_every_checkpoint_is_damaged_nothing_is_overwritten(stopped: Path) -> None:
    for path in checkpoints(stopped / "checkpoints"):
        (path / "checksums.json").write_text("{")
    before = steps(stopped)
    with pytest.raises(
        UserError,
        match="checksums.json cannot be read .*restore one from a copy, or start over with another --output",
    ):
        train(settings(stopped.parent), stopped, resume=True)
    assert steps(stopped) == before


def test_a_last_line_that_is_cut_off_is_written_again(stopped: Path, undisturbed: dict[str, str]) -> None:
    file = stopped / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    # from step 3, because step 4 is missing in the metrics
    train(settings(stopped.parent), stopped, resume=True)
    assert left_behind(stopped) == undisturbed


def test_a_damaged_line_in_the_middle_is_named(stopped: Path) -> None:
    file = stopped / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows[:2], '{"step": 2, "rew\n', *rows[3:]]))
    with pytest.raises(
        UserError,
        match=(
            r"metrics.jsonl, line 3: it is damaged; restore it from a copy, or delete it to do without that "
            r"step"
        ),
    ):
        train(settings(stopped.parent), stopped, resume=True)
    file.write_text("".join([*rows[:2], *rows[3:]]))
    assert train(settings(stopped.parent), stopped, resume=True)["steps"] == 7


def test_a_directory_survives_a_crash_between_its_two_renames(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for name, text in ((".model", "new"), (".model.old", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    with pytest.raises(KeyboardInterrupt), whole_directory(final):
        raise KeyboardInterrupt
    assert (final / "weights").read_text() == "old"
    with whole_directory(final) as aside:
        (aside / "weights").write_text("newer")
    assert (final / "weights").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_keep_every_keeps_more_than_the_newest(tmp_path: Path) -> None:
    train(settings(tmp_path, "train.keep_last=1", "train.keep_every=3"), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == [
        "step-000003",
        "step-000006",
        "step-000008",
    ]


def test_a_checkpoint_with_an_open_file_on_network_storage_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such storage renames an open file that is deleted, so that its directory is never empty."""
    rmdir, kept = os.rmdir, {"step-000001", "step-000002"}

    def rename(path: Path, target: Path) -> Path:
        if path.name in kept:
            moved.add(target.name)
        return plain(path, target)

    def refuse(path: Any, **named: Any) -> None:
        if Path(path).name in kept | moved:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path, **named)

    plain, moved = Path.rename, set[str]()
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "rmdir", refuse)
    train(settings(tmp_path, "train.keep_last=1"), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-000008"]
    assert len(moved) == 2
    monkeypatch.undo()
    remove_directory(tmp_path / "run/checkpoints/step-000008")  # and what could not be deleted
    assert not list((tmp_path / "run/checkpoints").iterdir())
