"""Conversations that ask a language model for plans, verdicts and corrections, and how its answers are read.

An answer is hostile text: its reasoning is left out, and no more of it is kept than could make sense.
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


def plan_conversation(problem: Problem, reference: str) -> list[Message]:
    """Asks for how to go about a problem, given its worked solution."""
    return _user(prompts.PLAN.format(problem=_text(problem), reference=reference))


def judge_conversation(problem: Problem, steps: Sequence[str]) -> list[Message]:
    """Asks for the first wrong step of an attempt; ``right_steps`` reads the answer."""
    shown = "\n".join(
        prompts.STEP.format(number=number, step=step.strip()) for number, step in enumerate(steps, 1)
    )
    return _user(prompts.JUDGE.format(problem=_text(problem), steps=shown))


def correction_conversation(
    problem: Problem, kept: Sequence[str], reference: str | None = None, whole: bool = False
) -> list[Message]:
    """Asks for the step after the ``kept`` ones, or with ``whole`` for all that follow; ``read_correction`` reads the answer."""
    return _user(
        prompts.CORRECTION.format(
            problem=_text(problem),
            solution=prompts.SOLUTION.format(reference=reference) if reference is not None else "",
            beginning="".join(kept).strip() or "(nothing yet)",
            task=prompts.REST if whole else prompts.NEXT_STEP.format(done=DONE),
        )
    )


def right_steps(answer: str, steps: int) -> int | None:
    """How many of ``steps`` steps come before the first wrong one; all if none is wrong, None if the answer names no single step."""
    text = spoken(answer)[-LONGEST:]
    verdicts = {verdict.strip(" \t\r\"'`").lower() for verdict in VERDICT.findall(text) or [text]}
    if len(verdicts) != 1:
        return None
    verdict = verdicts.pop()
    if verdict in ("null", "none"):
        return steps
    return int(verdict) - 1 if NUMBER.fullmatch(verdict) and 1 <= int(verdict) <= steps else None


def read_correction(answer: str) -> tuple[str, bool] | None:
    """What to go on with, and whether it was said to finish the solution; None if there is nothing."""
    text, done, _ = spoken(answer)[:LONGEST].partition(DONE)
    return (text.strip(), bool(done)) if text.strip() else None


def spoken(answer: str) -> str:
    """An answer without its ``<think>`` blocks, also where one has lost its beginning or its end, and without a fence around it."""
    first, *others = answer.split("<think>")
    text = first + "".join(other.partition("</think>")[2] for other in others)
    text = text.rpartition("</think>")[2].strip()
    fenced = FENCED.fullmatch(text)
    return fenced[1].strip() if fenced else text


def _user(text: str) -> list[Message]:
    """One user message, since not every model knows a system role."""
    return [{"role": "user", "content": text}]


def _text(problem: Problem) -> str:
    prompt = problem.prompt
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
