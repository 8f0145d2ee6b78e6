"""Verdicts on answers after thinking, in Markdown, in Unicode, and on those that are no mathematics."""

from __future__ import annotations

import pytest

from handrail.types.problem import Problem
from handrail.verifiers.answer_text import clean, plain
from handrail.verifiers.builtin import reader, resolve
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.symbols import to_latex


def paid(answer: str, completion: str, name: str = "math", extract: str | None = None) -> float:
    return resolve(VerifierConfig(name=name, extract=extract))(Problem("p", "?", answer), completion)


THINKING = [
    ("10", "<think>x \\boxed{9}</think>\nThe answer is 10", 1),
    ("9", "<think>x \\boxed{9}</think>\nThe answer is 10", 0),
    ("9", "<think>#### 9</think>\nI do not know.", 0),
    ("10", "so \\boxed{9}</think>\n\\boxed{10}", 1),  # the prompt opens the thinking
    ("10", "<think>9</think>10", 1),
    ("Paris", "<think>Rome?</think>Paris", 1),
    ("10", "<think>The answer is 10", 0),
    ("10", "\\boxed{10}</think>", 0),
    ("10", "<think>a</think> 9 <think>\\boxed{10}", 0),
    ("10", "I <b>think</b> \\boxed{10}", 1),
]
MARKDOWN = [
    ("42", "#### **42**", 1),
    ("42", "**#### 42**", 1),
    ("42", "<answer>**42**</answer>", 1),
    ("42", "**42**", 1),
    ("42", "*42*", 1),
    ("42", "__42__", 1),
    ("42", "`42`", 1),
    ("42", "**Answer:** 42", 1),
    ("42", "**Answer: 42**", 1),
    ("42", "The answer is *42*.", 1),
    ("42", "#### Final Answer\n42", 1),
    ("42", "#### **Final Answer:**\n\n**42**\nIt took 3 steps.", 1),
    ("42", "#### Final Answer\nThe answer is:\n$$42$$", 1),
    ("42", "## Final Answer\n42", 1),
    ("Paris", "#### Answer\n_Paris_", 1),
    ("A^*", r"\boxed{A^*}", 1),
    ("xy", r"\boxed{x*y}", 1),
    ("42", "#### **41**", 0),
    ("42", "**4**2", 0),
    ("8", "2**3", 0),
    ("42", "#### Final Answer\n41", 0),
]
UNICODE = [
    ("10°", r"\boxed{10^\circ}", 1),
    (r"10^\circ", r"\boxed{10°}", 1),
    (r"10^{\circ}", "The angle is 10°.", 1),
    (r"\sqrt{2}", r"\boxed{√2}", 1),
    ("√2", r"\boxed{\sqrt{2}}", 1),
    (r"3\sqrt{5}", "3√5", 1),
    (r"\sqrt{x+1}", r"\boxed{√(x+1)}", 1),
    ("x^2+1", r"\boxed{x²+1}", 1),
    ("x²+1", r"\boxed{x^2+1}", 1),
    ("x^{10}", r"\boxed{x¹⁰}", 1),
    ("x_1", r"\boxed{x₁}", 1),
    ("½", r"\boxed{\frac{1}{2}}", 1),
    (r"\frac{9}{2}", r"\boxed{4½}", 1),
    (r"\infty", r"\boxed{∞}", 1),
    ("(−∞, 2]", r"\boxed{(-\infty, 2]}", 1),
    (r"\geq 3", r"\boxed{≥ 3}", 1),
    ("x ≤ 2", r"\boxed{x \le 2}", 1),
    (r"\pm 3", r"\boxed{±3}", 1),
    (r"[0,1]\cup[2,3]", r"\boxed{[0,1]∪[2,3]}", 1),
    ("6·x", r"\boxed{6x}", 1),
    ("6x", r"\boxed{6·x}", 1),
    (r"2\pi", "The area is 2π.", 1),
    ("42", "４２", 1),
    ("10°", r"\boxed{11°}", 0),
    ("√2", r"\boxed{2}", 0),
    ("x²+1", r"\boxed{x+1}", 0),
    ("½", r"\boxed{2}", 0),
    (r"\geq 3", r"\boxed{≤ 3}", 0),
    (r"\geq 3", r"\boxed{3}", 0),
    ("3", r"\boxed{±3}", 0),
    ("42", "6×7", 0),
    ("42", r"\boxed{6·7}", 0),
    ("7", r"\boxed{√49}", 0),
]
CHOICES = [
    ("C", "The correct answer is C) 42", 1),
    ("C", "The answer is (C) 42.", 1),
    ("C", "Therefore, the correct answer is:\n\nC", 1),
    ("C", r"so \boxed{42}. The correct choice is \(C\).", 1),
    ("C", "Therefore, the correct statement is (C).", 1),
    ("C", "Answer: (C) 70 and 55 seconds", 1),
    ("C", "Choice A: 3\nChoice B: 4\nSo the answer is C.", 1),
    ("C", "Option A is wrong. Option C is correct.", 1),
    ("C", "The answer is **C. 42**", 1),
    ("C", "The answer is C (42).", 1),
    ("C", "The answer is **C**, I think.", 1),
    ("C", "The answer is （C）", 1),
    ("C", "**C**", 1),
    ("C", "C. 42", 1),
    ("C", "Option C", 1),
    ("C", "#### C) 42", 1),
    ("B", "Look at each answer choice:\nA. 3 is odd.\nB. 4 is even.\nThe correct answer is B.", 1),
    ("B", "The even number is:\nB", 1),
    ("C", "<answer>C. 42</answer>", 1),
    ("C", r"\boxed{C. 42}", 1),
    ("C", r"\boxed{\textbf{(C) } 42}", 1),
    ("C", r"\boxed{\text{C: Vitamin A}}", 1),
    ("C", r"\boxed{c}", 1),
    ("(C)", r"\boxed{C}", 1),
    ("D", r"\boxed{\text{D. Both B and C}}", 1),
    ("C", r"\boxed{\text{D. Both B and C}}", 0),
    ("C", r"\boxed{D. 42}", 0),
    ("C", r"\boxed{A} or \boxed{C}", 0),
    ("C", r"\boxed{A, C}", 0),
    ("C", r"\boxed{C) or D)}", 0),
    ("C", r"\boxed{C. 42, D. 43}", 0),
    ("C", r"\boxed{C_2}", 0),
    ("C", r"\boxed{C+1}", 0),
    ("C", "A or C", 0),
    ("C", "The answer is A or C.", 0),
    ("C", "The answer is A. The answer is C.", 0),
    ("C", "The answer is not C", 0),
    ("C", "The answer is C = 5", 0),
    ("C", "Option A is not correct, option C is.", 0),
    ("C", "Both are wrong", 0),
    ("A", "A good question. The answer is C.", 0),
    ("D", "A. 1 B. 2 C. 3 D. 4", 0),
    ("D", "A. 1\nB. 2\nC. 3\nD. 4", 0),
]
JOINED = [
    ("10-15", r"\boxed{10 - 15}", 1),
    ("10-15", r"\boxed{10–15}", 1),
    ("10-15", r"\boxed{10\text{--}15}", 1),
    ("10-15", r"\boxed{\$10-\$15}", 1),
    ("10-15", "It takes 10-15 minutes.", 1),
    ("10-15", "10 to 15", 1),
    ("10-15 minutes", r"\boxed{10-15}", 1),
    ("1:2", r"\boxed{1 : 2}", 1),
    ("1:2", "The ratio is 1:2.", 1),
    ("1:2", r"\boxed{\text{1 to 2}}", 1),
    ("1:2", r"\boxed{\frac{1}{2}}", 1),
    ("05/01/2021", "The date is 05/01/2021.", 1),
    ("2025-01-02", "The answer is 2025-01-02 because it is 3 days later.", 1),
    ("3:30 pm", r"\boxed{3:30 \text{ pm}}", 1),
    ("3:30 PM", "The train leaves at 3:30 p.m.", 1),
    ("3 pm", r"\boxed{3}", 1),
    ("(555) 123-4567", r"\boxed{(555) 123-4567}", 1),
    ("1.2.3", r"\boxed{1.2.3}", 1),
    ("10-15", r"\boxed{-5}", 0),
    ("10-15", r"\boxed{15-10}", 0),
    ("10-15", "8-10, 9-12, 10-15", 0),
    ("2025-01-02", r"\boxed{2022}", 0),
    ("2025-01-02", r"\boxed{2025-02-01}", 0),
    ("05/01/2021", r"\boxed{\frac{5}{2021}}", 0),
    ("555-1234", r"\boxed{-679}", 0),
    ("1:2", r"\boxed{2:4}", 0),
    ("1:2", r"\boxed{0.5}", 0),
    ("3:30 pm", r"\boxed{3:30\text{ am}}", 0),
    ("3 pm", r"\boxed{3 \text{ am}}", 0),
    # these are mathematics
    ("3-x", r"\boxed{-x+3}", 1),
    ("3-x", r"\boxed{x-3}", 0),
    ("10 - 15 + x", r"\boxed{x-5}", 1),
    (r"2-\sqrt{3}", r"\boxed{-\sqrt{3}+2}", 1),
    ("-5", r"\boxed{10-15}", 0),
    ("1/2", r"\boxed{\frac{1}{2}}", 1),
]


@pytest.mark.parametrize(("answer", "completion", "reward"), [*THINKING, *MARKDOWN, *UNICODE])
def test_thinking_markdown_and_unicode(answer: str, completion: str, reward: float) -> None:
    assert paid(answer, completion) == reward


@pytest.mark.parametrize(("answer", "completion", "reward"), [*CHOICES, *JOINED])
def test_answers_that_are_no_mathematics(answer: str, completion: str, reward: float) -> None:
    assert paid(answer, completion) == reward


def test_the_other_verifiers_read_no_thinking_either() -> None:
    thought = "<think>\\boxed{9}, #### 9, # 9, is 9</think>"
    for name in ("normalized", "task"):
        assert paid("10", f"{thought} # 10", name) == 1
        assert paid("9", f"{thought} I do not know", name) == 0
        assert paid("9", thought.removesuffix("</think>"), name) == 0
    assert paid("10", f"{thought} \\boxed{{10}}", "normalized") == 1
    assert paid("9", f"{thought} I do not know", "exact", r"is (\d+)") == 0
    assert paid("10", f"{thought} it is 10", "exact", r"is (\d+)") == 1
    # A pattern may still ask for the whole format.
    assert paid("10", f"{thought}<answer>10</answer>", "exact", r"(?s)<think>.*</think><answer>(.*)<") == 1
    assert paid(f"{thought} 10", f"{thought} 10", "exact") == 1


@pytest.mark.parametrize("name", ["math", "normalized", "task", "re:search"])
def test_no_vote_is_read_in_thinking(name: str) -> None:
    read = reader(VerifierConfig(name=name))
    assert read("<think>\\boxed{9} # 9</think> #### 10") == "10"
    assert read("<think>\\boxed{9} # 9") is None


def test_votes_for_a_choice_are_equal() -> None:
    read = reader(VerifierConfig(name="math"))
    votes = (r"\boxed{C}", r"\boxed{C. 42}", "The answer is (C).", "**C**", "#### C) 42")
    assert {read(vote) for vote in votes} == {"C"}


def test_unicode_is_written_in_latex_in_one_place() -> None:
    assert to_latex("2πr² ≥ √(x₁) · ½") == r"2\pi r^{2} \geq  \sqrt{x_{1}} \cdot  \frac{1}{2}"
    assert to_latex("λόγος, 東京, naïve") == "λόγος, 東京, naïve"
    assert to_latex("10°, 10^°, 10\\degree") == "10^\\circ , 10^\\circ , 10^\\circ "
    assert plain("6·7 ≤ ∞") == plain(r"6\cdot7\le\infty")


def test_only_emphasis_is_removed() -> None:
    assert clean("**a** and *b*, `c` or __d__.") == "a and b, c or d."
    for text in ("2**3", "a*b*c", "x_1 + x_2", "* a\n* b", "f^* g^*", "2 * 3 * 4"):
        assert clean(text) == text
