"""Verdicts on answers after thinking, in Markdown and in Unicode."""

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


@pytest.mark.parametrize(("answer", "completion", "reward"), [*THINKING, *MARKDOWN, *UNICODE])
def test_thinking_markdown_and_unicode(answer: str, completion: str, reward: float) -> None:
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


def test_unicode_is_written_in_latex_in_one_place() -> None:
    assert to_latex("2πr² ≥ √(x₁) · ½") == r"2\pi r^{2} \geq  \sqrt{x_{1}} \cdot  \frac{1}{2}"
    assert to_latex("λόγος, 東京, naïve") == "λόγος, 東京, naïve"
    assert to_latex("10°, 10^°, 10\\degree") == "10^\\circ , 10^\\circ , 10^\\circ "
    assert plain("6·7 ≤ ∞") == plain(r"6\cdot7\le\infty")


def test_only_emphasis_is_removed() -> None:
    assert clean("**a** and *b*, `c` or __d__.") == "a and b, c or d."
    for text in ("2**3", "a*b*c", "x_1 + x_2", "* a\n* b", "f^* g^*", "2 * 3 * 4"):
        assert clean(text) == text
