from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read on import; accelerate imports it
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read on import; otherwise unknown model names are looked up on the network again and again
)

import torch
from accelerate import Accelerator

from handrail import cli
from handrail._util import progress
from handrail.engines.local import LocalEngine
from handrail.eval import compare
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import Config, parse_config
from handrail.training.policies import load_trainable_policy
from handrail.verifiers import pool
from handrail.verifiers.pool import VerifierPool
from tests import forks

HARD = "task:house-rules?level=hard&house=3"
EASY = "task:house-rules?level=easy"

# A shell starts background commands with SIGINT ignored. Runs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def config(**changes: Any) -> Config:
    """Return the configuration of a run of a few seconds on the built-in backbone; ``changes`` are whole
    sections or parts of them."""
    tree: dict[str, Any] = {
        "model": {"path": "builtin:house-tiny", "device": "cpu"},
        "data": {"train": f"{HARD}&n=64"},
        "verifier": {"name": "exact", "extract": r"# ([\d ]+)$", "workers": 1},
        "rollout": {"max_tokens": 48, "group_size": 4},
        "train": {"steps": 2, "problems_per_step": 4, "learning_rate": 5e-4, "samples_every": 1},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree)


def policy_of(path: Path, **changes: Any) -> TrainablePolicy:
    return load_trainable_policy(config(model={"path": str(path)}, **changes), Accelerator(cpu=True))


SLOW = (
    "test_worlds",
    "test_stopping",
    "test_loop",
    "test_trl",
    "test_report_page",
    "test_launch",
    "test_disk",
)
"""Modules that take long begin first, so that at the end no process of pytest-xdist waits for another."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW)


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons in this process get workers that start at once."""
    monkeypatch.setattr(compare, "context_for", lambda devices: forks.CONTEXT)


@pytest.fixture(autouse=True)
def forked_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifiers in this process get workers that start at once. Tests of verifiers override this."""
    monkeypatch.setattr(pool, "_start", forks.verifier)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy() -> TrainablePolicy:
    """The built-in backbone; tests must not change its weights."""
    return load_trainable_policy(config(), Accelerator(cpu=True))


@pytest.fixture(scope="session")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(config().verifier) as pool:
        yield pool


@pytest.fixture
def engine(policy: TrainablePolicy, verifier: VerifierPool) -> LocalEngine:
    return LocalEngine(policy, verifier)


@dataclass
class Done:
    code: int
    out: str
    err: str


Handrail = Callable[..., Done]


@pytest.fixture
def run_app(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """Run a command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress.console, "width", 300)

    def run(app: typer.Typer, *arguments: str) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["handrail", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main(app)
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def handrail(run_app: Callable[..., Done]) -> Handrail:
    return partial(run_app, cli.app)
