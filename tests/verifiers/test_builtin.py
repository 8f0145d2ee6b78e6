"""Verifiers and their pool: the rewards of answers, and that a failing verifier costs only its own
verdict."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
import torch
from hypothesis import given
from hypothesis import strategies as st

from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.types.problem import Problem
from handrail.verifiers import pool as verifier_pool
from handrail.verifiers.builtin import exact, normalized, reader, resolve
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

GRADED = [
    ("math", "288", "35 + 3 = 38\n#### 288", 1),
    ("math", "288", "The total is $5$.\n#### 288 apples", 1),
    ("math", "288", "first $288$, but no\n#### 5", 0),
    ("math", "288", r"so \boxed{288}", 1),
    ("math", "288", r"so \boxed{287}", 0),
    ("math", "288", "288", 1),
    ("math", "40", "77 + 8 = 85 ; 85 * 2 = 70 # 40", 1),
    ("math", "11", "5 + 6 = 11", 1),
    ("math", "72000", "#### 72,000.", 1),
    ("math", "72", r"#### $\$72$", 1),
    ("math", "-3", "#### 3", 0),
    ("math", r"\frac{1}{2}", "<think>easy</think><answer>0.5</answer>", 1),
    ("math", r"$\frac{1}{2}$", r"\boxed{\frac12}", 1),
    ("math", r"2\pi", "#### 2", 0),
    ("math", r"2\pi", r"#### 2\pi", 1),
    ("math", "x^2+1", r"\boxed{1 + x^2}", 1),
    ("math", "2xy", "#### 2", 0),
    ("math", "y = 2x+3", "#### 3", 0),
    ("math", r"\{1,2\}", r"\boxed{2, 1}", 1),
    ("math", "(1,2)", r"\boxed{(2,1)}", 0),
    ("math", "[0,1)", "#### [0,1)", 1),
    ("math", r"\sqrt{8}", r"The answer is $2\sqrt{2}$.", 1),
    ("math", "3", "I do not know.", 0),
    ("math", "3", "", 0),
    ("math", "3", "\ud800 #### 3", 1),
    ("math", "42", r"\boxed{6 \times 7}", 0),
    ("math", "42", r"\boxed{84/2}", 0),
    ("math", "42", r"\boxed{42 + 0}", 0),
    ("math", "42", r"\boxed{\int_0^{42} 1 dx}", 0),
    ("math", "42", r"\boxed{41 + 1 = 42}", 1),
    ("math", "42", r"\boxed{42 = 41 + 1}", 0),
    ("math", "42", r"\boxed{x = 42}", 1),
    ("math", "42", r"\boxed{42\%}", 1),
    ("math", "-300000000", r"\boxed{-3 \times 10^8}", 1),
    ("math", r"\frac{3}{4}", r"\boxed{75\%}", 1),
    ("math", r"\frac{3}{4}", r"\boxed{1 - 1/4}", 0),
    ("math", r"\frac{x^2}{2}", r"\boxed{\int_0^x t dt}", 0),
    ("math", r"\frac{x^2}{2}", r"\boxed{0.5x^2}", 1),
    ("math", r"\int_0^x f(t) dt", r"\boxed{\int_0^x f(t) dt}", 1),
    ("math", "6*7", "6*7", 1),
    ("math", r"6.6\cdot10^{-34}", r"1.6\cdot10^{-19}", 0),
    ("math", r"6.6\cdot10^{-34}", r"6.60 \cdot 10^{-34}", 1),
    ("math", "2^{-30}", "0.0", 0),
    ("math", "0", "0.0000001", 0),
    ("math", "10^{-400}", "0", 0),
    ("math", "10^{400}", "10^{400}", 1),
    ("math", "10^{400}", "10^{401}", 0),
    ("math", "2^{2000}", str(2**2000), 1),
    ("math", r"\frac{x}{2}", r"\boxed{\log_{1}{1}}", 0),
    ("math", str(7 * 10**400), str(7 * 10**400), 1),
    ("math", str(7 * 10**400), str(8 * 10**400), 0),
    ("math", r"\frac{1}{3}", "0.333333", 1),
    ("math", "42", "42_7", 0),
    ("math", "101_2", "101_3", 0),
    ("math", "101_2", "101_{2}", 1),
    ("math", "5", "x_1 = 5", 1),
    ("math", "42", r"\boxed{\neq 42}", 0),
    ("math", "42", "> 42", 0),
    ("math", "x > 42", "42 < x", 1),
    ("math", "42", r"\boxed{42 \text{ is wrong, it is 41}}", 0),
    ("math", "42", r"\boxed{42 \text{ apples}}", 1),
    ("math", "42", "0 = 42", 0),
    ("math", "42", r"\binom{42}{1}", 0),
    ("math", "(1,2)", r"\{1,2\}", 0),
    ("math", "(0,1)", "[0,1]", 0),
    ("math", "(0,1)", r"\boxed{\left(0, 1\right)}", 1),
    ("math", "x = 42", "6*7", 0),
    ("math", r"42\%", r"6*7\%", 0),
    ("math", "(6,7)", "(2*3, 14/2)", 0),
    ("math", r"\{1,2\}", r"\{3-2, 4/2\}", 0),
    ("normalized", "42", ">42", 0),
    ("normalized", "42", "!=42", 0),
    ("normalized", "42", "~42", 0),
    ("normalized", "42", "4_2", 0),
    ("normalized", "42", "= (42)", 1),
    ("normalized", "[0,1)", "(0,1]", 0),
    ("normalized", "(1, 2)", "(1, 2).", 1),
    ("normalized", "f'", "f", 0),
    ("normalized", "c", "c++", 0),
    ("normalized", "yes", "**'Yes'**", 1),
    ("normalized", "42", "84/2", 0),
    ("normalized", "84/2", "84/2", 1),
    ("exact", "72", " 72\n", 1),
    ("exact", "72", "72.0", 0),
    ("normalized", "72", "72.0", 1),
    ("normalized", "72", "72,000", 0),
    ("normalized", "72000", "step\n#### $72,000.00.", 1),
    ("normalized", "0.5", r"thus \boxed{1/2}", 1),
    ("normalized", r"\frac{1}{2}", r"\boxed{1} or \boxed{\frac{1}{2}}", 1),
    ("normalized", "3", "-3", 0),
    ("normalized", "-5", "#### -$5", 1),
    ("normalized", "New York", '"new   york".', 1),
    ("normalized", "?", "!", 0),
    ("normalized", "1", "1e999999999", 0),
    ("normalized", "1", "1/0", 0),
    ("normalized", "7", r"\boxed{7", 0),
    ("normalized", "(3,4)", r"\boxed{(3, 4)}", 1),
    ("normalized", "3,4,5", "#### 3, 4,  5", 1),
    ("normalized", "25", r"\boxed{\$25}", 1),
    ("normalized", "60", r"\boxed{60\%}", 1),
    ("normalized", "2000", r"\boxed{2{,}000}", 1),
    ("normalized", "-9", "\u22129", 1),
    ("normalized", "C", r"\boxed{\text{C}}", 1),
    ("normalized", "0.00004", "4e-05", 1),
    ("normalized", "12", "1 2", 0),
]


@pytest.mark.parametrize(("name", "answer", "completion", "reward"), GRADED)
def test_reward(name: str, answer: str, completion: str, reward: float) -> None:
    assert resolve(VerifierConfig(name=name))(Problem("p", "?", answer), completion) == reward


@pytest.mark.parametrize(
    ("name", "extract", "completion", "reward"),
    [
        ("exact", r"# (\d+)", "3 # 4 # 5", 1),
        ("exact", r"(\d+)", "3 4 5", 1),
        ("exact", r"# (\d+)", "5", 0),
        ("exact", r"a(5)?", "5 a", 0),
        ("normalized", r"is (\S+)", "It is 5.0!", 1),
        ("math", r"is (.+)", "It is x = 5.0", 1),
        ("math", r"is (.+)", "It is 10/2", 0),
    ],
)
def test_extract(name: str, extract: str, completion: str, reward: float) -> None:
    assert resolve(VerifierConfig(name=name, extract=extract))(Problem("p", "?", "5"), completion) == reward


@pytest.mark.parametrize(
    ("config", "completions", "answer"),
    [
        ({"name": "exact", "extract": r"# (\d+)"}, ["a # 5", "# 4 # 5", "# 5 or so"], "5"),
        ({"name": "exact", "extract": r"# (\d+)"}, ["5", "", "#5"], None),
        ({"name": "normalized"}, ["#### 1,000.", "1000", " $1000.0$ "], "1000"),
        ({"name": "math"}, ["so $0.5$", r"\boxed{\frac{1}{2}}", "#### 1/2", "#### 2/4"], "1/2"),
        ({"name": "math"}, [r"\boxed{x + 1}", r"it is $1 + x$"], "x + 1"),
        ({"name": "math"}, ["I cannot say", ""], None),
        ({"name": "reasoning-gym"}, ["<answer>Yes</answer>", r"\boxed{yes}", "YES"], "yes"),
        ({"name": "re:search"}, [r"\boxed{3}", "#### 3"], "3"),
        ({"name": "re:search"}, ["3", "it is 3"], None),
        ({"name": "re:search", "extract": "= (.*)"}, ["it = 3 ", "1 = 2\n2 = 3"], "3"),
    ],
)
def test_equal_answers_are_read_in_the_same_way(
    config: dict[str, str], completions: list[str], answer: str | None
) -> None:
    read = reader(VerifierConfig.model_validate(config))
    assert [read(completion) for completion in completions] == [answer] * len(completions)


@given(answer=st.text(), completion=st.text() | st.from_regex(r"[#\\boxed{}<>/answer0-9.,e+$-]*"))
def test_any_text_can_be_graded(answer: str, completion: str) -> None:
    problem = Problem("p", "?", answer)
    assert exact(problem, completion) in (0.0, 1.0)
    assert normalized(problem, completion) in (0.0, 1.0)
    assert exact(problem, answer) == 1.0


@pytest.mark.parametrize("family", ["gsm_symbolic", "arc_agi", "countdown"])
def test_reasoning_gym(family: str) -> None:
    entries = list(reasoning_gym.create_dataset(family, size=3, seed=1))
    problems = [
        Problem(str(i), entry["question"], entry["answer"], metadata=entry["metadata"])
        for i, entry in enumerate(entries)
    ]
    with VerifierPool(VerifierConfig(name="reasoning-gym", workers=1)) as pool:
        right = pool.grade([(problem, f"<answer>{problem.answer}</answer>") for problem in problems])
        marked = pool.grade([(problem, f"so\n#### {problem.answer}") for problem in problems])
        wrong = pool.grade([(problem, "<answer>-1</answer>") for problem in problems])
    assert [verdict.reward for verdict in right] == [verdict.reward for verdict in marked] == [1.0] * 3
    assert all(verdict.status == "ok" and verdict.reward == 0 for verdict in wrong)


def test_reasoning_gyms_partial_scores_are_paid_only_with_partial_credit() -> None:
    rewards = [
        resolve(VerifierConfig(name="reasoning-gym", partial_credit=partial))(COUNTDOWN, "3")
        for partial in (None, False, True)
    ]
    assert rewards == [0.0, 0.0, 0.05]


TWENTY_FOUR = Problem(
    "0", "Make 24 of 2, 3, 4, 1.", "2*3*4*1", metadata={"source_dataset": "puzzle24", "numbers": [2, 3, 4, 1]}
)
COUNTDOWN = Problem(
    "0", "Make 7 of 3, 4.", "3+4", metadata={"source_dataset": "countdown", "numbers": [3, 4], "target": 7}
)
SUM = Problem("0", "?", "1.0 + 2.0i", metadata={"source_dataset": "complex_arithmetic", "result": [1.0, 2.0]})
QUARTER = Problem("0", "?", "0.25", metadata={"source_dataset": "coin_flip"})
RARE = Problem("0", "?", "3.05e-05", metadata={"source_dataset": "coin_flip"})
OPEN_INTEGRAL = Problem(
    "0",
    "?",
    "3*Integral(x**3*cos(3*x), x) + C",
    metadata={"source_dataset": "intermediate_integration", "variable": "x", "integrand": "3*x**3*cos(3*x)"},
)
HALTING = Problem("0", "?", "False", metadata={"source_dataset": "game_of_life_halting"})
APPLES = Problem("0", "?", "57", metadata={"source_dataset": "gsm_symbolic"})
QUEENS = Problem(
    "0", "?", "Q", metadata={"source_dataset": "n_queens", "valid_answers": ["Q"], "solution": [["Q"]]}
)
INTEGRAL = Problem(
    "0",
    "?",
    "x**2 + C",
    metadata={"source_dataset": "simple_integration", "variable": "x", "integrand": "2*x"},
)


@pytest.mark.parametrize(
    ("problem", "completion", "reward"),
    [
        (TWENTY_FOUR, "4*3*2*1", 1),
        (TWENTY_FOUR, "(4*3*(2))*1", 1),
        (TWENTY_FOUR, "6*4*1*1", 0),  # other numbers
        (TWENTY_FOUR, "int('24') if 2*3*4*1 else 0", 0),
        (TWENTY_FOUR, "2*3*4**1", 0),
        (TWENTY_FOUR, "2*3)*(4*1", 0),
        (TWENTY_FOUR, "4/2*3/(1-1)", 0),
        (TWENTY_FOUR, "4!*1**(2*3)", 0),
        (TWENTY_FOUR, "9" * 5000, 0),
        (TWENTY_FOUR, "3*(4+1)*2-6", 0),
        (COUNTDOWN, "(4 + 3)", 1),
        (COUNTDOWN, "3|4", 0),
        (COUNTDOWN, "True*3+4", 0),
        (SUM, "1 + 2j", 1),
        (SUM, "nan", 0),
        (SUM, "nan + nani", 0),
        (QUARTER, "1/4", 1),
        (QUARTER, "0", 0),
        (QUARTER, "0.2", 0),
        (QUARTER, "1/0", 0),
        (QUARTER, "2.5e-1", 1),
        (RARE, "3.05e-05", 1),
        (RARE, "0.0000305", 1),
        (RARE, "0", 0),
        (RARE, "0.0001", 0),
        (OPEN_INTEGRAL, "3*Integral(x**3*cos(3*x), x) + C", 1),
        (OPEN_INTEGRAL, "Integral(3*x**3*cos(3*x), x) + C", 0),
        (HALTING, "false", 1),
        (HALTING, "True", 0),
        (HALTING, "no", 0),
        (APPLES, "57 apples", 1),
        (APPLES, "$57.00", 1),
        (APPLES, "-57", 0),
        (APPLES, "maybe 57, but then 12, so 99", 0),
        (QUEENS, "Q", 1),
        (INTEGRAL, "x**2 + oo", 0),
        (INTEGRAL, "x**2 + C", 1),
        (INTEGRAL, "x**2 + C + sin(x)**2 + cos(x)**2", 1),
        (INTEGRAL, "integrate(2*x, x)", 0),
        (INTEGRAL, "Integral (2*x, x)", 0),
        (INTEGRAL, "[integrate][0](2*x, x)", 0),
        (INTEGRAL, "(integrate#+\n(2*x, x))", 0),
    ],
)
def test_answers_are_graded_as_values_and_never_as_programs(
    problem: Problem, completion: str, reward: float
) -> None:
    assert resolve(VerifierConfig(name="reasoning-gym"))(problem, completion) == reward


@pytest.mark.parametrize(
    ("answer", "reward"), [("[['Q']]", 0.5), ("entry['metadata']['solution']", 0), ("[[q for q in 'Q']]", 0)]
)
def test_an_answer_cannot_refer_to_the_scorers_variables(answer: str, reward: float) -> None:
    assert resolve(VerifierConfig(name="reasoning-gym", partial_credit=True))(QUEENS, answer) == reward


def test_nan_is_not_an_answer_to_a_built_in_task() -> None:
    for problem in load_problems("task:complex-arithmetic?n=3"):
        rewards = [
            resolve(VerifierConfig(name="task"))(problem, f"# {answer}")
            for answer in (problem.answer, "nan nan", "nan 0", "1 nan")
        ]
        assert rewards == [1, 0, 0, 0]


@pytest.mark.parametrize("calls", [True, False])
def test_a_completion_is_never_run_as_a_harmful_program(
    calls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, sneaked = tmp_path / "there", tmp_path / "sneaked"
    there.write_text("")
    answers = [
        f"__import__('os').system('touch {sneaked}')",
        f"open('{sneaked}', 'w')",
        f"__import__('os').remove('{there}')",
    ]
    if not calls:  # without our filter, the worker's audit hook must still stop the program
        (tmp_path / "sitecustomize.py").write_text(
            "from handrail.verifiers import gym_answers\n"
            "gym_answers.scorer_input = lambda family, answer, entry: answer\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
    with VerifierPool(VerifierConfig(name="reasoning-gym", workers=1)) as pool:
        verdicts = pool.grade([(COUNTDOWN, answer) for answer in [*answers, "4+3"]])
    assert [verdict.reward for verdict in verdicts] == [0, 0, 0, 1]
    assert there.exists() and not sneaked.exists()


USER_VERIFIER = """
import os, re, subprocess, sys, time

print("imported")

def verdict(problem, completion):
    if completion == "hang":
        subprocess.Popen(["sleep", problem.metadata["child"]])
        time.sleep(1000)
    if completion == "bomb":
        re.match("(a+)+$", "a" * 50 + "b")
    if completion == "fork" and os.fork() == 0:
        sys.exit(0)
    if completion == "exit":
        os._exit(1)
    if completion == "sys.exit":
        sys.exit(1)
    if completion == "segfault":
        os.kill(os.getpid(), 11)
    if completion == "raise":
        raise KeyError("gone")
    if completion == "memory":
        bytearray(5 << 30)
    if completion == "print":
        print("noise")
        os.write(1, b"noise")
        assert sys.stdin.read() == ""
    return {"nan": float("nan"), "none": None, "text": "1", "two": 2, "true": True}.get(completion, 0.25)
"""


@pytest.fixture
def verifier_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_verifier.py"
    path.write_text(USER_VERIFIER)
    return path


@pytest.fixture
def pool(verifier_file: Path) -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig(name=f"{verifier_file}:verdict", timeout=0.5)) as pool:
        yield pool


def test_answers_are_read_on_request_and_do_not_affect_the_verdict() -> None:
    items = [(Problem("p", "?", "1/2"), completion) for completion in (r"\boxed{0.5}", "", r"\boxed{2/3}")]
    with VerifierPool(VerifierConfig(name="math", workers=1)) as pool:
        assert [(v.reward, v.answer) for v in pool.grade(items, answers=True)] == [
            (1, "1/2"),
            (0, None),
            (0, "2/3"),
        ]
        assert [(v.reward, v.answer) for v in pool.grade(items)] == [(1, None), (0, None), (0, None)]


def test_replies_of_a_forked_worker_are_ignored(verifier_file: Path) -> None:
    with VerifierPool(VerifierConfig(name=f"{verifier_file}:verdict", workers=1)) as pool:
        for completions, statuses in [(["fork"], ["ok"]), (["raise", "true", "fine"], ["error", "ok", "ok"])]:
            assert [
                verdict.status
                for verdict in pool.grade([(Problem("p", "?", ""), text) for text in completions])
            ] == statuses
            time.sleep(0.2)  # time for the fork to reply


def test_a_bad_verdict_costs_only_itself(pool: VerifierPool) -> None:
    expected = {
        "fine": "ok",
        "exit": "crash",
        "true": "ok",
        "segfault": "crash",
        "sys.exit": "error",
        "raise": "error",
        "memory": "error",
        "print": "ok",
        "nan": "error",
        "none": "error",
        "text": "error",
        "two": "error",
        "last": "ok",
    }
    verdicts = dict(zip(expected, pool.grade([(Problem(c, "?", "!"), c) for c in expected]), strict=True))
    assert {completion: verdict.status for completion, verdict in verdicts.items()} == expected
    rewards = {completion: verdict.reward for completion, verdict in verdicts.items() if verdict.reward}
    assert rewards == {"fine": 0.25, "true": 1.0, "print": 0.25, "last": 0.25}
    assert verdicts["raise"].detail == "KeyError: 'gone'"
    assert verdicts["exit"].detail == "the verifier's process exited with code 1"
    assert verdicts["segfault"].detail == "the verifier's process was killed by signal 11"


def given_back(problem: Problem, completion: str) -> object:
    return problem.metadata["value"]


def returning(value: object) -> float:
    """Return the reward if a user's verifier returns ``value``."""
    return resolve(VerifierConfig(name=f"{__name__}:given_back"))(
        Problem("p", "?", "!", metadata={"value": value}), ""
    )


@pytest.mark.parametrize(
    "value",
    [
        True,
        1,
        Fraction(1),
        Decimal(1),
        np.float32(1),
        np.int64(1),
        np.bool_(True),
        np.array(1),
        torch.tensor(1.0),
        torch.tensor(True),
    ],
    ids=repr,
)
def test_every_kind_of_number_is_a_reward(value: object) -> None:
    assert returning(value) == 1


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "None, which is not a number"),
        ("1", "'1', which is not a number"),
        ([1], "[1], which is not a number"),
        (1j, "1j, which is not a number"),
        (np.array([1.0, 0.0]), "array([1., 0.]), which is not a number"),
        (torch.tensor([1.0, 0.0]), "tensor([1., 0.]), which is not a number"),
        (Decimal("sNaN"), "Decimal('sNaN'), which is not a number"),
        (float("nan"), "nan, which is not between 0 and 1"),
        (np.float32("nan"), "nan, which is not between 0 and 1"),
        (torch.tensor(float("nan")), "nan, which is not between 0 and 1"),
        (2, "2.0, which is not between 0 and 1"),
    ],
    ids=repr,
)
def test_an_invalid_reward_is_reported(value: object, complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^the verifier returned {re.escape(complaint)}$"):
        returning(value)


def test_correct_from_is_the_threshold_of_correct(pool: VerifierPool, verifier_file: Path) -> None:
    # scores: a quarter, 1, an error
    items = [(Problem("p", "?", "!"), text) for text in ("fine", "true", "raise")]
    assert [verdict.correct for verdict in pool.grade(items)] == [False, True, None]
    lenient = VerifierConfig(name=f"{verifier_file}:verdict", correct_from=0.25, workers=1)
    with VerifierPool(lenient) as other:
        assert [(verdict.correct, verdict.reward) for verdict in other.grade(items)] == [
            (True, 0.25),
            (True, 1),
            (None, 0),
        ]
    with VerifierPool(lenient.model_copy(update={"partial_credit": False})) as other:
        assert [(verdict.correct, verdict.reward) for verdict in other.grade(items)] == [
            (True, 1),
            (True, 1),
            (None, 0),
        ]


def test_a_worker_that_came_near_its_memory_limit_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "leaking.py"
    file.write_text(
        "import os\nkept = []\n"
        "def verdict(problem, completion):\n"
        "    kept.append(b'x' * int(completion))\n"
        "    return 1.0 if len(kept) == 1 else 0.5\n"
    )
    with VerifierPool(VerifierConfig(name=f"{file}:verdict", memory_gib=1, workers=1)) as pool:
        verdicts = pool.grade(
            [(Problem("p", "?", "!"), str(size << 20)) for size in (1, 1, 600, 1, 1, 1100, 1)]
        )
    # 600 MiB are more than half of the memory left, 1100 MiB more than all of it.
    assert [verdict.reward for verdict in verdicts] == [1, 0.5, 0.5, 1, 0.5, 0, 0.5]
    assert verdicts[5].detail.startswith("MemoryError")


def test_a_memory_limit_too_low_to_start_is_reported() -> None:
    with pytest.raises(UserError, match="did not start|does not start"):
        VerifierPool(VerifierConfig(name="math", memory_gib=0.05))


def test_only_the_users_own_verifier_inherits_secrets(
    verifier_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LC_TIME", "C")
    inherited = {}
    for name in ("math", f"{verifier_file}:verdict"):
        with VerifierPool(VerifierConfig(name=name, workers=1)) as pool:
            (worker,) = pool._workers
            assert worker is not None
            lines = Path(f"/proc/{worker._process.pid}/environ").read_text().split("\0")
            inherited[name] = dict(each.split("=", 1) for each in lines if each)
    built_in, own = inherited.values()
    assert "HF_TOKEN" not in built_in
    assert (built_in["LC_TIME"], built_in["PATH"]) == ("C", os.environ["PATH"])
    assert own["HF_TOKEN"] == "secret"


def test_the_deadline_is_kept(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_pool, "FIRST_CALL_LIMIT", 0.5)
    child = f"1000.{os.getpid()}"
    completions = ["fine", "hang", "bomb", "fine", "hang", "fine", "fine", "fine"]
    started = time.monotonic()
    verdicts = pool.grade(
        [(Problem("p", "?", "!", metadata={"child": child}), completion) for completion in completions]
    )
    seconds = time.monotonic() - started
    assert [verdict.status for verdict in verdicts] == [
        "ok" if c == "fine" else "timeout" for c in completions
    ]
    assert 0.5 < seconds < 6
    deadline = time.monotonic() + 5  # they have been killed, but the kernel may remove them a little later
    while left := running(child):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


LAZY = """
import os, time

loaded = False

def verdict(problem, completion):
    global loaded
    if completion == "exit":
        os._exit(1)
    if not loaded:
        time.sleep(float(problem.metadata["loading"]))
        loaded = True
    if completion == "hang":
        time.sleep(1000)
    return 1
"""


def lazily(pool: VerifierPool, completions: str, loading: float) -> tuple[list[str], list[str]]:
    """Return the verdicts' statuses and details if the first call in a process takes ``loading`` seconds."""
    verdicts = pool.grade(
        [(Problem("p", "?", "!", metadata={"loading": loading}), text) for text in completions.split()]
    )
    return [verdict.status for verdict in verdicts], [verdict.detail for verdict in verdicts]


def test_a_first_call_may_load_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.setattr(verifier_pool, "FIRST_CALL_LIMIT", 2.0)
    with VerifierPool(VerifierConfig(name=f"{tmp_path / 'lazy.py'}:verdict", timeout=0.5, workers=1)) as pool:
        assert lazily(pool, "fine exit fine", 0.7)[0] == ["ok", "crash", "ok"]
        # A completion that hangs in a first call costs the longer limit only once, and later processes can
        # still load a model.
        statuses, details = lazily(pool, "fine hang hang hang fine", 0.7)
    assert statuses == ["ok", "timeout", "timeout", "timeout", "ok"]
    limits = [float(detail.split()[3]) for detail in details if detail]
    assert limits[:2] == [0.5, 2] and 1.2 <= limits[2] < 2


def test_a_first_call_that_never_ends_costs_the_longer_limit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.setattr(verifier_pool, "FIRST_CALL_LIMIT", 1.0)
    with VerifierPool(VerifierConfig(name=f"{tmp_path / 'lazy.py'}:verdict", timeout=0.3, workers=1)) as pool:
        statuses, details = lazily(pool, "fine fine fine", 1000)
    assert statuses == ["timeout"] * 3
    advice = "let the verifier load what it needs on import, or raise verifier.timeout"
    assert details == [f"no verdict within {limit} s; {advice}" for limit in ("1", "0.3", "0.3")]


def running(argument: str) -> list[bytes]:
    """Return the command lines of all processes that contain ``argument``."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process may end in the meantime
            commands.append(path.read_bytes())
    return [command for command in commands if argument.encode() in command.split(b"\0")]


def test_a_regex_bomb_in_extract_times_out() -> None:
    with VerifierPool(VerifierConfig(name="exact", extract=r"#(a+)+$", timeout=0.5, workers=1)) as pool:
        verdicts = pool.grade(
            [(Problem("p", "?", "a"), completion) for completion in ("#a", "#" + "a" * 60 + "b", "#a")]
        )
    assert [(verdict.status, verdict.reward) for verdict in verdicts] == [
        ("ok", 1),
        ("timeout", 0),
        ("ok", 1),
    ]


def test_verdicts_keep_the_order_and_unusual_problems_are_accepted() -> None:
    class Odd:
        pass

    problems = [
        Problem(str(i), [{"role": "user", "content": "\ud800"}], str(i % 7), metadata={"odd": Odd()})
        for i in range(128)
    ]
    with VerifierPool(VerifierConfig(name="exact")) as pool:
        verdicts = pool.grade([(problem, "3") for problem in problems])
        assert pool.grade([(Problem("p", "?", "5", metadata={"key": {(1, 2): 3}}), "5")])[0].status == "error"
        assert pool.grade([]) == []
    assert [verdict.reward for verdict in verdicts] == [float(i % 7 == 3) for i in range(128)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (VerifierConfig(name="mathh"), "no verifier 'mathh'; did you mean 'math'"),
        (VerifierConfig(name="quux"), "choose math, exact"),
        (VerifierConfig(name="no_such_module:f"), "cannot be imported: ModuleNotFoundError"),
        (
            VerifierConfig(name="no/such/file.py:f"),
            "there is no file no/such/file.py; there is no directory no/such either",
        ),
        (VerifierConfig(name="json:f"), "json has no 'f'"),
    ],
)
def test_an_unusable_verifier_is_reported_at_once(config: VerifierConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VerifierPool(config)


def test_a_verifier_may_be_a_module_in_the_working_directory(
    verifier_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(verifier_file.parent)
    with VerifierPool(VerifierConfig(name="my_verifier:verdict")) as pool:
        assert pool.grade([(Problem("p", "?", "!"), "fine")])[0].reward == 0.25


def test_a_verifier_that_exits_on_import_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os\nos._exit(3)")
    with pytest.raises(UserError, match="did not start: its process exited with code 3"):
        VerifierPool(VerifierConfig(name=f"{tmp_path}/bad.py:f"))


PARENT = """
import os, signal, sys, threading
from handrail.verifiers.config import VerifierConfig
from handrail.types.problem import Problem
from handrail.data.load import load_problems
from handrail.verifiers.pool import VerifierPool

pool = VerifierPool(VerifierConfig(name=sys.argv[1], timeout=60))
print(pool._workers[0]._process.pid, flush=True)
if sys.argv[2] == "die":
    os._exit(0)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    pool.grade([(Problem("p", "?", "!", metadata={"child": "1"}), "hang")] * 4)
except KeyboardInterrupt:
    print("interrupted", any(pool._workers))
"""


@pytest.mark.parametrize("end", ["die", "interrupt"])
def test_no_worker_outlives_its_parent(verifier_file: Path, end: str) -> None:
    command = [sys.executable, "-c", PARENT, f"{verifier_file}:verdict", end]
    parent = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    pid, *said = parent.stdout.split()
    assert said == ([] if end == "die" else ["interrupted", "False"])
    deadline = time.monotonic() + 3
    while (
        Path(f"/proc/{pid}/status").exists() and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_starts_without_heavy_imports() -> None:
    heavy = ["torch", "transformers", "math_verify", "reasoning_gym", "numpy"]
    program = (
        f"import sys, handrail.verifiers.worker; print([name for name in {heavy} if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
