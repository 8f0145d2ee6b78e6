"""examples/first_error.py in a verifier's process: FAPO's reward for a judge, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from handrail import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

EXAMPLE = Path(__file__).parents[2] / "examples/first_error.py"
CASES = [
    # The paper's reward of each is 2r - 1: for 5 and 7 in place of 3 of 8 it is 0.75 and 0.5.
    ("3", r"\boxed{3}", 1.0),
    ("3", r"It is \boxed{4}, no, \boxed{5}", 0.875),
    ("3", r"\boxed{ 7 }", 0.75),
    ("3", r"\boxed{-1}", 0.0),
    ("3", r"\boxed{900000}", 0.0),
    ("3", r"\boxed{three}", 0.0),
    ("3", "3", 0.0),
    ("-1", r"\boxed{-1}", 1.0),
    ("-1", r"\boxed{2}", 0.0),
]


def test_rewards_by_hand() -> None:
    pairs = [(Problem("p", "?", answer, metadata={"steps": 8}), said) for answer, said, _ in CASES]
    with VerifierPool(VerifierConfig(name=f"{EXAMPLE}:reward", workers=1)) as pool:
        verdicts = pool.grade(pairs)
    assert [verdict.reward for verdict in verdicts] == pytest.approx([expected for *_, expected in CASES])
