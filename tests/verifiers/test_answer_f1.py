"""examples/answer_f1.py in a verifier's process: ProRAG's outcome reward, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from handrail import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

EXAMPLE = Path(__file__).parents[2] / "examples/answer_f1.py"
RIGHT = "w x y z"
CASES = [
    # F1, with acc of 2·F1 from 0.2 on: the paper's reward is 4r - 1, so 3, 2, 1.4, 1, -1, 1 and 1.
    ("<answer>The W, x y z.</answer>", 1.0),
    ("Hm. <answer>x</answer>\n<answer>b the c w</answer>", (1 + 4 / 7 - 1) / 4),  # 2·1/(3 + 4) is 2/7
    ("<answer>w x b c</answer>", 0.75),  # 2·2/8
    ("<answer>w b c d e f</answer>", 0.6),  # 2·1/10 is 0.2
    ("<answer>w b c d e f g</answer>", 0.5),  # 2·1/11 is less
    ("w x y z", 0.0),
    ("<answer>w x y z</answer> I think", 0.5),
    ("<answer></answer>", 0.5),
    ("<answer><answer>w x y z</answer>", 1.0),
]


def test_rewards_by_hand() -> None:
    pairs = [(Problem("p", "?", RIGHT), said) for said, _ in CASES]
    with VerifierPool(VerifierConfig(name=f"{EXAMPLE}:reward", workers=1)) as pool:
        verdicts = pool.grade(pairs)
    assert [verdict.reward for verdict in verdicts] == pytest.approx([expected for _, expected in CASES])
