"""``handrail plan`` and ``handrail judge``: write plans for a data set, and measure a step judge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from handrail._util.errors import Paused, UserError
from handrail._util.files import writable, write_whole
from handrail._util.progress import console, quiet, show
from handrail.cli.options import ConfigFile, Data, Settings, build_config

if TYPE_CHECKING:
    from handrail.experts.judges import Scores
    from handrail.experts.registry import Experts
    from handrail.types.problem import Problem


def plan_command(
    data: Data,
    output: Annotated[
        Path,
        typer.Option(
            help="JSONL file to write: the problems with their plans. If it exists, it is continued."
        ),
    ],
    planner: Annotated[
        str,
        typer.Option(help="Who writes the plans: rule, outline, policy, endpoint or your own, file.py:Name."),
    ] = "rule",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace plans that the data already have.")
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Write plans for problems with a reference but no plan; plans that give a value away are left out."""
    if (
        planner == "policy"
        and not config
        and not any(setting.startswith("model.path=") for setting in settings or [])
    ):
        raise UserError("--planner policy needs a model: --set model.path=DIRECTORY, or --config")
    experts, problems = load_experts_and_problems(data, config, settings)
    experts.check("planner", planner, "--planner")
    from handrail.experts.planners.planning import derive

    with Progress(console=console) as shown, failing("planner", planner):
        task = shown.add_task("plans")
        counts = derive(
            problems, experts.planner(planner, 256), planner, output,
            lambda done, n: shown.update(task, completed=done, total=n), replace,
        )  # fmt: skip
    words = {
        "planned": "planned",
        "own": "with a plan of their own, kept (--replace replaces it)",
        "kept": "kept from an earlier call",
        "leaking": "left out because they give a value away",
        "no_plan": "without a plan",
        "no_reference": "without a reference",
    }
    said = ", ".join(f"{counts[kind]} {text}" for kind, text in words.items() if counts[kind])
    show(f"{len(problems)} problems: {said} → {output}")
    show_calls(experts)


def judge_command(
    data: Data,
    judge: Annotated[
        str,
        typer.Option(
            help="Step judge to measure: arithmetic, reference, prm, llm or your own, file.py:Name."
        ),
    ] = "arithmetic",
    limit: Annotated[
        int, typer.Option(min=1, help="Use only the first N problems that have a reference.")
    ] = 500,
    threshold: Annotated[
        float, typer.Option(help="A step that scores below this, at most 1, counts as wrong.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the inserted errors.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="JSONL file to write the misjudged solutions to.")
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Measure how well a step judge finds the first wrong step.

    It judges references unchanged, and with one number of one step changed.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold is {threshold:g}; it must be above 0 and at most 1, like the scores")
    if output:
        writable(output)
    experts, problems = load_experts_and_problems(data, config, settings)
    experts.check("judge", judge, "--judge")
    from handrail.eval.judge_report import labeled, report

    attempts = labeled([problem for problem in problems if problem.references][:limit], seed)
    if not attempts:
        raise UserError(f"{data}: no problem has a reference, so there is nothing to judge")
    found = report(Asked(experts, judge), attempts, threshold)
    show(
        f"{judge} judge: {found['right']} references, assumed to be correct, "
        f"and {found['wrong']} with one number in one step changed"
    )
    for name in ("precision", "recall", "false_alarms", "not_judged"):
        share = found[name]
        figure = (
            "nothing to measure"
            if share is None
            else "{mean:.1%} [{low:.1%}, {high:.1%}], n = {n}".format(**share)
        )
        show(f"{name.replace('_', ' '):14}{figure}")
    if output:
        write_whole(output, "".join(json.dumps(failure) + "\n" for failure in found["failures"]))
    show_calls(experts)


class Asked:
    """A step judge that is asked as a method asks it, so that its failure is one sentence."""

    def __init__(self, experts: Experts, name: str) -> None:
        self.experts, self.name = experts, name

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        from handrail.experts.questions import JudgeQuestion

        questions = [JudgeQuestion(problem, steps) for problem, steps in attempts]
        return self.experts.answer(self.name, questions, [0] * len(questions)) if questions else []


@contextmanager
def failing(role: str, name: str) -> Iterator[None]:
    """Turn whatever a user's own expert raises into a UserError."""
    try:
        yield
    except (UserError, Paused, OSError):
        raise
    except Exception as error:
        if ":" not in name:
            raise
        raise UserError(f"the {role} {name} fails: {type(error).__name__}: {error}") from error


def load_experts_and_problems(
    data: str, config: Path | None, settings: list[str] | None
) -> tuple[Experts, list[Problem]]:
    """Load the experts, from a configuration or from the --set values alone, and the problems of ``data``."""
    quiet()
    from handrail._util.processes import accelerator
    from handrail.data.load import load_problems
    from handrail.training.policies import load_experts

    parsed = build_config(config, settings, model={"path": "builtin:house-tiny"}, data={"train": data})
    return load_experts(parsed, accelerator(parsed.model.device, parsed.model.dtype)), load_problems(
        data, parsed.data.columns
    )


def show_calls(experts: Experts) -> None:
    """Print how many requests the endpoint got, if any."""
    counts = {name: n for name, n in experts.take_counts().items() if name.startswith("endpoint/")}
    if counts:
        told = sorted((name.removeprefix("endpoint/").replace("_", " "), n) for name, n in counts.items())
        show("endpoint: " + ", ".join(f"{n} {name}" for name, n in told))
