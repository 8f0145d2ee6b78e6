"""``handrail eval``: figures of a real model; it can be resumed, and the same seed gives the same figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from handrail._util.errors import UserError
from handrail.eval.attempts import Attempt, Attempts, read_attempts
from handrail.eval.evaluation import evaluate_sets, evaluation
from handrail.models.hf import TransformersPolicy
from handrail.types.problem import Problem
from handrail.verifiers.pool import Verdict, VerifierPool
from tests.conftest import EASY, HARD, Handrail, config

SETTINGS = [
    "--set",
    "verifier.name=exact",
    "--set",
    r"verifier.extract=# ([\d ]+)$",
    "--set",
    "rollout.max_tokens=48",
]


def attempts(name: str, *rewards_and_answers: tuple[float, str | None]) -> Attempts:
    return Attempts(
        name,
        [
            Attempt("x y z", 3, True, reward, reward == 1, answer, "ok")
            for reward, answer in rewards_and_answers
        ],
    )


def test_figures_by_hand() -> None:
    results = [
        attempts("a", (1, "5"), (1, "5"), (0, "4"), (0, None)),
        attempts("b", (0, "1"), (0, "2"), (0, "2"), (1, "7")),
    ]
    found = evaluation(results)
    assert found["pass@1"]["mean"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass@2"]["mean"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["pass@4"]["mean"] == 1
    # Of a's 6 pairs, 5·5 and twice 5 with an attempt without an answer win, and 5·4 ties twice. b's 7 is in 3
    # pairs and always ties.
    assert found["maj@2"]["mean"] == pytest.approx(((1 + 2 + 2 * 0.5 + 0) / 6 * 1 + 3 * 0.5 / 6) / 2)
    assert found["maj@4"]["mean"] == pytest.approx((1 + 0) / 2)
    assert found["tokens"] == {"mean": 3, "low": None, "high": None}
    assert "reward" not in found


def test_partial_credit_is_shown_separately_and_is_not_a_pass() -> None:
    found = evaluation([attempts("a", (0.5, None), (1, None)), attempts("b", (0, None), (0.5, None))])
    assert found["reward"]["mean"] == 0.5 and found["pass@1"]["mean"] == 0.25
    assert not any(key.startswith("maj") for key in found)


def test_unverified_attempts_count_neither_as_right_nor_as_wrong() -> None:
    broken = Attempt("x", 1, True, 0.0, None, None, "error", "no\nserver")
    a = Attempts("a", [*attempts("a", (0.1, "4"), (1, "5")).attempts, broken])
    found = evaluation([Attempts("b", [broken] * 3), a])
    assert (found["pass@1"]["mean"], found["pass@2"]["mean"], found["reward"]["mean"]) == (0.5, 1, 0.55)
    assert found["maj@2"]["mean"] == 0.5 and "pass@3" not in found and "maj@3" not in found
    assert (found["unverified"], found["first_unverified"]) == (4, "b (error): no server")
    assert "first_unverified" not in evaluation([attempts("a", (1, None))])


def test_the_answer_of_least_free_energy_is_picked() -> None:
    energies = [(True, 0.2), (False, 0.1), (True, None), (False, 0.3)]
    found = evaluation(
        [
            Attempts(
                "a",
                [Attempt("x", 1, True, right, right, None, "ok", energy=each) for right, each in energies],
            )
        ]
    )
    assert found["pick@4"]["mean"] == 0 and found["pick@2"]["mean"] == pytest.approx(2 / 6)
    assert not any(key.startswith("pick") for key in evaluation([attempts("a", (1, None), (0, None))]))


def test_a_difficult_problem_gets_more_attempts() -> None:
    """Each first attempt that is sure of itself is the answer; one without text asks for six."""

    def attempt(right: bool, energy: float | None, difficulty: float | None) -> Attempt:
        return Attempt("x", 1, True, right, right, None, "ok", energy=energy, difficulty=difficulty)

    a = Attempts("a", [attempt(True, 0.1, 0.2), *[attempt(False, 0.2, 0.1)] * 4, attempt(False, None, None)])
    found = evaluation([a])
    # The first is right; four are wrong; the last is chosen among all six, and the first is preferred.
    assert found["routed"]["mean"] == pytest.approx(2 / 6)
    assert found["routed_attempts"]["mean"] == pytest.approx((5 + 6) / 6)
    assert "routed" not in evaluation([Attempts("a", a.attempts[:5])])


def test_the_reward_of_a_wrong_answer_does_not_affect_the_vote() -> None:
    assert evaluation([attempts("a", (0.1, "4"), (0.1, "4"))])["maj@2"]["mean"] == 0


def grading(directory: Path, broken: str) -> dict[str, Any]:
    """Write a verifier that fails on the problems for which the expression ``broken`` is true."""
    (directory / "mine.py").write_text(
        f"def grade(problem, completion):\n    return 1 / 0 if {broken} else 0.0\n"
    )
    return {"name": f"{directory / 'mine.py'}:grade", "extract": None}


@pytest.mark.parametrize(("broken", "kept"), [("True", 0), ("int(problem.id.rsplit('-', 1)[-1]) >= 4", 4)])
def test_attempts_that_a_failing_verifier_graded_are_not_kept(tmp_path: Path, broken: str, kept: int) -> None:
    settings = config(rollout={"batch_size": 4, "max_tokens": 48}, verifier=grading(tmp_path, broken))
    with pytest.raises(UserError, match=r"reached no verdict on .* ZeroDivisionError.*; fix the verifier"):
        evaluate_sets(settings, {"hard": f"{HARD}&split=test&n=16"}, 2, 0, None, tmp_path / "out")
    assert len(read_attempts(tmp_path / "out/hard.jsonl")) == kept


def test_unverified_completions_are_reported_in_one_line(tmp_path: Path, handrail: Handrail) -> None:
    mine = grading(tmp_path, "problem.id == 'b'")["name"]
    (tmp_path / "d.jsonl").write_text(
        "".join(f'{{"id": "{name}", "prompt": "5 + 3 ?", "answer": "8"}}\n' for name in "ab")
    )
    given = [
        "builtin:house-tiny",
        str(tmp_path / "d.jsonl"),
        "--set",
        f"verifier.name={mine}",
        "--set",
        "rollout.max_tokens=8",
    ]
    said = (
        "of 8 completions are unverified and count neither as correct nor as wrong, first b (error): "
        "ZeroDivisionError: division by zero"
    )
    done = handrail("eval", *given, "--samples", "4", "--output", "e")
    assert done.code == 0 and f"4 {said}" in done.out, done.err
    (figures,) = json.loads(Path("e/summary.json").read_text()).values()
    assert figures["unverified"] == 4 and figures["pass@4"]["mean"] == 0
    done = handrail("probe", *given, "--rollouts", "4", "--output", "p")
    assert f"4 {said}" in done.out and "1 all wrong, 1 unverified" in done.out
    assert json.loads(Path("p/probe.json").read_text())["unverified"] == 4


def run(directory: Path, **changes: Any) -> dict[str, Any]:
    settings = {"samples": 4, "seed": 0, "limit": 12, **changes}
    sets = {"hard": f"{HARD}&split=test&n=16"}
    return evaluate_sets(
        config(rollout={"batch_size": 16, "max_tokens": 48}), sets, directory=directory, **settings
    )


def test_the_verifier_does_not_see_what_was_cut_off(
    handrail: Handrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(
        pool: VerifierPool, items: Sequence[tuple[Problem, str]], answers: bool = False
    ) -> list[Verdict]:
        seen.extend(text for _, text in items)
        return grade(pool, items, answers)

    grade = VerifierPool.grade
    monkeypatch.setattr(VerifierPool, "grade", watched)
    command = ["eval", "builtin:house-tiny", f"{EASY}&n=4", "--samples", "2", *SETTINGS]
    command += ["--set", "rollout.max_tokens=2"]
    assert handrail(*command, "--output", "cut").code == 0
    (file,) = Path("cut").glob("*.jsonl")
    cut = [each for row in read_attempts(file) for each in row.attempts]
    assert len(cut) == 8 and not seen
    assert all((each.status, each.correct, each.answer) == ("cut off", False, None) for each in cut)
    assert handrail(*command, "--output", "seen", "--set", "rollout.require_end=false").code == 0
    assert len(seen) == 8


def test_the_same_seed_gives_the_same_figures_however_often_it_was_stopped(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    whole = (tmp_path / "a/hard.jsonl").read_bytes()
    assert len(read_attempts(tmp_path / "a/hard.jsonl")) == first["hard"]["problems"] == 12

    class Stopped(Exception):
        pass

    def stop(name: str, done: float, n: int) -> None:
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "b", progress=stop)
    file = tmp_path / "b/hard.jsonl"
    assert len(read_attempts(file)) == 8
    file.write_bytes(whole[: file.stat().st_size - 20])  # an unfinished last line: its batch is sampled again
    begun: list[float] = []
    assert run(tmp_path / "b", progress=lambda name, done, n: begun.append(done)) == first
    assert [done for done in begun if done % 4 == 0] == [4, 4, 8, 8, 12] and begun == sorted(begun)
    assert file.read_bytes() == whole
    assert run(tmp_path / "b", progress=lambda name, done, n: begun.append(done)) == first
    assert begun[-2:] == [12, 12]
    run(tmp_path / "c", seed=1)
    assert (tmp_path / "c/hard.jsonl").read_bytes() != whole


@pytest.mark.parametrize("generation_batch", [64, 2])
def test_progress_is_reported_within_a_single_batch(
    generation_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersPolicy, "generation_batch", generation_batch)
    told: list[float] = []
    settings, sets = config(rollout={"max_tokens": 48}), {"hard": f"{HARD}&split=test&n=3"}
    evaluate_sets(settings, sets, 2, 0, None, tmp_path, lambda name, done, n: told.append(done))
    assert told == sorted(told) and sum(0 < done < 3 for done in told) > 10
    assert len(set(told)) >= len(told) - 1  # only 0 is reported twice: at the start and at the first token


def test_another_measurement_is_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path / "a", samples=2, limit=4)
    with pytest.raises(
        UserError,
        match="another measurement: samples is 2 there and 3 here, seed is 0 there and 1 here; choose",
    ):
        run(tmp_path / "a", samples=3, seed=1, limit=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        run(tmp_path / "full")


def test_settings_that_change_no_attempt_may_change(handrail: Handrail) -> None:
    given = ["builtin:house-tiny", f"{EASY}&n=2", *SETTINGS]
    for command in (("eval", "--samples", "1"), ("probe", "--rollouts", "4")):
        name, *options = command
        assert handrail(name, *given, *options, "--output", name).code in (0, 1)
        file = Path(name) / (f"{next(Path(name).glob('*.jsonl')).name}")
        before = file.read_bytes()
        changed = ["--set", "rollout.group_size=2", "--set", "data.too_long=skip"]
        again = handrail(name, *given, *options, "--output", name, *changed)
        assert again.code in (0, 1) and not again.err and file.read_bytes() == before
        other = handrail(name, *given, *options, "--output", name, "--set", "rollout.temperature=0.5")
        assert other.code == 2 and "rollout.temperature is 1.0 there and 0.5 here" in other.err


def test_edited_data_is_attempted_again(tmp_path: Path, handrail: Handrail) -> None:
    file = tmp_path / "d.jsonl"
    command = ["eval", "builtin:house-tiny", str(file), "--samples", "1", "--output", "out", *SETTINGS]
    file.write_text('{"prompt": "5 + 3 ?", "answer": "8"}\n')
    assert handrail(*command).code == 0
    file.write_text('{"prompt": "5 + 3 ?", "answer": "9"}\n')
    again = handrail(*command)
    assert (
        again.code == 2
        and f"holds a measurement from before the problems of {file} changed; choose another --output"
        in again.err
    )


def test_eval_on_the_command_line(handrail: Handrail) -> None:
    sets = [f"known={EASY}&split=test&n=8", f"{HARD}&split=test&n=8"]
    done = handrail(
        "eval", "builtin:house-tiny", *sets, "--samples", "2", "--limit", "6", "--output", "out", *SETTINGS
    )
    assert done.code == 0, done.err
    assert "pass@2" in done.out and "maj@2" in done.out and "known" in done.out
    summary = json.loads(Path("out/summary.json").read_text())
    assert (
        summary["known"]["pass@1"]["mean"]
        > 0.8
        > 0.2
        > summary["task-house-rules-level=hard-house=3-split=test-n=8"]["pass@1"]["mean"]
    )
    assert summary["known"]["problems"] == 6


def test_the_default_verifier_fits_the_data(handrail: Handrail) -> None:
    done = handrail(
        "eval",
        "builtin:house-tiny",
        f"known={EASY}&split=test&n=8",
        "--samples",
        "1",
        *SETTINGS[-2:],
        "--output",
        "out",
    )
    assert "graded by the verifier 'task'" in done.out
    assert json.loads(Path("out/summary.json").read_text())["known"]["pass@1"]["mean"] > 0.8


def test_greedy_decoding(handrail: Handrail) -> None:
    command = [
        "eval",
        "builtin:house-tiny",
        f"known={EASY}&split=test&n=8",
        "--samples",
        "1",
        *SETTINGS,
        "--set",
        "rollout.temperature=0",
    ]
    files = []
    for seed in ("0", "1"):
        assert handrail(*command, "--seed", seed, "--output", seed).code == 0
        files.append(Path(seed, "known.jsonl").read_text())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["builtin:house-tiny"], "there is no data to measure on"),
        (["builtin:house-tiny", "a=x.jsonl", "a=y.jsonl"], "two sets are called a"),
        (["builtin:house-tiny", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["nowhere/model", f"{EASY}&n=4"], "model.path: nowhere/model cannot be loaded"),
        (["builtin:house-tiny", f"{EASY}&n=4", "--set", "rollout.temperature=0"], "add --samples 1"),
        (
            [
                "builtin:house-tiny",
                f"{EASY}&n=4",
                "--set",
                "rollout.max_tokens=48",
                "--output",
                "/proc/nowhere",
            ],
            "cannot be written",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(
    handrail: Handrail, arguments: list[str], sentence: str
) -> None:
    done = handrail("eval", *arguments)
    assert done.code == 2 and sentence in done.err and "Traceback" not in done.err
    assert not Path("runs").exists()
