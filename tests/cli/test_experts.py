"""``handrail plan`` and ``handrail judge`` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from handrail import cli
from handrail.data.load import load_problems
from handrail.experts.planners import skeleton
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool
from tests.openai_server import BROKEN, Messages, OpenAiServer, Reply

ROWS = [
    {
        "prompt": f"What is {a} + 2, doubled?",
        "answer": str(2 * a + 4),
        "reference": f"{a} + 2 = {a + 2}\n{a + 2} * 2 = {2 * a + 4}",
        "source": "me",
    }
    for a in range(20, 26)
]
PLAN = "Add the second number.\nDouble."


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["handrail", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "What?", "answer": "1"}]))
    return file


def test_plans_by_rule_make_data_that_is_read_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", data, "--output", tmp_path / "planned.jsonl") == 0
    assert "7 problems: 6 planned, 1 without a reference" in capsys.readouterr().out
    before, after = load_problems(str(data)), load_problems(str(tmp_path / "planned.jsonl"))
    assert [(p.id, p.prompt, p.answer, p.references, p.metadata) for p in after] == [
        (
            p.id,
            p.prompt,
            p.answer,
            p.references,
            {**p.metadata, **({"planner": "rule"} if p.references else {})},
        )
        for p in before
    ]
    assert [problem.plan for problem in after] == [*(skeleton(row["reference"]) for row in ROWS), None]
    assert sorted(tmp_path.iterdir()) == [data, tmp_path / "planned.jsonl"]


def test_planning_with_a_server_continues_where_it_was_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("handrail.experts.planners.planning.BATCH", 2)
    calls: list[Messages] = []

    def answer(messages: Messages) -> str | Reply:
        calls.append(messages)
        return (
            BROKEN
            if len(calls) in (3, 4)
            else "The answer is 46."
            if "21 + 2" in messages[-1]["content"]
            else PLAN
        )

    def plan(url: str) -> int:
        sets = [f"endpoint.base_url={url}", "endpoint.model=m", f"endpoint.cache={tmp_path}/cache",
            "endpoint.retries=0",
                "endpoint.pause_after=2"]  # fmt: skip
        flags = [part for assignment in sets for part in ("--set", assignment)]
        return run(
            monkeypatch, "plan", data, "--planner", "endpoint", "--output", tmp_path / "planned.jsonl", *flags
        )

    with OpenAiServer(answer) as server:
        assert plan(server.url) == 75
        assert "resume" in capsys.readouterr().err and not (tmp_path / "planned.jsonl").exists()
        assert plan(server.url) == 0
    said = capsys.readouterr().out
    assert (
        "1 kept from an earlier call" in said
        and "1 left out because they give a value away" in said
        and "4 planned" in said
    )
    plans = [problem.plan for problem in load_problems(str(tmp_path / "planned.jsonl"))]
    assert plans == [PLAN, None, PLAN, PLAN, PLAN, PLAN, None]
    assert len(calls) == 4 + 4  # the second time, the leaking plan comes from the cache


def test_plans_of_another_planner_are_neither_reused_nor_overwritten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = tmp_path / "planned.jsonl"
    assert run(monkeypatch, "plan", data, "--output", planned) == 0
    before = planned.read_bytes()
    assert run(monkeypatch, "plan", data, "--planner", "outline", "--output", planned) == 2
    assert (
        "planned.jsonl, line 1: its plan is not by outline; choose another --output"
        in capsys.readouterr().err
    )
    assert planned.read_bytes() == before
    outlines = tmp_path / "outlines.jsonl"
    for _ in range(2):  # the second call keeps all plans
        assert (
            run(monkeypatch, "plan", planned, "--planner", "outline", "--output", outlines, "--replace") == 0
        )
    assert "6 kept from an earlier call" in capsys.readouterr().out
    assert [(p.plan, p.metadata.get("planner")) for p in load_problems(str(outlines))] == [
        *[("... + ... = ...\n... * ... = ...", "outline")] * 6,
        (None, None),
    ]


OWN = [
    {"prompt": "Which city?", "answer": "Paris", "reference": "The capital, so Paris", "plan": "think"},
    {**ROWS[0], "plan": "Add what they gave you, then double it."},
    ROWS[1],
    {"prompt": "Why?", "answer": "so", "plan": "wonder"},
]


def plans_of(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[list[tuple[str | None, str | None]], str]:
    """Run ``handrail plan`` twice; return each problem's plan and planner, and the second output."""
    data.write_text("".join(json.dumps(row) + "\n" for row in OWN))
    for _ in range(2):
        assert run(monkeypatch, "plan", data, "--output", data.with_name("planned.jsonl"), *options) == 0
    found = [
        (problem.plan, problem.metadata.get("planner"))
        for problem in load_problems(str(data.with_name("planned.jsonl")))
    ]
    return found, " ".join(capsys.readouterr().out.splitlines()[-1].split())


def test_plans_that_the_data_have_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = plans_of(tmp_path / "data.jsonl", monkeypatch, capsys)
    assert found == [("think", None), (OWN[1]["plan"], None), ("add\ndouble", "rule"), ("wonder", None)]
    assert said.startswith(
        "4 problems: 3 with a plan of their own, kept (--replace replaces it), 1 kept from an earlier call →"
    )


def test_replace_overwrites_plans_if_the_planner_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = plans_of(tmp_path / "data.jsonl", monkeypatch, capsys, "--replace")
    assert found == [("think", None), ("add\ndouble", "rule"), ("add\ndouble", "rule"), ("wonder", None)]
    assert "2 kept from an earlier call" in said and "of their own" not in said


def test_an_unusable_planner_is_refused_in_one_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", data, "--planner", "endpoint", "--output", tmp_path / "out.jsonl") == 2
    assert "[endpoint]" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text("not json\n")
    assert run(monkeypatch, "plan", data, "--output", tmp_path / "other.jsonl") == 2
    assert "line 1" in capsys.readouterr().err and (tmp_path / "other.jsonl").read_text() == "not json\n"
    for content in (b"PAR1\xff", b"[1]\n"):
        (tmp_path / "other.jsonl").write_bytes(content)
        assert run(monkeypatch, "plan", data, "--output", tmp_path / "other.jsonl") == 2
        said = capsys.readouterr().err
        assert "choose another --output" in said and said.count("\n") == 1
        assert (tmp_path / "other.jsonl").read_bytes() == content


MINE = """
class Judge:
    def judge(self, attempts):
        return [[1.0] * len(steps) for _, steps in attempts]

class Coarse:
    def judge(self, attempts):
        return [[1.0] * (len(steps) + 1) for _, steps in attempts]

class Raising:
    def judge(self, attempts):
        raise KeyError("step")

    def plans(self, pairs, seeds):
        raise KeyError("plan")

class Planner:
    def plans(self, pairs, seeds):
        return ["Think."] * len(pairs)
"""


def test_a_planner_that_refuses_leaves_no_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    output, policy = tmp_path / "pp.jsonl", ("--planner", "policy", "--set", "model.path=builtin:house-tiny")
    assert run(monkeypatch, "plan", data, "--output", output, *policy) == 2
    assert "--planner: the policy cannot write plans: " in capsys.readouterr().err
    mine = f"{tmp_path / 'mine.py'}"
    assert run(monkeypatch, "plan", data, "--output", output, "--planner", f"{mine}:Raising") == 2
    assert f"the planner {mine}:Raising fails: KeyError: 'plan'" in capsys.readouterr().err
    assert run(monkeypatch, "plan", data, "--output", output, "--planner", "rules") == 2
    assert "--planner: there is no planner 'rules'; did you mean 'rule'?" in capsys.readouterr().err
    assert not list(tmp_path.glob("pp.jsonl*"))
    assert run(monkeypatch, "plan", data, "--output", output, "--planner", f"{mine}:Planner") == 0
    assert "7 problems: 6 planned" in capsys.readouterr().out


def test_a_judge_of_ones_own_is_measured(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path / 'mine.py'}"
    assert run(monkeypatch, "judge", data, "--judge", f"{mine}:Judge", "--threshold", "1") == 0
    said = capsys.readouterr().out
    assert "6 references" in said and "false alarms  0.0%" in said and "endpoint" not in said
    for arguments, sentence in (
        (("--judge", f"{mine}:Coarse"), f"the judge {mine}:Coarse gives 3 scores to 2 steps"),
        (("--judge", f"{mine}:Raising"), f"the judge {mine}:Raising fails: KeyError: 'step'"),
        (("--judge", f"{mine}:Planner"), f"{mine}:Planner has no method judge"),
        (("--judge", "rule"), "--judge: there is no judge 'rule'; did you mean 'arithmetic'?"),
        (("--threshold", "7"), "--threshold is 7; it must be above 0 and at most 1"),
        (("--threshold", "0"), "--threshold is 0; it must be above 0"),
        (("--threshold", "nan"), "--threshold is nan; it must be above 0"),
    ):
        assert run(monkeypatch, "judge", data, *arguments) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and "Traceback" not in said


def test_a_judge_is_measured_on_corrupted_references(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(monkeypatch, "judge", data, "--judge", "reference", "--output", tmp_path / "failures.jsonl") == 0
    )
    said = capsys.readouterr().out
    assert "6 references" in said and "precision" in said and "recall" in said
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert all(failure["kind"] in ("missed", "misplaced") for failure in failures)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "What?", "answer": "1"}) + "\n")
    assert run(monkeypatch, "judge", bare) == 2
    assert "no problem has a reference" in capsys.readouterr().err


def test_planned_problems_of_reasoning_gym_are_graded_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "reasoning-gym:gsm_symbolic?n=3"
    assert run(monkeypatch, "plan", source, "--output", tmp_path / "planned.jsonl") == 0
    planned = load_problems(str(tmp_path / "planned.jsonl"))
    assert all(problem.plan for problem in planned)
    with VerifierPool(VerifierConfig(name="reasoning-gym", workers=1)) as verifier:
        verdicts = verifier.grade(
            [(problem, text) for problem in planned for text in (problem.references[0], "0.123")]
        )
    assert [verdict.reward for verdict in verdicts] == [1, 0] * 3
