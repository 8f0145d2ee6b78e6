"""Judges, correctors and planners of a real server in the real training loop: with faults, unreachable,
paused and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from handrail import Context, Group, Method, UserError, train
from handrail._util.errors import Paused
from handrail.data.load import load_problems
from handrail.experts.conversations import DONE
from handrail.experts.planners import skeleton
from handrail.experts.steps import split_steps
from handrail.methods.autonpo import AutoNpo
from handrail.methods.grpo import Grpo
from handrail.methods.requests import Ask
from tests.conftest import EASY, HARD, config
from tests.forks import start, together
from tests.openai_server import BROKEN, CUT, MALFORMED, RATE_LIMITED, Messages, OpenAiServer, Reply
from tests.reliability.processes import finished, job
from tests.tiny_models import save_chat_model

KEY = "sk-this-is-the-secret-key"
PROBLEMS = {
    str(problem.prompt): problem for source in (EASY, HARD) for problem in load_problems(f"{source}&n=64")
}


def expert(messages: Messages) -> str | Reply:
    """Plan, judge and correct like an expert that knows the house rules."""
    asked = messages[-1]["content"]
    problem = PROBLEMS[re.search(r"<problem>\n(.*)\n</problem>", asked)[1]]  # type: ignore[index]
    reference = split_steps(problem.references[0])
    if "Write a plan" in asked:
        return skeleton(problem.references[0]) or ""
    if "first wrong step" in asked:
        steps = re.findall(r"<step_\d+>\n(.*)\n</step_\d+>", asked)
        wrong = next(
            (at for at, (a, b) in enumerate(zip(steps, reference, strict=False), 1) if a != b.strip()), None
        )
        return json.dumps({"first_wrong_step": wrong})
    beginning = re.search(r"<beginning>\n(.*)\n</beginning>", asked)[1]  # type: ignore[index]
    kept = len(split_steps(beginning))
    return reference[kept].strip(" ;") + (DONE if kept == len(reference) - 1 else "")


def run(
    server: OpenAiServer, tmp_path: Path, name: str = "run", resume: bool = False, **changes: Any
) -> list[dict[str, Any]]:
    endpoint = {
        "base_url": server.url,
        "model": "m",
        "cache": str(tmp_path / "cache.sqlite"),
        "retries": 1,
        "timeout": 5.0,
    }
    changes = {"train": {"steps": 3, "problems_per_step": 4, "learning_rate": 5e-4}, **changes}
    train(
        config(**{**changes, "endpoint": {**endpoint, **changes.get("endpoint", {})}}),
        tmp_path / name,
        resume=resume,
    )
    return lines(tmp_path / name)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.usefixtures("key")
def test_sort_learns_from_plans_of_a_faulty_server_and_never_writes_the_key(
    tmp_path: Path,
) -> None:
    faults = [RATE_LIMITED, None, BROKEN, BROKEN, BROKEN, CUT, None, MALFORMED]
    with OpenAiServer(expert, faults) as server:
        rows = run(server, tmp_path, method={"name": "sort", "planner": "endpoint"})
        asked = len(server.requests)
        again = run(server, tmp_path, "again", method={"name": "sort", "planner": "endpoint"})
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        assert len(server.requests) - asked <= sum(row.get("endpoint/failed", 0) for row in rows)
    assert (
        sum(row.get("endpoint/failed", 0) for row in rows) >= 1
        and sum(row.get("planner/no_answer", 0) for row in rows) >= 1
    )
    assert all(row["groups/guided"] > 0 for row in rows) and again[0]["endpoint/cached"] > 0
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_sort_can_use_plans_of_the_policy(tmp_path: Path) -> None:
    """A random model's plans are unfinished or unusable. Such repairs are weighted by p0."""
    model = save_chat_model(tmp_path / "model", context=2048)
    method = {"name": "sort", "planner": "policy", "plan_tokens": 8}
    train(config(model={"path": str(model)}, method=method), tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert all(row["groups/guided"] > 0 for row in rows)
    assert all(row["planner/asked"] == row["groups/guided"] for row in rows)
    assert all(
        row.get("planner/no_answer", 0) + row.get("planner/leaking", 0) <= row["groups/guided"]
        for row in rows
    )
    assert any("planner/no_answer" in row for row in rows)


def test_an_outline_trains_like_the_same_plan_in_a_column(tmp_path: Path) -> None:
    with (tmp_path / "data.jsonl").open("w") as stream:
        for problem in load_problems(f"{HARD}&n=16"):
            plan = re.sub(r"[0-9]+", "...", problem.references[0])
            row = {
                "prompt": problem.prompt,
                "answer": problem.answer,
                "reference": problem.references[0],
                "plan": plan,
            }
            stream.write(json.dumps(row) + "\n")
    rows = {}
    for planner in ("outline", "column", "rule"):
        train(
            config(method={"name": "sort", "planner": planner}, data={"train": str(tmp_path / "data.jsonl")}),
            tmp_path / planner,
        )
        rows[planner] = lines(tmp_path / planner)
    assert rows["outline"] == rows["column"] != rows["rule"]
    assert rows["outline"][0]["groups/guided"] > 0 and "planner/no_answer" not in rows["outline"][0]


def test_a_leaking_plan_is_not_used(tmp_path: Path) -> None:
    with OpenAiServer(
        lambda messages: "The answer is " + PROBLEMS[messages[-1]["content"].split("\n")[3]].answer
    ) as server:
        rows = run(server, tmp_path, method={"name": "sort", "planner": "endpoint"})
    assert all(
        row["planner/leaking"] == row["groups/guided"] > 0 and "planner/no_answer" not in row for row in rows
    )
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    # the plan in the data is shown instead
    assert not any("answer is" in row.get("plan", "") for row in samples)


@pytest.mark.parametrize("mode", ["step", "suffix", "reference"])
def test_scope_repairs_with_a_judge_and_a_corrector_of_a_server(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handrail.training.update.AUTHORS_EVERY", 1)
    method = {
        "name": "scope",
        "judge": "llm",
        "corrector": "endpoint",
        "mode": mode,
        "min_correct_prefix": 0.0,
        "placing": "append",
    }
    hot = {"max_tokens": 48, "group_size": 8, "temperature": 2.0}
    with OpenAiServer(expert) as server:
        rows = run(server, tmp_path, method=method, data={"train": f"{EASY}&n=64"}, rollout=hot)
    assert any("scope/repaired" in row and row["grad_norm/repaired"] > 0 for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert any(
        "teacher" in row["author"] and "policy" in row["author"] and row["reward"] == 1 for row in samples
    )


def test_an_unreachable_server_costs_signal_but_not_the_run(tmp_path: Path) -> None:
    with OpenAiServer(expert) as server:
        gone = server.url
    method = {"name": "scope", "judge": "llm", "min_correct_prefix": 0.0}
    endpoint = {"base_url": gone, "retries": 0, "pause_after": 1000}
    with OpenAiServer(expert) as server:
        rows = run(server, tmp_path, method=method, endpoint=endpoint)
    assert len(rows) == 3 and all(row["scope/not_judged"] == row["endpoint/failed"] for row in rows)


def test_a_paused_run_continues_exactly(tmp_path: Path) -> None:
    method = {"name": "sort", "planner": "endpoint"}
    with OpenAiServer(expert) as server:
        whole = run(
            server, tmp_path, "whole", method=method, endpoint={"cache": str(tmp_path / "other.sqlite")}
        )
    calls = 0

    def dying(messages: Messages) -> str | Reply:
        nonlocal calls
        calls += 1
        return expert(messages) if calls <= 6 else BROKEN

    with OpenAiServer(dying) as server, pytest.raises(Paused, match="resume"):
        run(server, tmp_path, method=method, endpoint={"pause_after": 1, "retries": 0, "concurrency": 1})
    done = len(lines(tmp_path / "run"))
    assert 0 < done < 3 and (tmp_path / f"run/checkpoints/step-{done:06d}").is_dir()
    with OpenAiServer(expert) as server:
        resumed = run(
            server,
            tmp_path,
            resume=True,
            method=method,
            endpoint={"pause_after": 1, "retries": 0, "concurrency": 1},
        )

    def learned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if not key.startswith("endpoint/")} for row in rows]

    assert learned(resumed) == learned(whole)


def test_a_server_that_hangs_does_not_keep_a_stopped_run_alive(tmp_path: Path) -> None:
    asked = threading.Event()

    def hang(messages: Messages) -> str:
        asked.set()
        time.sleep(60)
        return ""

    method = {"name": "sort", "planner": "endpoint"}
    with OpenAiServer(hang) as server:
        endpoint = {"base_url": server.url, "model": "m", "timeout": 50, "cache": str(tmp_path / "c.sqlite")}
        file = job(tmp_path, method=method, endpoint=endpoint)
        process = start("train", file, "--output", tmp_path / "run")
        assert asked.wait(120)
        process.send_signal(signal.SIGTERM)
        code, said = finished(process, 40)
    assert code == 75 and "stopped by SIGTERM; step 0 is checkpointed" in " ".join(said.split())


class Pausing(Grpo):
    async def guide(self, group: Group, ctx: Context) -> Group:
        if ctx.step == 2 and os.environ["RANK"] == "1":
            raise Paused("the expert is gone")
        return group


class PausingReward(AutoNpo):
    """Its callback notes the groups that failed, while another process has none."""

    async def reward(self, group: Group, ctx: Context) -> Group:
        if ctx.step == 2 and os.environ["RANK"] == "1":
            raise Paused("the expert is gone")
        return await super().reward(group, ctx)


def train_until_paused(directory: Path, method: type[Method[Any]]) -> None:
    kept = {"checkpoint_every": 10, "keep_last": 2}
    with pytest.raises(Paused) as paused:
        train(config(train={"steps": 3, **kept}), directory, method=method)
    Path(f"{directory}-{os.environ['RANK']}").write_text(str(paused.value))


@pytest.mark.parametrize("method", [Pausing, PausingReward])
def test_a_pause_of_one_process_pauses_all_with_a_checkpoint(
    method: type[Method[Any]], tmp_path: Path
) -> None:
    together(2, train_until_paused, tmp_path / "run", method)
    for rank in range(2):
        said = (tmp_path / f"run-{rank}").read_text()
        assert said == "the expert is gone; step 1 is checkpointed, to go on with --resume"
    assert (tmp_path / "run/checkpoints/step-000001").is_dir() and len(lines(tmp_path / "run")) == 1


UNTIL_STEP_3 = """
from handrail.experts.steps import split_steps
from handrail._util.errors import Paused


class Judge:
    def __init__(self):
        self.left = 2 * 4 * 4

    def judge(self, attempts):
        self.left -= len(attempts)
        if self.left < 0:
            raise Paused("the judge is gone")
        return [[0.5] * len(steps) for _, steps in attempts]
"""


def test_a_judge_that_a_term_asks_may_fail_without_a_loss(tmp_path: Path) -> None:
    """The checkpoint is that of the last complete step, as if a method asked."""
    (tmp_path / "judge.py").write_text(UNTIL_STEP_3)
    term = {"name": "prorag", "judge": f"{tmp_path / 'judge.py'}:Judge"}
    settings = config(
        method={"name": "grpo", "terms": [term]},
        train={"steps": 4, "checkpoint_every": 0, "problems_per_step": 4, "updates_per_step": 2},
        rollout={"group_size": 4},
    )
    with pytest.raises(Paused, match="the judge is gone; step 2 is checkpointed, to go on with --resume"):
        train(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]


class AsksLate(Grpo):
    async def credit(self, group: Group, ctx: Context) -> Group | None:
        await Ask("random", "what is right?")
        return await super().credit(group, ctx)


def test_nobody_is_asked_while_a_step_is_learned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="credit samples or asks an expert, .* do it in guide"):
        train(config(), tmp_path / "run", method=AsksLate)
