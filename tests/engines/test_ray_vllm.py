"""Samplers under Ray that run vLLM. ``make test-vllm`` runs these tests in an environment that has both."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.processes import finished, job, left_behind, start
from tests.tiny_models import save_chat_model
from tests.training.test_loop import lines

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ray", "vllm"))),
    reason="Ray and vLLM are not in one environment: make test-vllm",
)

PATIENCE = 400.0
WATCHED = '''"""A method that writes down which weights the rollouts of a step were sampled with."""
from pathlib import Path
from handrail.methods.luffy import Luffy

class Watched(Luffy):
    async def guide(self, group, ctx):
        with Path(__file__).with_name("versions.txt").open("a") as file:
            file.writelines(f"{ctx.step} {rollout.version}\\n" for rollout in group.rollouts)
        return await super().guide(group, ctx)
'''


def processes() -> list[str]:
    return subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def trained(directory: Path, *options: str) -> list[dict[str, Any]]:
    """Train in ``directory``/run a random model whose attention vLLM supports; return the steps' metrics."""
    model = save_chat_model(directory / "model", hidden_size=128)
    (directory / "watched.py").write_text(WATCHED)
    file = job(
        directory, model={"path": str(model)}, method={"name": f"{directory / 'watched.py'}:Watched"},
        sampler={"name": "vllm", "cache_gib": 0.25}, train={"steps": 5, "learning_rate": 3e-3},
    )  # fmt: skip
    process = start("train", file, "--output", directory / "run", *options, environment={"RAY_ADDRESS": ""})
    code, said = finished(process, PATIENCE)
    assert code == 0, said[-3000:]
    return lines(directory / "run/metrics.jsonl")[1:]


def test_a_sampler_with_vllm_gives_the_files_of_vllm_in_one_process(tmp_path: Path) -> None:
    """vLLM starts with random weights, so every step's weights have reached it."""
    (tmp_path / "alone").mkdir()
    trained(tmp_path / "alone")
    (tmp_path / "apart").mkdir()
    rows = trained(tmp_path / "apart", "--ray", "--workers", "1", "--samplers", "1")
    assert len(rows) == 5 and all(row["sampler/mismatch"] < 1e-4 for row in rows)
    assert not any(row.get("entropy") for row in rows)  # which vLLM does not report
    assert left_behind(tmp_path / "apart/run") == left_behind(tmp_path / "alone/run")


def test_a_model_that_nobody_holds_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers have a half of it each, and two processes of vLLM too; rounding is all that differs."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # by default, a process per NUMA node
    options = ("--ray", "--workers", "2", "--samplers", "1", "--set", "train.fsdp=true")
    rows = trained(tmp_path, *options, "--set", "sampler.tensor_parallel=2")
    assert len(rows) == 5 and all(0 < row["sampler/mismatch"] < 1e-4 for row in rows)
    assert not [each for each in processes() if "VLLM" in each or "Worker_TP" in each]


def test_vllm_samples_a_step_ahead_with_weights_that_are_corrected_for(tmp_path: Path) -> None:
    ahead = ("--ray", "--workers", "1", "--samplers", "1", "--set", "sampler.staleness=1")
    rows = trained(tmp_path, *ahead)
    found = {tuple(map(int, line.split())) for line in (tmp_path / "versions.txt").read_text().splitlines()}
    assert found == {(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)}
    assert rows[0]["sampler/mismatch"] < 1e-4 < rows[2]["sampler/mismatch"]
    assert rows[0]["importance/mean"] == pytest.approx(1, abs=1e-3)
    assert rows[0]["importance/max"] < 1.01 < rows[2]["importance/max"]
    assert all(0 <= row["importance/capped"] < 0.5 for row in rows)
