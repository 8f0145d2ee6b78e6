"""Plans: the operations of a worked solution in words, and nothing that gives a value away."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handrail import UserError, train
from handrail.data.load import load_problems
from handrail.experts.planners import DataPlannerName, leaks, make_plan, outline, skeleton
from handrail.types.problem import Problem
from tests.conftest import config


@pytest.mark.parametrize(
    ("solution", "plan"),
    [
        (
            "He sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
            "halve\nadd",
        ),
        ("- 3 × 4 = 12\n- 12 + 5 = 17", "multiply\nadd"),
        (r"$3 \times 4 = 12$ and then" + "\n" + r"$12 \cdot 5 = 60$", "multiply\nmultiply"),
        (r"$84 \div 4 = 21$", "divide"),
        ("3 + 4 * 5 = 3 + 20 = 23", "add then multiply then add"),
        ("2*3 = 6 = 12/2 = 6", "multiply then halve"),
        ("A 5-day trip costs 5 * 20 = $100.", "multiply"),
        ("The 5-day trip = a 5-day holiday", None),
        ("7 days/week * 5 weeks/month = 35 days/month", "multiply"),
        ("17 − 3 = 14", "subtract"),
        ("-5 + 3 = -2", "add"),
        ("1.5 * 4 = 6.0", "multiply"),
        ("1,000 - 200 = 800", "subtract"),
        ("$5*$3=$15", "multiply"),
        ("50 * 20% = 10", "multiply"),
        ("20% of 50 is 0.2*50=10", "multiply"),
        ("28 x 4 = 112", "multiply"),
        ("3x + 4 = 10", None),
        ("3x = 6", None),
        ("(3 + 4) * 2 = 14", "add then double"),
        ("3 * (4 + 5) = 27", "multiply then add"),
        ("3 + 4 = 7. Then 7 * 5 = 35. So 35.", "add\nmultiply"),
        ("12 / 3 = 4; 4 - 1 = 3", "divide\nsubtract"),
        ("Nothing is calculated here.", None),
        ("", None),
    ],
)
def test_a_solution_becomes_its_operations(solution: str, plan: str | None) -> None:
    assert skeleton(solution) == plan


@pytest.mark.parametrize(
    ("solution", "plan"),
    [
        ("He sold 48/2 = <<48/2=24>>24 clips.\n#### 1,072.5", "He sold .../... = ... clips.\n#### ..."),
        ("x = -3 or $x^2 = 9$", "x = -... or $x^... = ...$"),
        ("By symmetry it is Paris.", None),
        ("", None),
    ],
)
def test_an_outline_is_the_solution_without_its_numbers(solution: str, plan: str | None) -> None:
    assert outline(solution) == plan


number = st.one_of(
    st.integers(0, 10**9).map(str),
    st.integers(0, 10**9).map("{:,}".format),
    st.floats(0, 1e6).map("{:.2f}".format),
)
operator = st.sampled_from(
    ["+", "-", "−", "*", "×", "·", "/", "÷", " x ", r" \times ", r" \cdot ", r" \div "]
)
side = st.tuples(number, st.lists(st.tuples(operator, number), min_size=1)).map(
    lambda parts: parts[0] + "".join(f"{sign}{value}" for sign, value in parts[1])
)
equation = st.tuples(side, number).map(" = ".join)


@given(st.lists(equation, min_size=1))
def test_a_plan_has_a_line_for_every_equation_and_no_digit(equations: list[str]) -> None:
    plan = skeleton("\n".join(equations))
    assert plan is not None and len(plan.splitlines()) == len(equations)
    assert not re.search(r"\d", plan)


@given(st.text("0123456789+-*/x=.,;%$ \nab"))
def test_no_plan_contains_a_digit(text: str) -> None:
    assert not re.search(r"\d", skeleton(text) or "")
    assert not re.search(r"\d", outline(text) or "")


def problem(
    answer: str = "24",
    reference: str = "4 * 5 = 20\n20 + 4 = 24",
    prompt: str = "Four rows of 5 and another 4?",
) -> Problem:
    return Problem("p", prompt, answer, (reference,))


@pytest.mark.parametrize(
    "plan", ["add to get 24", "24", "reach 24.0", "multiply to 20, then add", "multiply (20) then add"]
)
def test_the_answer_and_computed_values_are_leaks(plan: str) -> None:
    assert leaks(plan, problem())


@pytest.mark.parametrize(
    "plan",
    ["multiply then add", "1. multiply\n2. add", "1) multiply\n2) add", "multiply 4 by 5", "add 240 and 2.4"],
)
def test_list_marks_values_of_the_prompt_and_other_numbers_are_not_leaks(plan: str) -> None:
    assert not leaks(plan, problem(reference="1 * 4 * 5 = 20\n20 + 4 = 24, in 2 steps"))


def test_a_value_of_the_prompt_is_a_leak_if_it_is_the_answer() -> None:
    assert leaks("take the 5", problem(answer="5"))


def test_numbers_leak_however_they_are_written() -> None:
    assert leaks("reach 1,200", problem(answer="1200"))
    assert leaks("reach 1200", problem(answer="1,200"))
    assert leaks("add up 10,20,30", problem(reference="2 * 10 = 20"))


def test_a_text_answer_leaks_in_any_case_but_only_as_a_whole_word() -> None:
    assert leaks("the capital is paris", problem(answer="Paris"))
    assert not leaks("compare the comparison", problem(answer="Paris"))
    assert not leaks("add a number", problem(answer="A"))
    assert leaks("choose A", problem(answer="A"))


def test_chat_prompts_are_read_too() -> None:
    chat = Problem("p", [{"role": "user", "content": "Four rows of 5?"}], "20", ("4 * 5 = 20",))
    assert not leaks("multiply by 5", chat) and leaks("reach 20", chat)


def test_auto_prefers_the_plan_column_and_falls_back_on_the_rule() -> None:
    own = Problem("p", "?", "24", ("4 * 6 = 24",), plan="think")
    assert [make_plan(own, own.references[0], planner) for planner in ("auto", "column", "rule",
    "outline")] == [
        "think", "think", "multiply", "... * ... = ...",
    ]  # fmt: skip
    none = problem()
    assert [make_plan(none, none.references[0], planner) for planner in ("auto", "column")] == [
        "multiply\nadd",
        None,
    ]


def test_an_outline_leaks_an_answer_that_is_not_a_number() -> None:
    asked = problem(answer="Paris", reference="2 candidates are left, and 1 is Paris")
    plan = make_plan(asked, asked.references[0], "outline")
    assert plan == "... candidates are left, and ... is Paris" and leaks(plan, asked)


@pytest.mark.parametrize("planner", ["rule", "outline"])
def test_real_worked_solutions_nearly_all_have_a_plan_and_none_leaks(planner: DataPlannerName) -> None:
    problems = load_problems("reasoning-gym:gsm_symbolic?n=200&seed=3")
    plans = [make_plan(each, each.references[0], planner) for each in problems]
    assert sum(plan is not None for plan in plans) >= 190  # all 200 had one when this was written
    assert not any(leaks(plan, each) for each, plan in zip(problems, plans, strict=True) if plan)


def test_a_policy_that_cannot_read_the_planning_prompt_is_refused_before_sampling(
    tmp_path: Path,
) -> None:
    """The built-in model knows numbers and rules, but no English."""
    settings = config(method={"name": "sort", "planner": "policy"})
    with pytest.raises(
        UserError, match="method.planner: the policy cannot write plans: .*<unk>.*choose another"
    ):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
