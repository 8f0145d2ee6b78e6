"""The page docs/blending.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.suite.claims import Claim, Evidence, compared
from benchmarks.suite.page import glance, rows_of
from benchmarks.suite.suite import Result, Suite

OURS = "SFT, blend, GRPO"
CLAIMS = (
    ("It learns more than SORT.", "SORT", True),
    ("It learns more than SFT.", "SFT", True),
    ("It keeps more than SFT.", "SFT", False),
    ("It keeps more than SORT.", "SORT", False),
    ("It keeps more than without blending.", "SFT, then GRPO", False),
    ("It learns more than without blending.", "SFT, then GRPO", True),
)
"""What is said of ours, what it is compared with, and whether that is about learning."""


def page(suite: Suite, results: Sequence[Result], missing: int, **numbers: int) -> str:
    """Return the page. ``missing``: number of runs without a result; ``numbers``: those in the text."""
    evidence = Evidence(suite, results)
    made = [claim(evidence, *each) for each in CLAIMS]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    return environment.get_template("page.md.jinja").render(
        **numbers,
        seeds=", ".join(map(str, suite.seeds)),
        missing=missing,
        table=table,
        glance=glance(evidence),
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


def claim(evidence: Evidence, says: str, other: str, learned: bool) -> Claim:
    suite = evidence.suite
    sets, where = (suite.in_domain, "In-domain") if learned else (suite.out_of_domain, "Out-of-domain")
    how = f"{where} accuracy of {OURS} minus that of {other}, on the same seeds and problems"
    return Claim(says, how, *compared(evidence, OURS, other, sets))


def sampled(evidence: Evidence, style: str, method: str) -> str:
    """Mean number of tokens that a run sampled."""
    runs = [run for backbone in evidence.suite.backbones for run in evidence.runs(backbone, style, method)]
    return f"{fmean(run.figures['tokens_sampled'] for run in runs):,.0f}" if runs else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
