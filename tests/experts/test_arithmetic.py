"""The arithmetic judge: what it reads, what it ignores, and how often it is right on worked solutions."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from handrail.data.load import load_problems
from handrail.eval.judge_report import labeled, report
from handrail.experts.judges import first_error
from handrail.experts.judges.arithmetic import ArithmeticJudge, equalities, score
from handrail.experts.steps import split_steps
from handrail.types.problem import Problem

SIGNS = {True: "T", False: "F", None: "?"}


def verdicts(text: str) -> str:
    return "".join(SIGNS[verdict] for verdict in equalities(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7", "T"),
        ("3 + 4 = 8", "F"),
        ("2 + 3 * 4 = 14", "T"),
        ("2 + 3 * 4 = 20", "F"),
        ("10 - 3 - 2 = 5", "T"),
        ("10 - 3 - 2 = 9", "F"),
        ("48 / 4 / 2 = 6", "T"),
        ("(3 + 4) * 2 = 14", "T"),
        ("2(3+4) = 14; (3)(4) = 12; 3(16)=47", "TTF"),
        ("-5 + 3 = -2; 5 - -3 = 8; 3 - 5 = 2", "TTF"),
        ("15 = 3*5, 15 = 3*6", "T?"),
        ("2^10 = 1024; 2^3^2 = 512; 10^-2 = 0.01; 5**2 = 26", "TTTF"),
        ("3² + 4² = 5²", "T"),
        ("5 times 3 = 15, 15 divided by 3 = 5, 5 plus 3 equals 9", "TTF"),
        ("42x7 = 294, 57 x €7 = €399, 57 x €7 = €390", "TTF"),
        ("12 ÷ 1/3 = 36, 12÷1/3=36, 12 / 1 / 3 = 4, 12 / 1 / 3 = 36, 12 / 1 / 3 = 5", "TTTTF"),
        ("1,000 - 200 = 800 and 5,000 * 2 = 10,001", "TF"),
        ("1. 5 + 3 = 8", "T"),
        ("- 3 × 4 = 12", "T"),
        ("**5 + 3 = 8**, so 8 * 2 = **17**", "TF"),
        ("Step 2: 5 + 3 = 9", "F"),
    ],
)
def test_plain_arithmetic(text: str, expected: str) -> None:
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2*3 = 6 = 12/2 = 6", "TTT"),
        ("2 + 3 = 5 = 6", "TF"),
        ("3 + 4 = 7 * 2 = 14", "TT"),
        ("3 + 4 = 7 * 2 = 15", "TF"),
        ("3 + 4 = 8 * 2 = 16", "FT"),
        ("10 * 2 = 20 + 5 = 25 / 5 = 5", "TTT"),
        ("5 * 3 = 10 + 5 - 2 = 13", "TT"),
        ("3 + 4\n= 7", "T"),
        ("So she has 3 + 4 = 7 apples. Then 7 * 5 = 36", "TF"),
        ("71 + 44 + T = 115 + T = 225", "??"),
        ("William receives 6=6 emails", "T"),
    ],
)
def test_a_chain_compares_neighbors_strictly_or_as_a_running_calculation(text: str, expected: str) -> None:
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 apples + 3 apples = 8 apples", "T"),
        ("5 apples + 3 apples = 9 apples", "F"),
        ("Jimmy did 1/2 * 236 pieces = 118 pieces.", "T"),
        ("The total is 2083 + 1592 = 3675.", "T"),
        ("There are 60 players and 27 singers, so 60+27 = 88 leave", "F"),
        ("$5 * 3 = $15 and $5 * 3 = $16", "TF"),
        ("12 km/h * 2 h = 24 km", "T"),
        ("6 pounds/duck * 44 duck = 264 pounds", "T"),
        ("€130/day * 10 days/month = €1301/month", "F"),
        ("4 hats at 18 skeins per pair of gloves + 2 = 20 skeins of wool", "T"),
        ("480 / 4 = 120 tubes of paint, 480 / 4 = 130 tubes of paint", "TF"),
        ("half * 122 beetles = 61 grasshoppers", "T"),
        ("50 cents * 4 = $2, 50 cents * 4 = $3", "TF"),
        ("30 minutes + 30 minutes = 1 hour", "T"),
        ("3 weeks + 2 days = 23 days, 3 weeks + 2 days = 24 days", "TF"),
        ("2 hours * 60 minutes/hour = 120 minutes", "T"),
        ("5 (from Monday) + 3 (from Tuesday) = 9", "F"),
        ("48/2 = <<48/2=24>>24 clips", "TT"),
        ("48/2 = <<48/2=25>>24 clips", "FT"),
        ("48/2 = $<<48/2=24>>25", "TF"),
    ],
)
def test_words_units_and_money(text: str, expected: str) -> None:
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20% of 50 = 10; 20% of 50 = 11", "TF"),
        ("50 * 20% = 10", "T"),
        ("50 + 10% = 55", "T"),
        ("100% - 30% = 70%; 100% - 30% = 75% of the quiz", "TF"),
        ("20/50 * 100 = 40%; 20/50 * 100% = 40%; 20/50 = 40%; 20/50 * 100 = 50%", "TTTF"),
        ("3/4 of 20 = 15; 3/4 of the 20 = 16", "TF"),
        ("1/2 * 10 = 5", "T"),
        ("2 1/2 * 4 = 10; 2½ * 4 = 10; 2½ * 4 = 11", "TTF"),
        ("10/3 = 3.33; 10/3 ≈ 3.3; 10/3 = 3.5; 10/3 = about 3", "TTFT"),
        ("18 x 0.6666666666666666 = 12.0", "T"),
        ("26.666666666666664 - 5 = 21.666666666666664", "T"),
        ("1234 * 7 ≈ 8,600; 1234 * 7 ≈ 5,000", "TF"),
        ("6.02 * 10^3 / 7.11 = 8.47 * 10^2", "T"),
        ("$58.52 - $25.52 = $33; $58.52 - $25.12 = $33; $58.52 - $24.52 = $33", "T?F"),
    ],
)
def test_per_cents_fractions_and_rounding(text: str, expected: str) -> None:
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$\frac{1}{2} \times 10 = 5$", "T"),
        (r"$\dfrac{1}{2} \cdot 10 = 6$", "F"),
        (r"\frac12 \cdot 10 = 5", "T"),
        (r"84 \div 4 = 21", "T"),
        (r"\left(3 + 4\right) \times 2 = 14", "T"),
        (r"20\% \text{ of } 50 = \$10", "T"),
        (r"5 \text{ apples} + 3 \text{ apples} = 9", "F"),
        (r"3 + 4 = \boxed{7}", "T"),
        (r"\(3+4=8\)", "F"),
        (r"\[\frac{91}{26}=\boxed{\frac{7}{2}}\]", "T"),
        (r"10/3 \approx 3.33", "T"),
        (r"3^2 + 4^{2} = 25", "T"),
        (r"\sqrt{16} + 1 = 5, \sqrt{2} = 1.4", "T?"),
        (r"5{,}000 + 1 = 5{,}001", "T"),
        (r"90,\!000-28,\!672=\boxed{61,328}", "T"),
        (r"\frac{23}{9} = 2+0.\overline{5} = 2.\overline{5}", "??"),
        (r"3 + 4 &= 7 \\ &= 8", "TF"),
        (r"90^\circ + 30^{\circ} = 120^\circ", "T"),
        (r"24-2xy = 36", "?"),
        (r"7 \text{cm}^{3} * 2 = 14 \text{cm}^3", "T"),
    ],
)
def test_latex(text: str, expected: str) -> None:
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x = 3", "2x + 3 = 7", "3x-5=16", "let n = 5", "n - 5 = 10", "price * 3 + 4 = 10", "f(3) * 2 = 18",
        "f = 5 + 3",
        "3:30 = 4", "1:2 + 3 = 4", "0900-0130 = 0730", "16,0000/10 = 16000", "1.5e3 + 1 = 2",
        "Cost of 3 apples = $6", "Question 3 = 5 points", "1/2 pound = $4", "Pay for 3 apples = 3 * 2",
        "5 more than 3 * 2 = 11", "twice 5 + 3 = 13", "half of 4 + 6 = 8",
        "24 eggs in 1 tray x 2 trays = 48", "8 packs of 5 bags * 4 = 160",
        "5 hours 30 minutes * 2 = 11", "60 + 45 = 1 hour and 45 minutes", "17/5 = 3", "17/5 = 4",
        "10/3 = 3.34", "17 mod 5 + 1 = 3",
        "4! * 2 = 48", "12 = 2 * 3!", "gcd(12, 18) = 6", "|3 - 5| + 2 = 4", "⌊7/2⌋ + 1 = 4",
        "5 squared + 1 = 26", "17 % 5 + 1 = 3",
        "15÷2/5=37", "20 / 240 = 8.333...%", "10% of the 400 + 1580 = 1980", "10^10^10 = 5",
        "5/0 = 3", "0^-1 = 2", "7 * 16 = 0.112 kg",
        "3.33 * 3 = 10", "100 quarters * 0.25 = $0.25",
        "5 apples - his 3 + 2 = 4", "20 + 10 balls to the 29 + 24 balls = 83", "100+(100*(10/100) = 110",
    ],
)  # fmt: skip
def test_ambiguous_equalities_are_skipped(text: str) -> None:
    assert set(verdicts(text)) <= {"?"}
    assert score(text) is None


@pytest.mark.parametrize(
    "text",
    ["3 + 4 => 8", "3 + 4 == 8", "3 + 4 <= 8", "3 + 4 != 8", "3 + 4 -> 8", "3 + 4 < 8", "nothing", "", "= 5"],
)
def test_text_without_an_equality_has_no_score(text: str) -> None:
    assert score(text) is None


def test_an_expression_that_is_too_long_is_not_cut_short() -> None:
    ones = " + ".join(["1"] * 40)
    assert verdicts(f"20 + 20 = {ones}, {ones} = 40, {ones} = 41") == "???"


def test_a_step_scores_by_its_worst_equality() -> None:
    assert score("3 + 4 = 7 and x = 5") == 1
    assert score("3 + 4 = 7 and 7 * 2 = 15") == 0
    assert score("3 + 4 = 7" + " " * 20_000) is None


PROMPT = "Ann has 25 boxes of 48 eggs and sells 20% of them. How many are left?"
RIGHT = [
    "There are 25 * 48 = 1200 eggs.\n",
    "She sells 1200 * 0.2 = 240 of the 1200 eggs.\n",
    "So 1200 - 240 = 960 are left.\n",
    "#### 960",
]


@pytest.mark.parametrize(
    ("changed", "step", "expected"),
    [
        (0, RIGHT[0], 1.0),
        (1, "She sells 1200 * 0.2 = 250 of the 1200 eggs.\n", 0.0),
        (1, "She sells 1200 * 0.2 = 240 of the 1700 eggs.\n", 0.25),
        (1, "She sells 240 eggs, since 0.2 * 1200 = 240.\n", 1.0),
        (1, "She sells 1200 / 5 = 240 eggs in the 12 months of a year.\n", 1.0),
        (3, "#### 690", 0.25),
        (3, "**The final answer is 961**", 0.25),
        (3, "#### 960.0", None),
        (3, "The answer is 960 eggs.", None),
        (3, "The answer depends on the 12 eggs of a dozen", None),
    ],
)
def test_a_number_without_a_source_is_suspicious(changed: int, step: str, expected: float | None) -> None:
    steps = [*RIGHT[:changed], step, *RIGHT[changed + 1 :]]
    scores = ArithmeticJudge().judge([(Problem("p", PROMPT, "960"), steps)])[0]
    assert scores is not None and scores[changed] == expected
    assert first_error(scores, 0.5) == (changed if expected in (0.0, 0.25) else None)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (f"It is 0.{98:028}.", None),  # 14 times the share, in 30 digits
        (f"It is 0.{97:028}.", 0.25),
        ("It is ⅐ or ⅑.", None),  # 1 / 7 and 1 / 9
    ],
)
def test_sources_of_small_shares_are_exact(step: str, expected: float | None) -> None:
    problem = Problem("p", f"Of 14 eggs, a share of 0.{7:028} is eaten.", "0")
    assert ArithmeticJudge().judge([(problem, [step])]) == [[expected]]


def test_the_check_of_sources_is_optional_and_off_in_latex() -> None:
    steps = ["Ann has 7391 eggs.", r"\boxed{7391}"]
    assert ArithmeticJudge().judge([(Problem("p", PROMPT, "0"), steps[:1])]) == [[0.25]]
    assert ArithmeticJudge(origins=False).judge([(Problem("p", PROMPT, "0"), steps[:1])]) == [[None]]
    assert ArithmeticJudge().judge([(Problem("p", PROMPT, "0"), steps)]) == [[None, None]]


def test_chat_prompts_are_read() -> None:
    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": PROMPT}]
    assert ArithmeticJudge().judge([(Problem("p", chat, "960"), RIGHT)]) == [[1.0, 1.0, 1.0, None]]


Expression = tuple[str, Fraction, int]
"""Text, value, and how loosely the last operation binds: 0 number, 1 product, 2 sum."""


def joined(parts: tuple[Expression, str, Expression], whole: bool) -> Expression:
    """Join two expressions by an operator; multiply if a division has no value, or no whole one although it
    must be whole."""
    (a, x, loose_a), operator, (b, y, loose_b) = parts
    if operator in DIVISIONS and (not y or (whole and (x / y).denominator > 1)):
        operator = "*"
    sign = operator.strip()
    binds = 2 if sign in "+-" else 1
    text = (f"({a})" if loose_a > binds else a) + operator + (f"({b})" if loose_b >= binds else b)
    return (
        text,
        x + y if sign == "+" else x - y if sign == "-" else x / y if operator in DIVISIONS else x * y,
        binds,
    )


integers = st.integers(0, 500).map(lambda number: (f"{number:,}", Fraction(number), 0))
decimals = st.integers(0, 9999).map(lambda cents: (f"{cents / 100:.2f}", Fraction(cents, 100), 0))
DIVISIONS = (" / ", " ÷ ", r" \div ")
operators = st.sampled_from(
    ["+", " + ", "-", " - ", "*", " * ", " × ", " · ", r" \times ", r" \cdot ", *DIVISIONS]
)


def expressions(numbers: st.SearchStrategy[Expression], whole: bool) -> st.SearchStrategy[Expression]:
    def longer(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        return st.tuples(inner, operators, inner).map(lambda parts: joined(parts, whole))

    return longer(st.recursive(numbers, longer, max_leaves=4))


any_expression = expressions(integers | decimals, whole=False)
frames = st.sampled_from(
    ["{} = {}", "So she pays {} = {} dollars.", "1. That makes {}={}", "${} = {}$", "{}\n= {}, as we saw."]
)


def written(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{'-' * (value < 0)}({abs(value)})"


@settings(deadline=None)
@given(any_expression, frames)
def test_right_values_are_never_flagged(expression: Expression, frame: str) -> None:
    assert score(frame.format(expression[0], written(expression[1]))) == 1


@settings(deadline=None)
@given(any_expression, frames, st.integers(1, 4))
def test_rounded_values_are_never_flagged(expression: Expression, frame: str, places: int) -> None:
    value = round(expression[1], places)
    assume(abs(expression[1]) < 10**9)
    assert score(frame.format(expression[0], f"{float(value):.{places}f}")) != 0


@settings(deadline=None)
@given(expressions(integers, whole=True), frames, st.integers(1, 1000), st.sampled_from([-1, 1]))
def test_wrong_values_are_flagged(expression: Expression, frame: str, off: int, sign: int) -> None:
    text, value, _ = expression
    wrong = value + sign * off
    sizes = sorted((abs(wrong), abs(value)))
    assume(all(sizes[0] * 10**power != sizes[1] for power in range(2, 10)) or not sizes[0])
    assert score(frame.format(text, written(wrong))) == 0


hostile = st.text(alphabet="0123456789 +-*/=^().,:%$x×÷{}\\<>≈\n!a½", max_size=300) | st.text(max_size=300)


@settings(max_examples=300, deadline=None)
@given(hostile, hostile)
def test_no_text_raises_an_exception(prompt: str, text: str) -> None:
    for scores in ArithmeticJudge().judge([(Problem("p", prompt, "1"), split_steps(text))]):
        assert scores is not None and set(scores) <= {0.0, 0.25, 1.0, None}


@pytest.mark.parametrize(
    "text",
    [
        "10^10^10 = 5 " * 700, "9^64*" * 1900 + "1=2", "+".join(["9^60*9^60*9^60*9^60"] * 7) + "=1",
        "1+" * 4900 + "1=2", "1=" * 5000,
        "(" * 9000 + "=1", "((((1+1))))=" * 700, "( " * 4900 + "1+1=3",
        "-" * 9000 + "1=1", r"\frac{1}" * 1200, r"\text{a" * 1400, r"\sqrt{" * 1600, "<<1+1=" * 1500,
        "9" * 9999, "a-" * 4900 + "=1",
        " " * 9990 + "=1", "\n" * 9990 + "=1", "1," * 4900 + "=1", "111," * 2400 + "=1", "x " * 4900 + "=1",
        "5% of " * 1600 + "5=1",
        ("1+2*3-4/5+(6)" * 4 + "=7 ") * 150, "1 (" * 3000,
        " ".join(str(7919 * number) for number in range(1300)),
    ],
)  # fmt: skip
def test_hostile_text_is_quick(text: str) -> None:
    start = time.process_time()
    assert ArithmeticJudge().judge([(Problem("p", text, "1"), [text])])
    assert time.process_time() - start < 10  # a hang would be hours


def test_the_judge_finds_the_changed_step_of_worked_solutions() -> None:
    examples = labeled(load_problems("reasoning-gym:gsm_symbolic?n=200&seed=3"), seed=0)
    found = report(ArithmeticJudge(), examples)
    assert found["right"] == found["wrong"] == 200
    assert found["false_alarms"]["mean"] <= 0.01
    assert found["recall"]["mean"] >= 0.8
    assert found["precision"]["mean"] >= 0.95
