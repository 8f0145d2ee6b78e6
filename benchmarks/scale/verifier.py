"""Measure the verifier: ``python -m benchmarks.scale.verifier`` writes verifier.json beside this file."""

from __future__ import annotations

import json
import time

from benchmarks.scale.assumptions import VERIFIER
from handrail.types.problem import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

COMPLETIONS = 512


def main() -> None:
    """Grade completions of 1,000 words, half of them right, in one process of the pool."""
    text = "So we add the two numbers. " * 166
    items = [
        (Problem(f"p{n}", "?", str(7 * n)), f"{text}The answer is \\boxed{{{7 * n + n % 2}}}.")
        for n in range(COMPLETIONS)
    ]
    with VerifierPool(VerifierConfig(name="math", workers=1)) as verifier:
        verifier.grade(items[:16])
        started = time.perf_counter()
        verifier.grade(items)
        seconds = (time.perf_counter() - started) / COMPLETIONS
    found = {"seconds": round(seconds, 5), "completions": COMPLETIONS}
    VERIFIER.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
