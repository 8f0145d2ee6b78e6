"""``python -m benchmarks.gpu`` in miniature: every part, the page, going on, and what travels."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.gpu import install, parts, travel
from benchmarks.gpu.__main__ import main, run
from handrail.models import head
from handrail.training.policies import load_trainable_policy

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="--tiny would run on the GPU")


@needs_no_gpu
def test_it_runs_in_miniature_and_goes_on_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, fast = tmp_path / "gpu.md", "update,output-layer,sampling"
    command = ["--tiny", "--output", str(tmp_path / "gpu"), "--page", str(page), "--only"]
    main([*command, "sampling"])
    (tmp_path / "gpu/update.json").write_text(json.dumps({"failed": "out of memory"}))
    capsys.readouterr()
    main([*command, fast])
    printed = capsys.readouterr().out
    assert "sampling: done before" in printed and "step: left out" in printed
    found = {name: json.loads((tmp_path / f"gpu/{name}.json").read_text()) for name in fast.split(",")}
    assert not any("failed" in each for each in found.values())
    assert [row["kind"] for row in found["update"]["rows"]] == ["full", "lora"]
    for row in found["update"]["rows"]:
        assert row["tokens"] == 8 + 8 * 23 and row["micro_batches"] == 1 and row["of_bare"] > 0
    text = page.read_text()
    assert "It has not been run on a GPU yet" in text and "| full | 192 |" in text


@needs_no_gpu
def test_a_part_that_is_cut_off_keeps_its_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(parts.TINY, chunks=(2**10, 2**11))
    now, asked = [0.0], list[int]()

    def seconds(work: object, rounds: int) -> float:
        now[0] += 60
        asked.append(head.CHUNK)
        return 1.0

    monkeypatch.setattr(parts, "seconds", seconds)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = []
    for _ in range(3):
        run(tmp_path, sizes, 1.5, ["output-layer"], tmp_path / "gpu.md")
        kept.append(json.loads((tmp_path / "output-layer.json").read_text()))
    assert asked == [2**10, 2**11, 2**62]
    assert list(kept[0]["by_chunk"]) == ["1024", "2048"] and kept[0]["cut_off"]
    assert list(kept[1]["by_chunk"]) == ["1024", "2048", "all at once"] and "cut_off" not in kept[1]
    assert kept[1]["wall_seconds"] == 180 and kept[2] == kept[1]


@pytest.mark.parametrize(
    ("code", "printed", "failed"),
    [
        (0, "25 passed", None),
        (5, "3 deselected", None),
        (1, "2 failed, 23 passed", 2),
        (2, "ERROR tests/gpu/test_gpu.py\n1 error in 2 s", "RuntimeError: pytest ended with code 2: ERROR t"),
    ],
)
def test_tests_that_cannot_be_collected_have_failed(
    code: int, printed: str, failed: int | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], code, stdout=printed)
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: ended)
    run(tmp_path, parts.TINY, 1, ["tests"], tmp_path / "gpu.md")
    found = json.loads((tmp_path / "tests.json").read_text()).get("failed")
    assert found.startswith(failed) if isinstance(failed, str) else found == failed


@pytest.mark.long
@needs_no_gpu
def test_the_slow_parts_run_in_miniature(tmp_path: Path) -> None:
    command = ["--tiny", "--output", str(tmp_path), "--page", str(tmp_path / "gpu.md"), "--only"]
    main([*command, "step,learning"])
    step, learning = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("step", "learning"))
    assert "skipped" in step or "grpo" in step["table"]
    assert learning["verdict"] and learning["methods"]
    assert "Failed" not in (tmp_path / "gpu.md").read_text()


def test_no_part_starts_without_time(tmp_path: Path) -> None:
    main(["--minutes", "-1", "--output", str(tmp_path), "--page", str(tmp_path / "gpu.md")])
    assert not list(tmp_path.iterdir())


def test_operations_by_hand(tmp_path: Path) -> None:
    sizes = parts.TINY
    model = parts.save_model(sizes, tmp_path)
    policy = load_trainable_policy(parts.settings(model, sizes, False, 64), Accelerator(cpu=True))
    # A layer: queries and output 2·32·32, keys and values 2·32·16, the rest 3·32·64. Output layer: 300·32.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 300 * 32
    assert parts.flops_per_token(policy, 32) == 6 * weights + 6 * 2 * 32 * 32


def test_what_travels_is_what_the_other_machine_lacks(tmp_path: Path) -> None:
    taken = travel.missing(None)
    assert {"reasoning-gym", "math-verify", "pytest"} <= taken.keys() and "torch" not in taken
    listed = tmp_path / "freeze.txt"
    listed.write_text("\n".join(f"{name}==1.0" for name in taken if name != "reasoning-gym"))
    assert "reasoning-gym" in travel.missing(listed) and "math-verify" not in travel.missing(listed)


def test_large_files_travel_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "PIECE", 10)
    (tmp_path / "weights.bin").write_bytes(bytes(range(25)))
    travel.split(tmp_path / "weights.bin")
    assert [file.stat().st_size for file in sorted(tmp_path.iterdir())] == [10, 10, 5]
    install.join(tmp_path)
    assert (tmp_path / "weights.bin").read_bytes() == bytes(range(25))
