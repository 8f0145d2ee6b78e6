"""The progress line of a run: what it always shows, what it drops first, and its form off a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from handrail._util.progress import Bars, shorten, status
from tests.cli.test_commands import configured
from tests.conftest import EASY, HARD, Handrail

STEP = {
    "reward": 0.25, "loss": 0.41234, "groups/all": 4, "groups/all_wrong": 2, "groups/mixed": 1,
    "groups/all_right": 1, "groups/guided": 2,
}  # fmt: skip
SFT = {
    "reward": None,
    "loss": 0.4,
    **{f"groups/{kind}": 0 for kind in ("all_wrong", "mixed", "all_right", "guided")},
}


def test_a_step_shows_only_figures_that_it_has() -> None:
    assert status(STEP) == "reward 0.25 · loss 0.412 · groups 2 all wrong, 1 mixed, 1 all right · guided 2"
    assert status({**STEP, "eval/a/b/mean": 0.5}).startswith("held out: a/b 50.0% · reward")
    assert status({**STEP, "groups/guided": 0, "verifier/unverified": 3}).startswith("3 unverified · reward")
    assert "guided" not in status({**STEP, "groups/guided": 0})
    assert status(SFT) == "loss 0.4"
    assert (
        status({**SFT, "note": "no signal: 2 of 2 groups all wrong"}) == "no signal · 2 of 2 groups all wrong"
    )
    assert status({}) == "no held-out problems (set eval.sets)"


def test_without_a_terminal_there_is_a_line_per_twentieth_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = Bars(Console(force_terminal=False, width=200))
    for number in range(120):
        shown.update("A [b]", number, 119, STEP)
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 25
        and printed[1].startswith("A [b] step 5/119: reward")
        and "step 119/119" in printed[-1]
    )


def drawn(width: int, runs: Mapping[str, Sequence[dict[str, Any]]], steps: int = 140) -> list[str]:
    """Return the lines that a terminal of this width shows at the end: the log lines, then the bars."""
    console = Console(
        width=width, file=StringIO(), record=True, force_terminal=True, force_interactive=True, _environ={}
    )
    shown = Bars(console)
    for name, metrics in runs.items():
        for step, each in enumerate(metrics):
            shown.update(name, step, steps, each)
    console.print(shown.bars.get_renderable())
    return console.export_text().splitlines()


SETS = {"eval/hard/mean": 0.125, "eval/easy/mean": 0.938}


@pytest.mark.parametrize("last", [STEP, SFT, {"note": "no signal: 12 of 16 groups all wrong, 4 all right"}])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_keeps_bar_count_time_left_and_held_out_accuracy_between_evaluations(
    width: int, last: dict[str, Any]
) -> None:
    (line,) = drawn(width, {"": [SETS, last, last]})
    assert cell_len(line) == width
    assert re.search(r"━{6,} +2/140 00:0\d (held out: )?hard 12.5% easy 93.8% ", line)


def test_a_line_is_shortened_from_its_end() -> None:
    assert (
        "held out: hard 12.5% easy 93.8% · reward 0.25 · loss 0.412 · groups"
        in drawn(140, {"": [SETS, STEP]})[0]
    )
    assert drawn(80, {"": [SETS, SFT]})[0].rstrip().endswith("hard 12.5% easy 93.8% · loss 0.4")
    assert (
        drawn(80, {"": [SETS, STEP]})[0].rstrip().endswith("hard 12.5% easy 93.8% · reward 0.25 · loss 0.412")
    )
    assert drawn(60, {"": [SETS, STEP]})[0].rstrip().endswith("hard 12.5% easy 93.8%")


def test_bars_of_several_runs_keep_seeds_and_held_out_accuracy_at_80_columns() -> None:
    runs = {f"{name}, seed 31": [SETS, STEP, STEP] for name in ("GRPO", "SFT on failures", "方法" * 9)}
    lines = drawn(80, runs)
    assert [cell_len(line.rstrip()) <= 80 for line in lines] == [True] * 3
    for line in lines:
        assert "seed 31" in line and "2/140" in line and "━━━━━━" in line and "hard 12.5% easy 93.8%" in line
    narrow = drawn(60, runs)
    assert all("12.5%" in line and "93.8%" in line and "d 31" in line and "2/140" in line for line in narrow)


def test_names_of_held_out_sets_are_cut_in_the_middle_before_a_figure_is_lost() -> None:
    sets = {f"eval/{name}/mean": 0.125 for name in ("gsm-symbolic-p1", "gsm-symbolic-p2", "math-500")}
    assert drawn(80, {"": [sets, STEP]})[0].count("12.5%") == 3
    assert "gsm-s…ic-p1 12.5% " in drawn(80, {"": [sets, STEP]})[0]
    assert "12.5%" in drawn(40, {"": [sets, STEP]})[0]
    assert shorten("日本語の問題集", 8) == "日本…集" and shorten("short", 5) == "short"


def test_a_finished_run_keeps_a_line_without_a_bar() -> None:
    """33 bars do not fit on a screen of 24 lines."""
    runs: dict[str, list[dict[str, Any]]] = {
        f"m{place}, seed 1": [SETS, {**STEP, **SETS}] for place in range(33)
    }
    lines = drawn(100, runs, steps=1)
    assert len([line for line in lines if "step 1/1: held out: hard 12.5%" in line]) == 33 and not any(
        "━" in line for line in lines
    )


def test_the_time_left_survives_a_change_of_the_expected_last_step() -> None:
    console = Console(width=100, file=StringIO(), force_terminal=True, force_interactive=True, _environ={})
    shown = Bars(console)
    for step in range(5):
        shown.update("", step, 140 - step, STEP)
    (task,) = shown.bars.tasks
    assert task.total == 136 and task.speed is not None


def on_a_terminal(columns: int, *command: str) -> list[str]:
    """Run ``command`` on a real pseudo-terminal and return its output, one entry for each state of a line."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "handrail.cli", *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # Linux: the child has closed its side
        pass
    _, code = os.waitpid(child, 0)
    assert code == 0, written.decode()
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode()))


def test_sft_on_a_real_terminal_of_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    sets = {"hard": f"{HARD}&split=test&n=8", "easy": f"{EASY}&split=test&n=8"}
    file = configured(tmp_path, method={"name": "sft"}, train={"steps": 3}, eval={"sets": sets})
    bars = [
        line
        for line in on_a_terminal(80, "train", str(file), "--output", str(tmp_path / "run"))
        if "━" in line
    ]
    assert bars and all(len(line) <= 80 for line in bars)
    last = bars[-1]
    assert re.search(r"━ 3/3 \d\d:\d\d hard \d+.\d% easy \d+.\d% · loss \d", last)
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"loss", "groups/all", "tokens/trained", "eval/hard/mean"} <= set(tags), (
        "and nothing of rollouts, which SFT has none of:"
    )
    assert not {"groups/all_wrong", "groups/mixed", "rollouts", "reward", "tokens/sampled"} & set(tags)


def test_a_resumed_run_shows_the_last_evaluation_and_its_step_at_once(
    tmp_path: Path, handrail: Handrail
) -> None:
    sets = {"easy": f"{EASY}&split=test&n=8"}
    file = configured(tmp_path, train={"steps": 2}, eval={"sets": sets})
    run = str(tmp_path / "run")
    assert handrail("train", str(file), "--output", run).code == 0
    done = handrail("train", str(file), "--output", run, "--resume", "--set", "train.steps=4")
    assert re.search(r"^step 2/4: held out: easy \d+\.\d%\nstep 3/4: ", done.out, re.MULTILINE)
    assert re.search(r"first step: .* for the step left", done.out)


def test_a_warning_is_labeled_as_a_warning() -> None:
    console = Console(width=200, file=StringIO())
    for name in ("", "A, seed 1"):
        Bars(console).update(
            name, 0, 5, {"warning": "the verifier refuses 2 of 3\nthe split 'train' is taken"}
        )
    assert isinstance(console.file, StringIO)
    said = [line for line in console.file.getvalue().splitlines() if "held-out" not in line]
    assert said == [
        "warning: step 0: the verifier refuses 2 of 3", "warning: step 0: the split 'train' is taken",
        "warning: A, seed 1 step 0: the verifier refuses 2 of 3",
        "warning: A, seed 1 step 0: the split 'train' is taken",
    ]  # fmt: skip
