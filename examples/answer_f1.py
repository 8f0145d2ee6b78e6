"""A verifier for open questions: how many words does the answer share with the right one?

ProRAG (arXiv 2601.21912) trains with this outcome: acc + fmt. acc is twice the F1 score of the words, or 0 if
that score is below 0.2; fmt is 1 if the completion has the asked form, else -1. The paper's reward is
between -1 and 3; this one is (1 + it)/4, which gives the same normalized advantages. The form is ours: one
answer, as ``<answer>…</answer>`` at the end.

Use: ``verifier.name = "examples/answer_f1.py:reward"``, with ``correct_from = 0.75``, an F1 of one half.
"""

import re
import string
from collections import Counter

from handrail import Problem

ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
LEAST = 0.2


def reward(problem: Problem, completion: str) -> float:
    found = list(ANSWER.finditer(completion))
    formed = len(found) == 1 and found[0].end() == len(completion.rstrip())
    shared = f1(words(found[-1][1]), words(problem.answer)) if found else 0.0
    accuracy = 2 * shared if shared >= LEAST else 0.0
    return (1 + accuracy + (1 if formed else -1)) / 4


def words(text: str) -> Counter[str]:
    """Count the words, without case, punctuation and articles, as SQuAD does."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return Counter(word for word in plain.split() if word not in ("a", "an", "the"))


def f1(ours: Counter[str], theirs: Counter[str]) -> float:
    both = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / both if both else 1.0
