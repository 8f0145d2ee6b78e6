"""Compare answers that are no mathematics: letters of choices, ranges, ratios, dates and phone numbers.

math-verify would multiply ``C. 42`` and subtract ``2025-01-02``.
"""

from __future__ import annotations

import re

from handrail.verifiers.answer_text import strip_formatting, strip_markup
from handrail.verifiers.math_reading import ANSWER_IS, WORD, Answer, Passage

CHOICE = re.compile(r"\(?([A-J])\)?")

# A choice's letter in brackets, before punctuation, or alone. "I" before a word is a pronoun.
BRACKETED = r"[(\[] ?([A-J]) ?[)\]]"
LABELED = rf"(?:{BRACKETED}|\b([A-J])[).:])"
LETTER = rf"(?:{LABELED}|\b(?!I [a-z])([A-J])(?! ?[=<>+^]|[\w'*/(\[{{\\-]))"
CHOICE_WORDS = r"(?i:(?:the|my|final|correct|right|best|answer|option|choice|is)[ :]*)*"
WHOLE = re.compile(rf"{CHOICE_WORDS}(?:{LABELED}|([A-J])(?=[ .,;:!]*$|,| ?/| (?:and|or|&) ))")
ANOTHER = re.compile(rf" ?(?:[,;/&]|\b(?:and|or)\b) ?{LETTER}")
LATER = re.compile(rf"(?<!\w){BRACKETED}|(?<![\w(])([A-J])\)|[,;] ?([A-J])[.:]")
# The ways to name a choice in a text, the clearest first.
NAMED = [
    re.compile(rf"(?i:\banswers?(?: (?:is|are)(?: ?:)?| ?:) ?(?:(?:option|choice)[ :]*)?){LETTER}"),
    re.compile(
        r"(?i:\b(?:(?:my|final|correct|incorrect|right|best) (?:option|choice|statement|letter|one)"
        rf"(?: is(?: ?:)?| ?:)|(?:option|choice) is) ?(?:(?:option|choice)[ :]*)?){LETTER}"
    ),
    re.compile(rf"(?i:\b(?:option|choice)) {LETTER}(?= is (?:the )?(?:correct|right|best)\b)"),
]

NUMBER = r"\d+(?:[.,]\d+)*%?"
# Numbers joined by hyphens or colons, and three or more joined by slashes or points.
JOINED = rf"(?:\+?\d+ |\(\d+\))?{NUMBER}(?:(?:-{{1,2}}|:){NUMBER})+|\d+(?:/\d+){{2,}}|\d+(?:\.\d+){{2,}}"
WHOLE_JOINED = re.compile(JOINED)
HOUR = re.compile(r"\d\d? ?[ap]\.?m", re.IGNORECASE)
NUMBERS = re.compile(rf"(?<![\w.,:/-])(?:{JOINED}|{NUMBER})")
FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
HALF_DAY = re.compile(r"(?<=\d) ?([ap])\.?m\b\.?", re.IGNORECASE)


def choice(right: Answer) -> str | None:
    """Return the letter, from A to J, if the problem's answer is that of a choice."""
    match = CHOICE.fullmatch(right.text)
    return match[1] if match else None


def choices(passage: Passage, completion: str) -> set[str]:
    """Return the letters that an answer names; several if it does not decide. Empty if it names none."""
    lines = passage.text.strip().splitlines() or [""]
    found = _only_letters(strip_markup(lines[0])) if len(lines) == 1 else set()
    text = strip_markup(completion if passage.kind == "box" else passage.text)
    for pattern in NAMED:
        found = found or {letter for match in pattern.finditer(text) for letter in _with_others(match, text)}
    if not found and (alone := CHOICE.fullmatch(strip_formatting(lines[-1]))):
        return {alone[1]}
    return found


def _only_letters(text: str) -> set[str]:
    """Return the letters of a text that begins with a letter, perhaps followed by what that choice says."""
    match = WHOLE.match(text)
    if not match:
        return set()
    return _with_others(match, text) | {
        letter for later in LATER.finditer(text, match.end()) for letter in later.groups() if letter
    }


def _with_others(match: re.Match[str], text: str) -> set[str]:
    """Return the letter of ``match`` and those joined to it, as in "A or B"."""
    found: set[str] = set()
    following: re.Match[str] | None = match
    while following:
        found.update(filter(None, following.groups()))
        following = ANOTHER.match(text, following.end())
    return found


def is_joined(right: Answer) -> bool:
    """True if the problem's answer is a range, ratio, date, time or phone number, which nobody calculates."""
    joined = WHOLE_JOINED.fullmatch(HALF_DAY.sub("", right.text))
    return bool(joined or HOUR.fullmatch(right.plain))


def same_joined(passage: Passage, mine: Answer | None, right: Answer) -> bool:
    """True if the answers have the same numbers and signs. A ratio may be written as a fraction."""
    text = strip_formatting(passage.text)
    halves = [{half.casefold() for half in HALF_DAY.findall(each)} for each in (text, right.plain)]
    if all(halves) and halves[0] != halves[1]:
        return False
    wanted = _spelled(right.text)
    spellings = {wanted, wanted.replace(":", "/") if wanted.count(":") == 1 else wanted}
    if mine is not None and _spelled(mine.text.rpartition("=")[2], wanted) in spellings:
        return True
    return passage.kind != "box" and bool(WORD.search(text)) and _said(text, wanted) in spellings


def _spelled(text: str, wanted: str = "") -> str:
    joint = ":" if ":" in wanted else "-"
    text = re.sub(
        r"(?<=\d) to (?=\d)", joint, HALF_DAY.sub("", text).replace(r"\colon", ":").replace("{:}", ":")
    )
    return FRACTION.sub(r"\1/\2", text).replace("--", "-").replace(" ", "")


def _said(text: str, wanted: str) -> str | None:
    """Return the first number after the last "answer is", else the last number of the text."""
    *_, said = [None, *ANSWER_IS.finditer(text)]
    numbers = [match.group() for match in NUMBERS.finditer(text, said.end() if said else 0)]
    return _spelled(numbers[0 if said else -1], wanted) if numbers else None
