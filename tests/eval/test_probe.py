"""``handrail probe``: it finds exactly the planted faults, estimates correctly, and filters training data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from benchmarks.blending.page import LONGER, OURS
from benchmarks.suite.suite import load_suite, read_results
from handrail import train
from handrail._util.errors import UserError
from handrail._util.progress import console
from handrail.data.load import load_problems
from handrail.eval.attempts import Attempt, Attempts, AttemptSampler
from handrail.eval.faults import Reference, summed
from handrail.eval.probe import ProbedProblem, figures, groups, probe
from handrail.eval.recommend import FOREIGN, SURPRISING, recommendation
from handrail.eval.report.tables import probe_table
from handrail.models.hf import TransformersPolicy
from handrail.training.policies import load_policy
from handrail.types.problem import Problem, digest
from handrail.verifiers.audit import refusal
from handrail.verifiers.pool import VerifierPool
from tests.conftest import EASY, HARD, Handrail, config


def planted(file: Path) -> dict[str, list[str]]:
    """Write 48 problems, 20 of them with a fault, and return the faults that a probe should find."""
    rows: list[dict[str, Any]] = [
        {
            "id": problem.id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "reference": list(problem.references),
        }
        for problem in load_problems(f"{EASY}&n=36") + load_problems(f"{HARD}&n=8")
    ]
    found: dict[str, list[str]] = {}

    def plant(row: dict[str, Any], *faults: str, **changes: Any) -> None:
        row.update(changes)
        found[row["id"]] = list(faults)

    for row in rows[:5]:  # a wrong answer
        plant(row, "reference_rejected", answer=row["answer"] + " 1")
    for row, other in zip(rows[5:9], rows[9:13], strict=True):  # a reference that ends in another answer
        plant(
            row,
            "reference_rejected",
            reference=[*row["reference"], other["reference"][0].split("#")[0] + "# 101"],
        )
    plant(rows[13], "prompt_too_long", "reference_too_long", prompt=rows[13]["prompt"] + " + 1" * 60)
    padding = "1 + 1 = 2 ; " * 8
    plant(rows[14], "reference_over_max_tokens", reference=[padding + rows[14]["reference"][0]])
    plant(
        rows[15],
        "reference_too_long",
        "reference_over_max_tokens",
        reference=[padding * 3 + rows[15]["reference"][0]],
    )
    for number, row in enumerate(rows[16:18]):
        rows.append({**row, "id": f"again-{number}"})
        plant(rows[-1], "duplicate")
    for number, row in enumerate(rows[18:20]):
        rows.append({**row, "id": f"otherwise-{number}"})
        plant(row, "contradiction")
        plant(rows[-1], "reference_rejected", "duplicate", "contradiction", answer="0")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def test_planted_faults_are_found_and_no_others(tmp_path: Path) -> None:
    expected = planted(tmp_path / "data.jsonl")
    found = probe(config(), str(tmp_path / "data.jsonl"), 4, 0, None, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    assert {line["id"]: line["faults"] for line in lines if line["faults"]} == expected
    assert found["problems"] == 48 and found["kinds"]["not_sampled"] == 1
    assert found["faults"] == {
        "reference_rejected": 11, "prompt_too_long": 1, "reference_too_long": 2,
        "reference_over_max_tokens": 2, "duplicate": 4,
        "contradiction": 4,
    }  # fmt: skip
    hard = [line["kind"] for line in lines if line["id"].startswith("hard")]
    assert hard == ["all_wrong"] * 8 and found["kinds"]["all_right"] > 20
    assert found["recommendation"]["reasons"][0].startswith(
        "Fix this first: the verifier refuses 11 of 48 references"
    )
    # exact without extract compares the whole reference with the answer
    assert set(found["other_verifiers"]) == {"math", "normalized"}
    assert json.loads((tmp_path / "out/probe.json").read_text()) == found


def attempts(name: str, *rewards: float) -> Attempts:
    return Attempts(name, [Attempt("", 1, True, reward, reward == 1, None, "ok") for reward in rewards])


def test_shares_of_dead_groups_by_hand() -> None:
    tried = [
        attempts("a", 0, 0, 0, 1),
        attempts("b", 1, 1, 1, 1),
        attempts("c", 0, 0, 0, 0),
        attempts("d", 1, 1, 1, 0.5),
    ]
    four = groups(tried, 4)
    assert (four["all_wrong"]["mean"], four["all_right"]["mean"], four["wasted_rollouts"]) == (0.25, 0.25, 8)
    two = groups(tried, 2)
    assert two["all_wrong"]["mean"] == pytest.approx(
        (1 / 2 + 0 + 1 + 0) / 4
    )  # 3 of the 6 pairs of a are wrong
    assert two["all_right"]["mean"] == pytest.approx((0 + 1 + 0 + 1 / 2) / 4)
    assert two["wasted_rollouts"] == pytest.approx((1 / 2 + 1 + 1 + 1 / 2) * 2)
    # All are wrong, but two have the reward 0.1. Of the 6 pairs, only those two together and the other two
    # together are dead.
    unequal = groups([attempts("e", 0, 0.1, 0.1, 0)], 2)
    assert unequal["all_wrong"]["mean"] == 1 and unequal["wasted"]["mean"] == pytest.approx(2 / 6)


def reference(reward: float, *logp: float) -> Reference:
    return Reference(len(logp), reward, reward == 1, *summed(logp))


def problem(name: str) -> Problem:
    return Problem(name, "?", "!")


def test_partial_credit_does_not_make_a_problem_mixed() -> None:
    kinds = [
        ProbedProblem(problem("a"), attempts("a", *rewards), [], []).kind
        for rewards in ([0.1, 0.1], [0.1, 1], [1, 1])
    ]
    assert kinds == ["all_wrong", "mixed", "all_right"]


def test_unverified_rollouts_are_not_wrong() -> None:
    broken = [Attempt("", 1, True, 0.0, None, None, "timeout", "no verdict")] * 2
    some = Attempts("a", [*attempts("a", 0, 1).attempts, *broken])
    probed = [
        ProbedProblem(problem("a"), some, [], []),
        ProbedProblem(problem("b"), Attempts("b", broken * 2), [], []),
    ]
    found = figures(probed, 4)
    assert {name: each["mean"] for name, each in found["pass"].items()} == {"pass@1": 0.5, "pass@2": 1}
    assert found["groups"]["2"]["all_wrong"]["mean"] == 0 and found["groups"]["4"]["all_wrong"] is None
    assert (found["unverified"], found["first_unverified"]) == (6, "a (timeout): no verdict")
    console.print(probe_table(found))


def test_figures_by_hand() -> None:
    probed = [
        ProbedProblem(problem("a"), attempts("a", 0, 0), [reference(1, -1, -5)], []),
        ProbedProblem(problem("b"), attempts("b", 0, 0), [reference(0, -2)], ["reference_rejected"]),
        ProbedProblem(problem("c"), attempts("c", 0, 1), [], []),
        ProbedProblem(problem("d"), None, [Reference(9, 1, True, None)], ["prompt_too_long"]),
    ]
    found = figures(probed, 2)
    assert found["kinds"] == {"all_wrong": 2, "mixed": 1, "all_right": 0, "unverified": 0, "not_sampled": 1}
    assert found["with_reference"] == 3 and found["all_wrong_with_reference"] == 1
    assert found["reference_tokens"] == {"median": 2, "longest": 9}
    assert found["reference_probability"] == pytest.approx(2.718281828 ** (-8 / 3)) and found[
        "surprising_tokens"
    ] == pytest.approx(1 / 3)
    assert found["pass"]["pass@1"]["mean"] == pytest.approx(1 / 6)


def seen(
    wrong: int, mixed: int, right: int, helped: int | None = None, strange: float = 0.0, **faults: int
) -> dict[str, Any]:
    tried, helped = wrong + mixed + right, wrong if helped is None else helped
    dead = (wrong + right) / tried
    sizes = {
        size: {"wasted": {"mean": min(1, dead + 0.4 / size)}, "wasted_rollouts": dead * size * tried}
        for size in (2, 4, 8)
    }
    return {
        "rollouts": 8, "kinds": {"all_wrong": wrong, "mixed": mixed, "all_right": right, "not_sampled": 0},
        "with_reference": tried,
        "all_wrong_with_reference": helped, "surprising_tokens": strange, "faults": faults,
        "groups": {str(size): each for size, each in sizes.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "method", "size", "words"),
    [
        (seen(5, 90, 5), "grpo", 4, "Only 5 of 100 problems failed"),
        (seen(5, 15, 80), "grpo", 8, "80 of 100 problems were solved in every rollout"),
        (seen(0, 0, 4), "grpo", 8, "all of their rollouts are right: take harder problems. Groups"),
        (seen(90, 10, 0), "sft", 8, "90 of 100 problems failed in all of 8 rollouts (90%)"),
        (
            seen(90, 10, 0, strange=0.3),
            "sft",
            8,
            "30% of the references' tokens have a probability below 1%",
        ),
        (seen(90, 10, 0, helped=20), "grpo", 8, "add references"),
        (
            seen(60, 40, 0, reference_rejected=30),
            "sft",
            4,
            "Fix this first: the verifier refuses 30 of 100 references",
        ),
        (seen(60, 40, 0), "sft", 4, "With groups of 4, 70% of the rollouts"),
    ],
)
def test_recommendations(found: dict[str, Any], method: str, size: int, words: str) -> None:
    advice = recommendation(found)
    assert (advice["method"], advice["group_size"]) == (method, size)
    assert words in " ".join(advice["reasons"])
    assert ("handrail model blend" in advice["then"]) == (method == "sft")


@pytest.mark.parametrize(
    ("found", "before"),
    [
        (seen(5, 90, 5), ""),
        (seen(0, 1, 4), "take harder problems"),
        (seen(90, 10, 0, helped=20), "add references"),
        (seen(90, 10, 0, helped=20, reference_rejected=80), "make the verifier accept the references"),
        (seen(90, 10, 0), ""),
    ],
)
def test_what_comes_before_training_is_said_first(found: dict[str, Any], before: str) -> None:
    advice = recommendation(found)
    assert advice["before"] == before
    carried = "carry a signal" in " ".join(advice["reasons"])
    assert carried == (found["kinds"]["all_wrong"] == 5)


@pytest.mark.parametrize("style", ["clean", "foreign"])
def test_the_recommended_method_is_the_best_compromise_in_the_evidence(style: str) -> None:
    """Check the recommendation on the references, the model and the results of docs/evidence.md."""
    suite = load_suite()
    policy = load_policy(
        config(model={"path": suite.backbones["middle"], "device": "cpu"}), Accelerator(cpu=True)
    )
    sources = [
        source["path"].format(style=style, problems=1).replace("n=600", "n=8")
        for source in suite.base["data"]["train"]
    ]
    problems = [problem for source in sources for problem in load_problems(source)]
    texts = [policy.renderer.completion(problem.references[0]) for problem in problems]
    scores = torch.cat(policy.score([policy.renderer.prompt(problem) for problem in problems], texts))
    strange = (scores < math.log(SURPRISING)).float().mean().item()
    assert strange < FOREIGN / 4 if style == "clean" else strange > FOREIGN * 1.25

    advice = recommendation(seen(90, 10, 0, strange=strange))
    assert advice["method"] == "sft" and "grpo" in advice["then"]

    def compromises(file: str) -> dict[str, float]:
        """Return the mean of the in-domain and the out-of-domain accuracy of each method in a file."""
        runs: dict[str, list[float]] = {}
        for run in read_results(Path(__file__).parents[2] / "docs/evidence" / file):
            if run.cell.style == style and run.cell.phase == "evidence":
                both = [run.mean(sets) for sets in (suite.in_domain, suite.out_of_domain)]
                runs.setdefault(run.cell.method, []).append(fmean(both))
        return {method: fmean(each) for method, each in runs.items()}

    found = {**compromises("results.jsonl"), **compromises("blending.jsonl")}
    ours = min(found.pop(OURS), found.pop(LONGER))
    assert ours > max(found.values())


def test_training_uses_only_the_problems_that_a_probe_kept(tmp_path: Path) -> None:
    planted(tmp_path / "data.jsonl")
    probe(config(), str(tmp_path / "data.jsonl"), 4, 0, None, tmp_path / "out")
    source = {"path": str(tmp_path / "data.jsonl"), "probe": str(tmp_path / "out/problems.jsonl")}
    # Without the probe, train would refuse the data for its long prompt.
    with pytest.raises(UserError, match="too long for the model's context"):
        train(config(data={"train": source["path"]}), tmp_path / "whole")
    train(config(data={"train": [{**source, "keep": ["all_wrong"]}]}, train={"steps": 3}), tmp_path / "run")
    kinds = {
        line["id"]: line["kind"]
        for line in map(json.loads, (tmp_path / "out/problems.jsonl").read_text().splitlines())
    }
    trained = {
        json.loads(line)["problem"] for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()
    }
    assert len(trained) > 6 and {kinds[problem] for problem in trained} == {"all_wrong"}


def test_sums_are_kept_of_a_references_log_probabilities_and_not_each_of_them() -> None:
    found = reference(1, -0.5, -5.0, -1.5)  # exp(−5) is 0.7 %, below 1 %
    assert found == Reference(3, 1, True, -7.0, 1)


def test_a_continued_probe_scores_no_reference_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path / "data.jsonl")  # the references of two problems exceed the context
    source, directory = str(tmp_path / "data.jsonl"), tmp_path / "out"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as first, pytest.raises(KeyboardInterrupt):
        first.setattr(AttemptSampler, "sample", stopped)
        probe(config(), source, 4, 0, None, directory)
    kept = directory / "references.jsonl"
    scores = kept.read_text()
    score = TransformersPolicy.score
    scored: list[int] = []

    def counted(self: TransformersPolicy, prompts: list[list[int]], *rest: Any) -> list[torch.Tensor]:
        scored.append(len(prompts))
        return score(self, prompts, *rest)

    monkeypatch.setattr(TransformersPolicy, "score", counted)
    continued = probe(config(), source, 4, 0, None, directory)
    assert not scored
    assert continued == probe(config(), source, 4, 0, None, tmp_path / "whole")
    assert len(scored) == 1
    for name in ("references.jsonl", "problems.jsonl", "probe.json"):
        assert (directory / name).read_text() == (tmp_path / "whole" / name).read_text()
    kept.write_text(scores[:-3])
    assert continued == probe(config(), source, 4, 0, None, directory)
    assert scored == 2 * scored[:1] and kept.read_text() == scores


def test_references_are_classified_by_verdict_and_not_by_reward(tmp_path: Path) -> None:
    """A wrong reference with reward 0.1 is rejected; one that breaks the verifier is unverified instead."""
    (tmp_path / "mine.py").write_text(
        "def grade(problem, completion):\n"
        "    return 1 / 0 if problem.id == 'c' else 1.0 if problem.id == 'a' else 0.1\n"
    )
    rows = [
        {"id": name, "prompt": f"{place} + 1 =", "answer": "2", "reference": "# 2"}
        for place, name in enumerate("abc")
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = config(verifier={"name": f"{tmp_path / 'mine.py'}:grade", "extract": None})
    found = probe(mine, str(file), 4, 0, None, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    assert [line["faults"] for line in lines] == [[], ["reference_rejected"], ["unverifiable"]]
    assert [line["references"][0]["correct"] for line in lines] == [True, False, None]
    assert found["all_wrong_with_reference"] == 0  # b's reference is wrong
    with VerifierPool(mine.verifier) as verifier:
        said = refusal(load_problems(str(file)), mine.verifier, verifier)
    assert said == (
        f"the verifier refuses 1 of the first 3 references, first {file}, line 2; the verifier reaches no "
        "verdict on 1 of the first 3 "
        f"references, first on {file}, line 3 (error): ZeroDivisionError: division by zero; see handrail "
        "check"
    )


@pytest.mark.parametrize(("broken", "code"), [(0, 0), (1, 0), (2, 1)])
def test_a_probe_exits_with_1_on_spoiling_faults_after_writing(
    broken: int, code: int, tmp_path: Path, handrail: Handrail
) -> None:
    """One wrong reference in 20 is tolerated, two are not; ``handrail check`` agrees."""
    rows = [
        {"prompt": f"{place} + 0 =", "answer": str(place), "reference": f"# {place + (place < broken)}"}
        for place in range(20)
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--set", "verifier.name=task", "--set", "rollout.max_tokens=8"]
    done = handrail("probe", "builtin:house-tiny", str(file), "--rollouts", "4", "--output", "out", *settings)
    assert done.code == code and "results per problem" in done.out, done.err
    assert json.loads(Path("out/probe.json").read_text())["spoiled_by"] == ["reference_rejected"] * code
    assert ("would spoil a run: reference_rejected" in done.out) == bool(code)
    assert handrail("check", str(file), "--verifier", "task").code == code


TWO = load_problems(f"{HARD}&n=2")


@pytest.mark.parametrize(
    ("lines", "keep", "sentence"),
    [
        (None, ["mixed"], "problems.jsonl cannot be read"),
        (["nonsense"], ["mixed"], "problems.jsonl, line 1: this is not a line of a probe's problems.jsonl"),
        (
            [json.dumps({"problem": digest(TWO[:1]), "kind": "mixed", "faults": []})],
            ["mixed"],
            "it has no result for 1 of the 2 problems .* in their present form, first hard-train-0-1",
        ),
        (
            [
                json.dumps({"problem": digest([problem]), "kind": "mixed", "faults": ["duplicate"]})
                for problem in TWO
            ],
            ["mixed", "all_wrong"],
            "no problem of .* is mixed or all_wrong",
        ),
    ],
)
def test_an_unsuitable_probe_is_refused_as_filter(
    tmp_path: Path, lines: list[str] | None, keep: list[str], sentence: str
) -> None:
    file = tmp_path / "problems.jsonl"
    if lines is not None:
        file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=sentence):
        train(
            config(data={"train": [{"path": f"{HARD}&n=2", "probe": str(file), "keep": keep}]}),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_probe_on_the_command_line(handrail: Handrail) -> None:
    settings = [
        "--set",
        "verifier.name=exact",
        "--set",
        r"verifier.extract=# ([\d ]+)$",
        "--set",
        "rollout.max_tokens=48",
    ]
    done = handrail(
        "probe", "builtin:house-tiny", f"{HARD}&n=6", "--rollouts", "4", "--output", "out", *settings
    )
    assert done.code == 0, done.err
    assert "6 problems, 4 rollouts each: 6 all wrong" in done.out
    assert 'start with method.name = "sft"' in done.out and "then handrail model blend START" in done.out
    again = handrail(
        "probe", "builtin:house-tiny", f"{HARD}&n=6", "--rollouts", "8", "--output", "out", *settings
    )
    assert again.code == 2 and "rollouts is 4 there and 8 here" in again.err
    room = handrail("probe", "builtin:house-tiny", f"{HARD}&n=6", "--output", "none")
    assert room.code == 2 and "lower rollout.max_tokens" in room.err and not Path("none").exists()
