"""Read an answer in mathematics: find it in a completion and extract its mathematics for math-verify."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from handrail._util.thinking import after_thinking
from handrail.verifiers.answer_text import (
    FORMULA_JOINT,
    Numeral,
    below_heading,
    boxes,
    clean,
    last_joined,
    marked,
    parse_numeral,
    plain,
    strip_formatting,
)

# Functions that are often written without a backslash.
FUNCTIONS = re.compile(
    r"(?<![\\A-Za-z])(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|pi|infty|gcd|lcm|min|max|det)(?![A-Za-z])"
)
WORD = re.compile(r"(?<![\\{A-Za-z])(?!sqrt(?![a-z]))[A-Za-z]{3,}")
# Such as "Difference = 64,800" and "Answer: 5".
LABEL = re.compile(r"(?P<words>[A-Za-z][A-Za-z ]*[A-Za-z]{2}) ?[=:](?=[-\d\\(\[.])")
LIST = re.compile(r",? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]),? ?")
SEPARATOR = re.compile(r",(?!\d{3}(?!\d)) ?|, (?=\d)")
PERCENT = re.compile(r"(?<=\d) ?(?:percent(?:age)?|pct)(?![A-Za-z])")
UNIT = re.compile(r"(?P<value>.*(?:[\d})%]|\\pi|\\circ)) ?(?P<unit>[A-Za-z][A-Za-z ./{}^0-9-]*)")
LETTER_UNIT = re.compile(
    r"(?<=[\d}]) *\\(?:text|mathrm|mbox)\s*\{[~\s]*[CFJKLNVWghms]\s*\}(?:\^\{?\d\}?)?(?=[\s$.]*$)"
)
SHORT_UNIT = re.compile(r"cm|mm|km|kg|mg|m[lL]|ft|in|lb|oz|hr|am|pm|mi|yd|ha|sq")
QUALIFIER = re.compile(
    r"\b(?:not|is|are|was|if|when|where|for|such|with|without|than|less|more|least|most|about|except|but|to|from|no|nor|only|wrong)\b",
    re.IGNORECASE,
)
SET_OF = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\||\\mid|:)(?P<condition>[^|]*)\\\}")
E_NOTATION = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w)")
SIDE_BY_SIDE = re.compile(r"\d \d")
MIXED = re.compile(r"[;#\n]|(?<!\\)\$|\\[(\[]")
FINAL_ANSWER = re.compile(r"final answer(?: is|:)", re.IGNORECASE)
ANSWER = re.compile(r"answer", re.IGNORECASE)
ANSWER_IS = re.compile(r"answers?(?: is| are|:)", re.IGNORECASE)
NAME = re.compile(r" *[A-Za-z] *")
ADDED = re.compile(r"\\text\w*\s*\{[^}]*\d")
REGION = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)


@dataclass(frozen=True)
class Answer:
    """An answer: ``plain`` is compared letter by letter, and ``text`` is the part that is mathematics."""

    plain: str
    text: str

    @cached_property
    def numeral(self) -> Numeral | None:
        return parse_numeral(self.text)

    @cached_property
    def expression(self) -> Any:
        """The sympy expression of ``text``; None if it has words or math-verify cannot parse all of it."""
        if any(map(_is_word, WORD.findall(self.text))) or SIDE_BY_SIDE.search(self.text):
            return None
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse

        whole = NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        )
        latex = E_NOTATION.sub(r"\1\\cdot10^{\2}", self.text).replace("%", r"\%")
        found = parse(f"${latex}$", [LatexExtractionConfig(normalization_config=whole)], parsing_timeout=None)
        return found[0] if found and not isinstance(found[0], str) else None


@dataclass(frozen=True)
class ProseAnswer(Answer):
    """An answer that math-verify found in a sentence and has parsed."""

    parsed: Any

    @cached_property
    def expression(self) -> Any:
        return self.parsed


def answer(text: str) -> Answer:
    """Make ``text``, which holds nothing but an answer, an Answer."""
    return Answer(plain(text), extract_mathematics(text))


def extract_mathematics(text: str) -> str:
    """Remove the label and the units from ``text``, and replace ``and`` with a comma. Other words stay."""
    text = strip_formatting(LETTER_UNIT.sub("", text)).lstrip("£€¥")
    text = PERCENT.sub("%", FUNCTIONS.sub(r"\\\g<0>", text))
    label = LABEL.match(text)
    if label and not QUALIFIER.search(label["words"]):
        text = text[label.end() :]
    if members := SET_OF.fullmatch(text):
        text = members["condition"]
    return ", ".join(map(_without_unit, SEPARATOR.split(LIST.sub(", ", text))))


def _without_unit(text: str) -> str:
    match = UNIT.fullmatch(text)
    if not match:
        return text
    words, rate = re.findall("[A-Za-z]+", match["unit"]), "/" in match["unit"]
    named = all(SHORT_UNIT.fullmatch(word) or _is_word(word) or rate and len(word) == 1 for word in words)
    return match["value"] if named and not QUALIFIER.search(match["unit"]) else text


def _is_word(letters: str) -> bool:
    """True if ``letters`` are a word; three letters in alphabetical order, such as xyz, are a product."""
    return len(letters) > 3 or len(letters) == 3 and list(letters.casefold()) != sorted(letters.casefold())


def read_gold(text: str) -> Answer:
    """Read the answer of a problem, which may be a solution that states it.

    An answer that cannot be parsed as a whole is compared as text.
    """
    solution = boxes(text) or marked(text) or FINAL_ANSWER.search(text)
    return (read_passage(find_passage(text)) if solution else None) or answer(text)


class Passage(NamedTuple):
    """The part of a completion that holds its answer; ``kind`` is ``box``, ``mark`` or, without either,
    ``prose``."""

    kind: str
    text: str


def find_passage(completion: str) -> Passage:
    """Find the answer of a completion: its last boxes, else its mark, else all that follows its thinking."""
    completion = clean(after_thinking(completion))
    mark = marked(completion)
    text = completion.strip() if mark is None else mark
    spans = boxes(text)
    if spans and not (mark is None and FINAL_ANSWER.search(text, spans[-1][1])):
        return Passage("box", last_joined(text, spans))
    if mark is None:
        return Passage("prose", text)
    text = below_heading(text).strip()
    line = text.partition("\n")[0].rstrip()
    return Passage("mark", text if line.endswith((":", "$$", r"\[")) else line)


def read_passage(passage: Passage) -> Answer | None:
    """Read the answer of a passage: all of it, else its last formula, else what math-verify finds.

    Returns None if there is no answer.
    """
    kind, text = passage
    if kind == "box":
        return answer(text)
    if not MIXED.search(text.strip("$ ")):
        whole = answer(text)
        if whole.numeral or whole.expression is not None or not WORD.search(text):
            return whole
    return _in_prose(text) or (answer(text) if kind == "mark" else None)


def _in_prose(text: str) -> Answer | None:
    from math_verify import parse

    spans = [
        (match.start(), match.end(), "".join(part or "" for part in match.groups()))
        for match in REGION.finditer(text)
    ]
    if formula := _last_formula(text, spans):
        return formula
    found = parse(_with_dollars(text), parsing_timeout=None)
    # math-verify ignores text in a formula, which may hold another number: 42 \text{ is wrong, it is 41}.
    if found and not isinstance(found[0], str) and not ADDED.search(text):
        return ProseAnswer(
            plain(text), strip_formatting("".join(each for each in found if isinstance(each, str))), found[0]
        )
    *_, said = [None, *ANSWER_IS.finditer(text)]
    return answer(text[said.end() :].strip().partition("\n")[0]) if said else None


def _last_formula(text: str, spans: list[tuple[int, int, str]]) -> Answer | None:
    """Return the formula after the last word "answer", else the last formula if no number follows it.

    Returns None if there is no such formula or it cannot be parsed.
    """
    *_, said = [len(text), *(match.end() for match in ANSWER.finditer(text))]
    last = next((index for index, span in enumerate(spans) if said <= span[0] <= said + 50), len(spans) - 1)
    while last + 1 < len(spans) and FORMULA_JOINT.fullmatch(text, spans[last][1], spans[last + 1][0]):
        last += 1
    if (
        not spans
        or re.search(r"\d", text[spans[last][1] :])
        and (spans[last][0] < said or NAME.fullmatch(spans[last][2]))
    ):
        return None
    formula = answer(last_joined(text, spans[: last + 1], FORMULA_JOINT))
    return formula if formula.numeral or formula.expression is not None else None


def _with_dollars(text: str) -> str:
    r"""Put dollar signs around LaTeX that stands among words.

    Without them, math-verify reads ``The answer is 12\pi.`` as 12.
    """
    if "\\" not in text or REGION.search(text):
        return text
    return "\n".join(map(_line_with_dollars, text.split("\n")))


def _line_with_dollars(line: str) -> str:
    runs: list[list[str]] = [[]]
    for word in line.split(" "):
        if re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", word) or word in ("a", "A", "I"):
            runs += [[word], []]
        else:
            runs[-1].append(word)
    return " ".join(
        f"${' '.join(run).rstrip('.,')}$" if any("\\" in word for word in run) else " ".join(run)
        for run in runs
        if run
    )
