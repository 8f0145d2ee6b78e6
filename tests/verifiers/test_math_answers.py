"""The verifier ``math`` accepts correct spellings of an answer, but no near misses and no repeated
question."""

from __future__ import annotations

import pytest

from handrail.types.problem import Problem
from handrail.verifiers.answer_text import boxes, last_joined, parse_numeral, plain
from handrail.verifiers.builtin import reader, resolve
from handrail.verifiers.config import VerifierConfig

RIGHT = [
    # words, units and spacing in the answer
    (r"36\pi \text{ square metres}", r"\boxed{36\pi}"),
    (r"5\sqrt{2}\text{ miles}", r"\boxed{5\sqrt{2} \text{ miles}}"),
    (r"4\frac{2}{3}\text{ hours}", r"\boxed{\frac{14}{3}}"),
    (r"-4, \; 9", r"\boxed{9, -4}"),
    ("5 and 8", r"\boxed{5, 8}"),
    (r"2, -6, \text{ and } -1", r"\boxed{-6, -1, 2}"),
    ("70 miles per hour", r"\boxed{70}"),
    ("12", r"\boxed{12~\text{kg}}"),
    ("9", r"\boxed{9\text{ m}}"),
    (r"8\text{ cm}, 3\text{ cm}", r"\boxed{8, 3}"),
    ("72900", r"\boxed{\text{Total} = \$72,900}"),
    # compared as text, because it cannot be parsed
    (r"\cos^2 u", r"\boxed{\cos^2 u}"),
    (r"F_{3},F_{4}", r"\boxed{F_{3}, F_{4}}"),
    (r"\text{no real roots}", r"\boxed{No real roots}"),
    ("Paris", "Paris"),
    ("Paris", "The answer is Paris."),
    ("converges for all n", r"\boxed{\text{Converges for all } n}"),
    # answers that are equations, not numbers
    (r"\frac{x^2}{25} + \frac{y^2}{4} = 1", r"\boxed{\frac{y^2}{4} + \frac{x^2}{25} = 1}"),
    ("x-3y=0", r"\boxed{y=\frac{1}{3}x}"),
    ("x^2+4=0", r"\boxed{3x^2+12=0}"),
    # chains that end in the answer
    ("35", r"Hence $xy = 5 \cdot 7 = 35$."),
    ("14", r"\boxed{\frac{42}{3}=14}"),
    ("2.5", r"We get $\frac{5}{2}=2.5$."),
    ("33.33", r"\boxed{\frac{100}{3} = 33.33}"),
    ("45", r"\boxed{\binom{10}{2} = 45}"),
    ("7", r"\boxed{a+b = 7}"),
    (r"3\sqrt{5}", r"\boxed{d = \sqrt{3^2+6^2} = \sqrt{45} = 3\sqrt{5}}"),
    # a variable before a set, an interval or a point
    ("[-4,3]", r"\boxed{t\in[-4,3]}"),
    ("(3,8)", r"\boxed{(a,b)=(3,8)}"),
    ("3,8,1", r"\boxed{(a,b,c)=(3,8,1)}"),
    (r"\{(1,4),(-1,4)\}", r"\boxed{(-1,4),(1,4)}"),
    (r"(-\infty,5)", r"\boxed{x<5}"),
    ("[-1,6]", r"\boxed{-1\le x\le 6}"),
    (r"\begin{pmatrix}4\\7\end{pmatrix}", r"\boxed{(4,7)}"),
    # fonts
    ("512", r"\boxed{\textbf{(512)}}"),
    ("63", r"\boxed{\mathbf{63}}"),
    ("21", r"\boxed{\text{21}}"),
    (r"2 + \frac{1}{\mathrm{e}}", r"\boxed{\frac{1}{e} + 2}"),
    # relations that the answer has too
    (r"t<9 \text{ and } t\neq 2", r"\boxed{t<9, t\neq 2}"),
    ("y != 4", r"\boxed{y \neq 4}"),
    (r"n \geqslant 3", r"\boxed{n \ge 3}"),
    # boxes and marks
    ("8", "\\boxed{8}\n\n#### Summary\nThree steps, 2 rules."),
    ("6", "So \\boxed{4}.\n\nBut 4 is odd.\n\nSo \\boxed{6}."),
    ("6", "\\boxed{4}\n\\boxed{6}"),
    ("1, 2", r"\boxed{1} and \boxed{2}"),
    ("1, 2", r"$x = \boxed{1}$ or $x = \boxed{2}$"),
    ("30", "The first is $\\boxed{10}$ euros. Final Answer: The final answer is $30$. I hope it is correct."),
    ("18", "#### 18\nThat took 3 steps and 20 lines."),
    (r"\frac{3}{5}", r"So the odds are \boxed{\frac{3}{5}}, or \boxed{\frac{3}{5}}."),
    # ways to write numbers
    ("40", r"\boxed{40.0\%}"),
    ("37.5", r"\boxed{37.5\%}"),
    ("2000", r"\boxed{2\,000}"),
    ("2000", r"\boxed{2{,}000}"),
    ("30500", r"\boxed{30,\!500}"),
    ("-7", "\u22127"),
    ("0.00002", r"\boxed{2e-5}"),
    ("2e-05", "0.00002"),
    ("2e-05", r"\boxed{2 \times 10^{-5}}"),
    ("1e-05", r"\boxed{10^{-5}}"),
    ("3e+16", r"\boxed{3 \cdot 10^{16}}"),
    (r"\frac{\pi}{6}", r"\boxed{30^\circ}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\frac{\sqrt{3}-1}{2}", r"\boxed{\frac{-1+\sqrt{3}}{2}}"),
    # a formula at the end of a solution
    ("b^2-9", "Therefore, the result is $(b-3)(b+3)=b^2-9$."),
    ("14", r"The answer is $14$ because $2 \cdot 7 = 14$."),
    (r"5\pi", r"The area is 5\pi."),
]

WRONG = [
    # a part of the answer
    (r"36\pi \text{ square metres}", r"\boxed{36}"),
    (r"200 + 50\sqrt{3}\text{ feet}", r"\boxed{200}"),
    (r"4\frac{2}{3}\text{ hours}", r"\boxed{\frac23}"),
    (r"2, -6, \text{ and } -1", r"\boxed{-1}"),
    (r"5\text{ and }8", r"\boxed{5}"),
    ("2 hours 15 minutes", r"\boxed{15}"),
    ("[2, 3; 5, 7]", r"\boxed{7}"),
    (r"20 \mathrm{mph}, 35 \mathrm{mph}", r"\boxed{20}"),
    (r"\{x \mid x\ge 2, x\ne 5\}", r"\boxed{\{x\mid x\ge 5\}}"),
    ("6 7 0", r"\boxed{2 3 0}"),
    ("3,3,5", r"\boxed{3,5}"),
    (r"n \text{ is odd}", r"\boxed{n}"),
    ("120 pens, 345 books", "120345"),
    # more than the answer
    ("9", r"#### 9\pi \text{ feet}"),
    ("9", r"The answer is 9\pi."),
    ("9", r"9\sqrt{2} units"),
    (r"\frac{1}{\sqrt{3}}", r"\boxed{\frac{1}{\sqrt{3}}c}"),
    ("9", r"\boxed{9 \text{ is not it}}"),
    ("32349", r"\boxed{32, 349}"),
    ("7", r"\boxed{less than 7}"),
    # another answer
    ("x^2+1=0", r"\boxed{x^2+4=0}"),
    ("I=e^{-2t}", r"\boxed{I=3e^{-t}}"),
    ("8 = 5a+b", r"\boxed{5a+b}"),
    ("110_2", r"\boxed{110}"),
    ("y = 4", r"\boxed{x = 4}"),
    (r"\{1,2\}", r"\boxed{[1,2]}"),
    ("0.00002", r"\boxed{3.4365}"),
    ("60", r"\boxed{\frac{\pi}{3}}"),
    ("10", r"\boxed{41.5, 10}"),
    ("z=2+2=4", r"\boxed{z=3+5=4}"),
    ("42", "\\boxed{42}, \\boxed{41}"),
    # the question, or an unfinished calculation
    (r"3\sqrt{5}", r"\boxed{\sqrt{(5-2)^2+(9-3)^2}}"),
    (r"3\sqrt{5}", r"\boxed{\sqrt{5 \cdot 9}}"),
    (r"5\sqrt{2}", r"\boxed{3\sqrt{2}+2\sqrt{2}}"),
    (r"2\sqrt{7}", r"\boxed{\frac{6\sqrt{7}}{3}}"),
    (r"12\pi", r"\boxed{3 \cdot 4\pi}"),
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sin\frac{\pi}{3}}"),
    (r"(1, 3\sqrt{5})", r"\boxed{(1, \sqrt{36+9})}"),
    ("14", r"\boxed{\frac{42}3}"),
    ("14", r"\boxed{n=\frac{42}{3}}"),
    ("14", r"\boxed{\sqrt{196}}"),
    ("14", r"\boxed{2 \cdot 7 = 2 \cdot 7}"),
    ("(14,6)", r"\boxed{(a,b)=(2\cdot 7, 12/2)}"),
    ("(14,6)", r"\boxed{(14, 12/2)}"),
    ("[0,2]", r"\boxed{x\in[3-3,4/2]}"),
]


def paid(answer: str, completion: str) -> float:
    return resolve(VerifierConfig(name="math"))(Problem("p", "?", answer), completion)


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_a_right_answer_in_another_spelling_is_paid(answer: str, completion: str) -> None:
    assert paid(answer, completion) == 1


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_a_near_miss_or_the_question_is_not_paid(answer: str, completion: str) -> None:
    assert paid(answer, completion) == 0


@pytest.mark.parametrize("answer", sorted({answer for answer, _ in [*RIGHT, *WRONG]}))
def test_every_answer_is_correct_for_itself(answer: str) -> None:
    assert paid(answer, rf"\boxed{{{answer}}}") == paid(answer, f"<answer>{answer}</answer>") == 1


def test_an_empty_answer_is_not_accepted() -> None:
    with pytest.raises(ValueError, match="the problem's answer '\\$ \\$' is empty"):
        paid("$ $", r"\boxed{}")


def test_the_letters_of_an_answer_within_other_words_are_not_accepted() -> None:
    assert paid("no solution", "There is no solution to this, or one.") == 0
    assert paid("B", r"\boxed{A} or \boxed{B}") == 0
    assert paid("Yes", r"\boxed{Yes, no}") == 0


def test_votes_are_read_like_answers() -> None:
    read = reader(VerifierConfig(name="math"))
    assert {
        read(text) for text in (r"\boxed{\text{20 apples}}", "#### 20", r"so $x = 4 \cdot 5 = 20$", "20.0")
    } == {"20"}
    assert {read(text) for text in (r"\boxed{\text{Yes}}", "The answer is yes.")} == {"yes"}


def test_only_closed_and_outer_boxes_count() -> None:
    text = r"\boxed{1} \boxed{\frac{1}{\boxed{2}}} \fbox{\{3\}} \boxed{4"
    assert [content for _, _, content in boxes(text)] == ["1", r"\frac{1}{\boxed{2}}", r"\{3\}"]
    assert last_joined(text, boxes(text)[:2]) == r"1, \frac{1}{\boxed{2}}"


def test_normalized_text_and_numerals() -> None:
    assert plain(r"\left( 1 ,\; 2\right).") == plain("(1,2)") != plain("(12)")
    assert plain("1 2") != plain("12")
    for text in ("84/2", "1/0", "1,23", "12 34", "9" * 5000, "1e9999", "x"):
        assert parse_numeral(text) is None
