"""The page docs/blending.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.suite.claims import Claim, Evidence, compared
from benchmarks.suite.page import glance, rows_of, template
from benchmarks.suite.suite import Result, Suite

OURS = "SFT, blend, GRPO"
LONGER = "SFT, blend, longer GRPO"
CLAIMS = (
    (OURS, "SORT", True),
    (OURS, "SORT", False),
    (OURS, "SFT", True),
    (OURS, "SFT", False),
    (OURS, "SFT, then GRPO", False),
    (LONGER, "SORT", True),
    (LONGER, "SORT", False),
    (LONGER, "SFT", True),
    (LONGER, "SFT", False),
)
"""What is compared with what, and whether that is about learning."""


def page(suite: Suite, results: Sequence[Result], missing: int, **numbers: int) -> str:
    """Return the page. ``missing``: number of runs without a result; ``numbers``: those in the text."""
    evidence = Evidence(suite, results)
    made = [claim(evidence, *each) for each in CLAIMS]
    return template(Path(__file__).parent).render(
        **numbers,
        seeds=", ".join(map(str, suite.seeds)),
        missing=missing,
        table=table,
        accuracies=accuracies(evidence),
        tokens=[
            [method, *(sampled(evidence, style, method) for style in suite.styles)]
            for method in suite.methods
        ],
        claims=[
            {
                "says": each.says,
                "how": each.how,
                "average": each.average.answer if each.average else "",
                "answer": each.answer,
                "rows": rows_of(each),
            }
            for each in made
        ],
    )


def claim(evidence: Evidence, ours: str, other: str, learned: bool) -> Claim:
    suite = evidence.suite
    sets, where = (suite.in_domain, "In-domain") if learned else (suite.out_of_domain, "Out-of-domain")
    says = f"*{ours}* {'learns' if learned else 'keeps'} more than *{other}*."
    how = f"{where} accuracy of {ours} minus that of {other}, on the same seeds and problems"
    return Claim(says, how, *compared(evidence, ours, other, sets))


def accuracies(evidence: Evidence) -> str:
    found = glance(evidence)
    words = {"in-domain": "learned", "out-of-domain": "kept"}
    header = [
        style + colon + words.get(kind, kind)
        for style, colon, kind in (each.partition(": ") for each in found["header"])
    ]
    return table(header, found["rows"])


def sampled(evidence: Evidence, style: str, method: str) -> str:
    """Mean number of tokens that a run sampled."""
    runs = [run for backbone in evidence.suite.backbones for run in evidence.runs(backbone, style, method)]
    return f"{fmean(run.figures['tokens_sampled'] for run in runs):,.0f}" if runs else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
