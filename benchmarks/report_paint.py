"""Time to write a report with 10,000 trajectories, and to show it in Chromium:
``python -m benchmarks.report_paint``."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser

from handrail.eval.report.page import write_report
from tests.browser import chromium

STEPS, PROBLEMS, ROLLOUTS = 25, 50, 8  # 10,000 trajectories


def write_run(directory: Path, tokens: int) -> None:
    """Write a run directory in which samples.jsonl has all trajectories of every step, each of ``tokens``
    tokens."""
    draw = random.Random(0)
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text('[method]\nname = "grpo"\n')
    with (
        (directory / "metrics.jsonl").open("w") as metrics,
        (directory / "samples.jsonl").open("w") as samples,
    ):
        metrics.write(json.dumps({"step": 0, "eval/hard/mean": 0.0}) + "\n")
        for step in range(1, STEPS + 1):
            groups = {
                "groups/all_wrong": STEPS - step,
                "groups/mixed": 10,
                "groups/all_right": step,
                "groups/guided": 1,
            }
            metrics.write(
                json.dumps(
                    {
                        "step": step,
                        "reward": step / 50,
                        "entropy": 1 / step,
                        "eval/hard/mean": step / 50,
                        **groups,
                    }
                )
                + "\n"
            )
            for place in range(PROBLEMS * ROLLOUTS):
                samples.write(
                    json.dumps(trajectory(step, f"problem-{step}-{place // ROLLOUTS}", tokens, draw)) + "\n"
                )


def trajectory(step: int, problem: str, tokens: int, draw: random.Random) -> dict[str, object]:
    return {
        "step": step, "problem": problem, "prompt": "1 + 1 =", "answer": "2", "role": "trajectory",
        "reward": float(draw.random() < 0.5),
        "finished": True, "text": "", "tokens": [str(draw.randrange(1000)) for _ in range(tokens)],
        "author": ["policy"] * tokens,
        "advantage": [round(draw.uniform(-1, 1), 4)] * tokens,
        "gradient_weight": [round(draw.uniform(0.8, 1.2), 4) for _ in range(tokens)],
    }  # fmt: skip


def paint(browser: Browser, file: Path) -> tuple[float, float]:
    """Return the milliseconds to the first contentful paint, and those until the first trajectories are
    shown."""
    page = browser.new_page()
    page.goto(file.absolute().as_uri())
    page.wait_for_selector(".trajectory")
    shown = page.evaluate("performance.now()")
    first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.close()
    return first, shown


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        write_run(Path(name) / "run", tokens)
        started = time.perf_counter()
        file = write_report(Path(name) / "run")
        print(
            f"{STEPS * PROBLEMS * ROLLOUTS} trajectories of {tokens} tokens: "
            f"{file.stat().st_size / 1e6:.1f} MB,",
            end=" ",
        )
        print(f"written in {time.perf_counter() - started:.1f} s")
        for first, shown in (paint(browser, file) for _ in range(5)):
            print(f"first contentful paint {first:.0f} ms, trajectories shown {shown:.0f} ms")


if __name__ == "__main__":
    main()
