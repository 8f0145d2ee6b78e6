"""Grade completions that were written to break a verifier: ``python -m tests.reliability.hostile``.

First, every family of reasoning-gym is asked what it pays for constants. Then every built-in verifier and
some of these families grade the corpus, and then as many generated completions as ``--fuzz`` says. None
contains the answer, so none may be rewarded. Prints one line per verifier: the number of verdicts, missing
verdicts by reason, the slowest verdict in seconds, the peak memory of a worker in MiB, and the number of
rewards.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.types.problem import Problem
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

ANSWER = "7391468205"
FORMS = [
    "{}",
    r"\boxed{{{}}}",
    "#### {}",
    "<answer>{}</answer>",
    "so 1 + 1 = 2 # {}",
    "The answer is ${}$.",
    "$$ {} $$",
]

SHORT = [
    text
    for kind in json.loads(Path(__file__).with_name("hostile.json").read_text()).values()
    for text in kind
]
REPEATED = [
    ("0x", "f", 5000, ""), ("1", "0", 5000, ""), ("", "9", 20000, ""), ("0.", "3", 20000, ""),
    ("", "1/", 600, "1"), ("", "-", 3000, "1"),
    ("", "\x07", 200, ""), ("Z", "\u0335", 3000, ""), ("", "\u2028", 500, ""),
    ("", "\U0001f469\u200d", 500, ""), ("", "\r\n", 2000, ""),
    ("", "\t", 5000, ""), ("", "\u0130", 300, ""), ("", "\u00df", 300, ""), ("", "\u0661", 400, ""),
    ("", "x\u00b2", 500, ""),
]  # fmt: skip


OPENING = {
    "{": "}",
    "\\boxed{": "}",
    "\\frac{": "}{",
    "(": ")",
    "[": "]",
    "\\sqrt{": "}",
    "\\left(": "\\right)",
    "<answer>": "</answer>",
}
PIECES = (
    *(
        "a",
        "1,",
        "1 ",
        "1+",
        "x^",
        "\\cdot ",
        "####",
        "# ",
        "\\boxed",
        "answer is ",
        "the final answer is ",
        "1.",
        "$$",
        "\\\\",
        "-",
    ),
    *("and ", " " * 7, "a!", "0|", "\\%", "\\text{", "}", "=", "<answer>", "\\frac"),
)
LATEX = ("x + \\frac{a}{b} ", "\\begin{matrix}1 & 2 \\\\ ", "\\sin(", "1 2 3 4 5 6 7 8 9 ")


def bombs() -> Iterator[str]:
    """Yield nested and repeated text, up to megabytes of LaTeX."""
    for n in (1, 3, 30, 1000, 100_000):
        for opening, closing in OPENING.items():
            yield from (
                opening * n,
                closing * n,
                opening * n + "1" + closing * n,
                opening * n + "1" + closing * (n // 2),
            )
    for n in (30, 3000, 300_000):
        for piece in PIECES:
            yield from (piece * n, piece * n + "!")
    for size in (10_000, 1_000_000, 4_000_000):
        for piece in LATEX:
            yield piece * (size // len(piece))


def truncated() -> Iterator[str]:
    """Yield text cut in the middle of a character, as a byte-level tokenizer may leave it."""
    for text in ("Die Lösung beträgt ½ · π", "答案是四十二", "🙂 \\boxed{🙂}", "ответ: сорок два", "#### ४२"):
        raw = text.encode()
        for cut in range(1, len(raw), 2):
            yield raw[:cut].decode("utf-8", errors="replace")
            yield raw[:cut].decode("utf-8", errors="surrogateescape")
            yield raw[cut:].decode("latin-1")


def corpus() -> list[str]:
    """Return the same 2,000 and more completions every time."""
    repeated = [first + piece * n + last for first, piece, n, last in REPEATED]
    wrapped = [form.format(text) for text in [*SHORT, *repeated] for form in FORMS]
    pairs = zip(SHORT, SHORT[7:], strict=False)
    doubled = [f"{FORMS[n].format(a)}\n{FORMS[n + 2].format(b)}" for a, b in pairs for n in range(5)]
    return list(dict.fromkeys([*wrapped, *doubled, *bombs(), *truncated()]))


def fuzzed(n: int, seed: int) -> Iterator[str]:
    """Yield random sequences of the pieces that parsers look for."""
    rng = random.Random(seed)
    plain = (
        r"0 1 2 7 9 10 + - * / ^ = ( ) [ ] { } , . ; : # #### $ $$ & | _ ! % ' ` ~ < > x y e i nan inf None "
        r"True and or not lambda"
    )
    latex = r"\boxed{ \frac{ \sqrt{ \int \sum \infty \pi \text{ \left( \right) \cdot \times \le \in \\"
    pieces = [
        *plain.split(),
        *latex.split(),
        "<answer>",
        "</answer>",
        "answer is",
        " ",
        "\n",
        "\t",
        '"',
        "\u200b",
        "é",
        "答",
        "\ud800",
        "\x00",
    ]
    for _ in range(n):
        yield "".join(rng.choice(pieces) + rng.choice(("", "", " ")) for _ in range(rng.randint(1, 40)))


CONSTANTS = (
    *(
        "nan",
        "nan nan",
        "nan + nani",
        "inf",
        "oo",
        "zoo",
        "0",
        "1",
        "-1",
        "0.5",
        "True",
        "False",
        "yes",
        "None",
        "[]",
        "{}",
        "()",
        "''",
        "a",
    ),
    *(
        "oracle_answer",
        "entry['answer']",
        "entry['metadata']['solution']",
        "entry['metadata']['valid_answers'][0]",
        "answer",
        "self",
    ),
)


def negated(answer: str) -> str:
    return answer[1:] if answer.startswith("-") else f"-{answer}"


def overpaid(family: str, pool: VerifierPool, n: int = 4) -> list[str]:
    """Return constants that are paid in full for problems with different answers, and answers that are paid
    with the wrong sign."""
    found = load_problems(f"reasoning-gym:{family}?size={n}&seed=5")
    numeric = [each for each in found if re.fullmatch(r"-?\d*[1-9]\d*", each.answer)]
    asked = [(each, text) for text in CONSTANTS for each in found] + [
        (each, negated(each.answer)) for each in numeric
    ]
    paid = [pair for pair, verdict in zip(asked, pool.grade(asked), strict=True) if verdict.reward]
    answers = {text: {each.answer for each, paid_for in paid if paid_for == text} for _, text in paid}
    return [text for text in answers if len(answers[text]) > 1 or text not in CONSTANTS]


def sweep() -> None:
    from reasoning_gym.factory import DATASETS

    with VerifierPool(VerifierConfig(name="reasoning-gym", workers=1)) as pool:
        for family in sorted(DATASETS):
            try:
                paid = overpaid(family, pool)
                print(f"{family}: pays {', '.join(paid) or 'nothing'}", flush=True)
            except UserError as error:
                print(f"{family}: not asked: {error}", flush=True)


SEEDS = {
    **dict.fromkeys(
        (
            "countdown",
            "puzzle24",
            "polynomial_multiplication",
            "simple_integration",
            "n_queens",
            "spiral_matrix",
        ),
        3,
    ),
    "gsm_symbolic": 8,  # 735, which occurs in no piece of the generated completions
}


def problems() -> dict[str, tuple[str, Problem]]:
    """Return, by label, a verifier's name and a problem whose answer no completion contains."""
    families = {
        name: load_problems(f"reasoning-gym:{name}?size=1&seed={seed}")[0] for name, seed in SEEDS.items()
    }
    made = {f"reasoning-gym:{name}": ("reasoning-gym", problem) for name, problem in families.items()}
    general = {name: (name, Problem("0", "?", ANSWER)) for name in ("math", "exact", "normalized", "task")}
    return {
        **general,
        "math, an expression": ("math", Problem("0", "?", r"\frac{x^3 - 7391}{4682 y}")),
        **made,
    }


def peak_mib(pool: VerifierPool) -> float:
    """Peak memory of any of its workers, in MiB."""
    worker = pool._workers[0]
    found = (
        re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{worker._process.pid}/status").read_text())
        if worker
        else None
    )
    return int(found[1]) / 1024 if found else 0.0


def grade_all(name: str, problem: Problem, completions: list[str], timeout: float) -> str:
    """Grade completions one at a time and count the results."""
    statuses: Counter[str] = Counter()
    slowest = memory = 0.0
    paid = []
    with VerifierPool(VerifierConfig(name=name, timeout=timeout, memory_gib=2, workers=1)) as pool:
        for completion in completions:
            pool.grade([])
            if pool._workers[0] is None:
                pool._worker(0)  # the start of a new worker is not part of a verdict
            started = time.monotonic()
            verdict = pool.grade([(problem, completion)])[0]
            slowest = max(slowest, time.monotonic() - started)
            memory = max(memory, peak_mib(pool))
            statuses[verdict.status] += 1
            if verdict.reward:
                paid.append(completion)
    said = ", ".join(f"{n} {status}" for status, n in statuses.most_common())
    examples = "".join(f"\n    {text[:200]!r}" for text in paid)
    return (
        f"{len(completions)} verdicts: {said}; slowest {slowest:.1f} s; memory {memory:.0f} MiB; paid "
        f"{len(paid)}{examples}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--fuzz", type=int, default=0, help="generated completions, shared out among the verifiers"
    )
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if not options.only:
        sweep()
    hostile, graded = corpus(), problems()
    for place, (label, (name, problem)) in enumerate(graded.items()):
        if options.only in label:
            print(f"{label}: {grade_all(name, problem, hostile, options.timeout)}", flush=True)
            if options.fuzz:
                some = list(fuzzed(options.fuzz // len(graded) + 1, place))
                print(f"{label}, generated: {grade_all(name, problem, some, options.timeout)}", flush=True)


if __name__ == "__main__":
    main()
