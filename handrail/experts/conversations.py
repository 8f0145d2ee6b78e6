"""Conversations that ask a language model for plans, verdicts and corrections, and parsers of its answers.

Answers are untrusted text: reasoning is stripped, and their length is limited.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from handrail.experts import prompts
from handrail.types.problem import Message, Problem

DONE = "<done>"
LONGEST = 20_000
FENCED = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)
VERDICT = re.compile(r"first_wrong_step[\"'`]?\s*:\s*([^,}\n]*)")
NUMBER = re.compile(r"[0-9]{1,6}")
JUDGMENT = re.compile(
    r"^[ *>-]{0,9}(?:step )?([0-9]{1,6}|verdict)[ *:.)]{1,9}((?:IN)?CORRECT)\b", re.IGNORECASE | re.MULTILINE
)


def plan_conversation(problem: Problem, reference: str) -> list[Message]:
    """Ask for a plan for a problem, given its worked solution."""
    return _user(prompts.PLAN.format(problem=prompt_text(problem), reference=reference))


def judge_conversation(problem: Problem, steps: Sequence[str]) -> list[Message]:
    """Ask for the first wrong step of an attempt; ``count_right_steps`` parses the answer."""
    return _user(prompts.JUDGE.format(problem=prompt_text(problem), steps=_shown(steps)))


def critique_conversation(problem: Problem, steps: Sequence[str]) -> list[Message]:
    """Ask for a judgment of each step of an attempt and for a verdict; ``read_critique`` parses the
    answer."""
    return _user(prompts.CRITIQUE.format(problem=prompt_text(problem), steps=_shown(steps)))


def correction_conversation(
    problem: Problem, kept: Sequence[str], reference: str | None = None, whole: bool = False
) -> list[Message]:
    """Ask for the step after the ``kept`` ones, or for all remaining ones if ``whole``.

    ``read_correction`` parses the answer.
    """
    return _user(
        prompts.CORRECTION.format(
            problem=prompt_text(problem),
            solution=prompts.SOLUTION.format(reference=reference) if reference is not None else "",
            beginning="".join(kept).strip() or "(nothing yet)",
            task=prompts.REST if whole else prompts.NEXT_STEP.format(done=DONE),
        )
    )


def count_right_steps(answer: str, steps: int) -> int | None:
    """Number of steps before the first wrong one; ``steps`` if none is wrong, None if the verdict is
    unreadable."""
    text = strip_reasoning(answer)[-LONGEST:]
    verdicts = {verdict.strip(" \t\r\"'`").lower() for verdict in VERDICT.findall(text) or [text]}
    if len(verdicts) != 1:
        return None
    verdict = verdicts.pop()
    if verdict in ("null", "none"):
        return steps
    return int(verdict) - 1 if NUMBER.fullmatch(verdict) and 1 <= int(verdict) <= steps else None


def read_critique(answer: str, steps: int) -> tuple[list[bool] | None, bool | None]:
    """Return for each step, and for the whole attempt, True if it is judged to be right.

    The first is None unless each step is judged once, in order; the second without a verdict, or with two
    that differ.
    """
    lines = JUDGMENT.findall(strip_reasoning(answer)[-LONGEST:])
    found = [(name.lower(), word.lower() == "correct") for name, word in lines]
    judged = [(name, right) for name, right in found if name != "verdict"]
    each_once = [name for name, _ in judged] == [str(number) for number in range(1, steps + 1)]
    verdicts = {right for name, right in found if name == "verdict"}
    return [right for _, right in judged] if each_once else None, (
        verdicts.pop() if len(verdicts) == 1 else None
    )


def read_correction(answer: str) -> tuple[str, bool] | None:
    """Return the continuation, and True if it is marked as finishing the solution; None if it is empty."""
    text, done, _ = strip_reasoning(answer)[:LONGEST].partition(DONE)
    return (text.strip(), bool(done)) if text.strip() else None


def strip_reasoning(answer: str) -> str:
    """Strip ``<think>`` blocks, also ones without an opening or closing tag, and an enclosing code fence."""
    first, *others = answer.split("<think>")
    text = first + "".join(other.partition("</think>")[2] for other in others)
    text = text.rpartition("</think>")[2].strip()
    fenced = FENCED.fullmatch(text)
    return fenced[1].strip() if fenced else text


def _shown(steps: Sequence[str]) -> str:
    return "\n".join(
        prompts.STEP.format(number=number, step=step.strip()) for number, step in enumerate(steps, 1)
    )


def _user(text: str) -> list[Message]:
    """Make a single user message, because not every model supports a system role."""
    return [{"role": "user", "content": text}]


def prompt_text(problem: Problem) -> str:
    """What the problem says, without the roles of chat messages."""
    prompt = problem.prompt
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
