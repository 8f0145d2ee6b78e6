"""``python -m benchmarks.gpu`` in miniature: every part, the page, going on, and what travels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.gpu import install, parts, travel
from benchmarks.gpu.__main__ import main
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
