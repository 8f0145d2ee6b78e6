"""The page docs/gpu.md, from the results that there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]

TEMPLATE = Path(__file__).with_name("page.md")
NOT_YET = (
    "**It has not been run on a GPU yet.** Below is what each part will show. The tests run its update, "
    "output\nlayer and sampling in miniature on a CPU.\n"
)


def write_page(folder: Path, page: Path) -> None:
    """Write the page from the JSON files in ``folder``; a part without one is described only."""
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    text = TEMPLATE.read_text(encoding="utf-8")
    on_gpu = any(each["device"] != "CPU" for each in found.values())
    text = text.replace("{state}\n", "" if on_gpu else NOT_YET + "\n")
    for name, show in SHOW.items():
        missing = "Not measured on a GPU yet.\n\n" if on_gpu else ""
        text = text.replace(f"{{{name}}}\n", body(found[name], show) + "\n\n" if name in found else missing)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


def body(found: Result, show: Callable[[Result], str]) -> str:
    source = f"{found['device']}, {found['wall_seconds']:.0f} s" + ", cut off" * found.get("cut_off", False)
    for key in ("failed", "skipped"):
        if isinstance(found.get(key), str):
            return f"{key.capitalize()} ({source}): {found[key]}"
    return f"{source}.\n\n{show(found)}"


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.split("|")
    lines = [f"| {' | '.join(each.strip() for each in columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float | None, digits: str = ".3g") -> str:
    return "" if value is None else f"{value:{digits}}"


def tests(found: Result) -> str:
    counts = ", ".join(f"{found[word]} {word}" for word in ("passed", "failed", "skipped") if word in found)
    return "\n".join([counts + ".", *(f"    {line}" for line in found["failures"])])


def update(found: Result) -> str:
    rows = []
    for row in found["rows"]:
        rates, mfu, gib = row["tokens_per_second"], row["mfu"] or {}, row["gib"]
        rows.append([row["kind"] + ", compiled" * row.get("compiled", False), f"{row['tokens']:,}"])
        rows[-1] += [number(rates[name], ",.0f") for name in ("update", "backward", "bare")]
        rows[-1] += [number(mfu.get(name), ".1%") for name in ("update", "bare")]
        rows[-1] += [number(row["of_bare"], ".2f"), number(gib["update"]), number(gib["bare"])]
    return table(
        "weights | tokens | update, tokens/s | its forward + backward | bare | MFU of update | MFU of bare | "
        "speed of forward + backward relative to bare | update, GiB | bare, GiB",
        rows,
    )


def output_layer(found: Result) -> str:
    rows = [
        [name, number(1e3 * each["seconds"]), number(each["gib"])] for name, each in found["by_chunk"].items()
    ]
    return f"{found['positions']:,} positions.\n\n" + table("logits at once | ms | GiB", rows)


def sampling(found: Result) -> str:
    rows = [
        [f"{row['batch']}", number(row["tokens_per_second"], ",.0f"), number(row["gib"])]
        for row in found["rows"]
    ]
    return table("completions at once | tokens/s | GiB", rows)


def step(found: Result) -> str:
    return f"TRL {found['trl']}.\n\n```\n{found['table']}\n```"


def learning(found: Result) -> str:
    rows = [[name, f"`{json.dumps(each)[:300]}`"] for name, each in found["methods"].items()]
    return f"{found['verdict']}\n\n" + table("method | result", rows)


SHOW: dict[str, Callable[[Result], str]] = {
    "tests": tests,
    "update": update,
    "output-layer": output_layer,
    "sampling": sampling,
    "step": step,
    "learning": learning,
}
