"""The application: ``handrail train``, ``compare`` and ``check``, and the list of all commands."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from handrail._util.errors import Paused, UserError
from handrail._util.memory import enough_memory
from handrail._util.progress import bars, console, quiet, reflowed, show
from handrail._util.version import __version__
from handrail.cli.evaluate import eval_command, harvest_command, probe_command
from handrail.cli.experts import judge_command, plan_command
from handrail.cli.init import init_command
from handrail.cli.model import app as model
from handrail.cli.options import (
    Columns,
    Data,
    Settings,
    build_config,
    default_verifier,
    parse_column,
    show_help_if_alone,
    with_model,
)
from handrail.cli.report import report_command
from handrail.cli.settings import config_command, methods_command
from handrail.data.config import DataConfig, Source
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.training.config import Config, load_config
from handrail.training.resuming import compare_directory, run_directory
from handrail.training.trained import model_of, settings_file
from handrail.types.problem import Problem
from handrail.verifiers.config import VerifierConfig

RESUME_ME = 75
"""The exit code of a paused run: EX_TEMPFAIL of sysexits.h."""


def train_command(
    config: Annotated[Path, typer.Argument(help="Configuration file (TOML); handrail init writes one.")],
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option(help="Run directory to write (default: runs/ and the file's name).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run directory.")
    ] = False,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Train under Ray Train, on the cluster of RAY_ADDRESS or else on a local one."
        ),
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(help="Processes under --ray, or a range such as 2-8 (default: one per GPU, else 1)."),
    ] = None,
    samplers: Annotated[
        int,
        typer.Option(
            min=0, help="Number of processes under --ray that only sample (default: the workers sample)."
        ),
    ] = 0,
) -> None:
    """Train a model with one method and write a run directory."""
    if workers and not ray:
        raise UserError("--workers is for --ray; without it, start the processes with torchrun")
    if samplers and workers and "-" in workers:
        raise UserError(
            f"--workers is {workers}, a range, but Ray does not count the samplers when it looks for room; "
            "give one number of workers"
        )
    if samplers and not ray:
        raise UserError("--samplers is for --ray; without it, the processes that train also sample")
    number = number_of(workers)
    parsed = load_config(config, settings)
    directory = output or run_directory(config)
    quiet()
    from handrail.training.loop import train
    from handrail.training.on_ray import train_on_ray
    from handrail.training.resources import Forecast

    show(f"{parsed.method.get('name', 'grpo')} from {parsed.model.path} into {directory}")
    forecast = Forecast(parsed)
    with bars(console) as shown:

        def report(step: int, steps: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
            shown.update("", step, steps, metrics)
            # Under Ray, the memory that it states is a worker's, which says so itself.
            if not ray and (said := forecast(step, steps, metrics, seconds)):
                show(said)

        summary = (
            train_on_ray(parsed, directory, number, resume, report, show, samplers)
            if ray
            else train(parsed, directory, resume=resume, progress=report)
        )
    show_end(summary)
    show(f"model: {directory / 'model'}")


def number_of(workers: str | None) -> tuple[int, int] | None:
    """Return the least and the largest number of workers."""
    if workers is None:
        return None
    least, dash, most = workers.partition("-")
    if not (least.isdecimal() and (most.isdecimal() or not dash) and 0 < int(least) <= int(most or least)):
        raise UserError(f"--workers is {workers}; give a number, or a range such as 2-8")
    return int(least), int(most or least)


def show_end(summary: Mapping[str, Any]) -> None:
    """Print the accuracies at the start and at the end, and how many steps had no signal."""
    for name, ends in summary["eval"].items():
        start, end = ends["start"], ends["end"]
        if "mean" not in start or "mean" not in end:
            when = "end" if "mean" in start else "start"
            show(f"held-out {name}: no verdict on any completion at the {when}")
            continue
        interval = f"[{end['low']:.1%}, {end['high']:.1%}]"
        show(f"held-out {name}: {start['mean']:.1%} → {end['mean']:.1%} {interval}, n = {end['n']}")
    if summary["steps_without_signal"]:
        show(f"{summary['steps_without_signal']} of {summary['steps']} steps had no signal")


def compare_command(
    config: Annotated[
        Path, typer.Argument(help="Configuration file (TOML); its section \\[compare] may list the runs.")
    ],
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write (default: runs/compare- and the file's name).")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of concurrent runs (default: one per GPU, else per CPU core)."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Compare these methods, separated by commas, instead of \\[compare.runs].")
    ] = "",
    runs: Annotated[
        list[str] | None,
        typer.Option(help="Run only these of \\[compare.runs], separated by commas. May be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas, instead of compare.seeds.")] = "",
) -> None:
    """Train several methods from the same model on the same problems, and test which differ.

    The first run is the baseline. Results: a table, paired differences, a plot, summary.json.
    The same command continues a comparison that was stopped.
    """
    if seeds:
        settings = [*(settings or []), f"compare.seeds=[{seeds}]"]
    parsed = load_config(config, settings)
    directory = output or compare_directory(config)
    quiet()
    from handrail.eval.compare import compare
    from handrail.eval.jobs import by_methods, choose, listed, plan_jobs
    from handrail.eval.report.plot import curves
    from handrail.eval.report.tables import comparison_table, diversity_table, training_table

    if methods and runs:
        raise UserError(
            "--methods replaces the runs of the file and --runs selects from them; give one of them"
        )
    if methods:
        parsed = by_methods(parsed, listed("--methods", methods))
    if runs:
        parsed = choose(parsed, runs)
    planned = plan_jobs(parsed, directory)
    finished = sum(job.summary is not None for job in planned)
    show(
        f"{len(planned)} runs from {parsed.model.path} into {directory}"
        + (f", {finished} of them finished already" * bool(finished))
    )
    with bars(console) as shown:
        summary = compare(parsed, directory, jobs, shown.update)
    for table in (comparison_table, training_table, diversity_table):
        if shown_table := table(summary["methods"], list(parsed.eval.sets)):
            console.print(shown_table)
    for sentence in summary["verdict"]:
        show(sentence)
    curves(planned, list(parsed.eval.sets), directory / "plot.png")
    show(f"plot: {directory / 'plot.png'}\nsummary: {directory / 'summary.json'}")
    show(f"for a page with every step and token: handrail report {directory}")


def check_command(
    data: Data,
    columns: Columns = None,
    model: Annotated[
        str | None, typer.Option(help="Show the first problem as this model sees it, and check all lengths.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Take model, templates, lengths, verifier and held-out sets from this file."),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="Verifier that grades the references (default: the one that fits the data)."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Held-out data that the source must not contain. May be repeated."),
    ] = None,
) -> None:
    """Validate a data source and show how it is read.

    It reports duplicates, contradictions, answers and references that the verifier refuses,
    and held-out problems in the source. Exit code 1 means faults that would spoil a run.
    """
    mapping = dict(parse_column(pair) for pair in columns or [])
    from handrail.data.load import load
    from handrail.eval.check import grade, overlap, overview

    settings = load_config(config) if config else None
    if settings is None and model and settings_file(model_of(model)):
        settings = build_config(
            None, None, model={"path": model}, data={"train": data}, verifier={"name": default_verifier(data)}
        )
    mapping = mapping or (settings.data.columns if settings else {})
    loaded = load(data, mapping)
    grader = settings.verifier if settings else VerifierConfig(name=default_verifier(data))
    if verifier:
        grader = grader.model_copy(update={"name": verifier})
    show("\n".join(overview(loaded, data)))
    with console.status("grading answers and references"):
        found = list(grade(loaded.problems, grader))
    held_out = [*(against or []), *(settings.eval.sets.values() if settings else [])]
    found += [line for source in held_out for line in overlap(loaded.problems, source, mapping)]
    show("\n".join(found))
    if model and settings:
        settings = with_model(settings, model)
    elif model:
        # rollout.max_tokens is unknown here, so only the prompt and the references must fit the context.
        short = RolloutConfig(max_tokens=1)
        settings = Config(
            model=ModelConfig(path=model), data=DataConfig(train=[Source(path=data)]), rollout=short
        )
    show_first(loaded.problems, settings)
    if any(line.startswith("error:") for line in found):
        raise typer.Exit(1)


def show_first(problems: list[Problem], settings: Config | None) -> None:
    """Show the first problem: as the configured model sees it, or as text if there is none."""
    if settings is None:
        show(
            f"\nfirst problem ({problems[0].id}), as text; add --model to see it as that model does:"
            f"\n{problems[0].prompt}"
        )
        return
    quiet()  # not earlier, because it imports transformers, which a check without a model does not need
    from handrail.eval.check import preview

    for caption, text in preview(settings, problems):
        show(f"\n{caption}")
        console.print(text, style="cyan", soft_wrap=True)


app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(invoke_without_command=True)
def handrail(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train language models on problems that they cannot solve yet."""
    if version:
        show(f"handrail {__version__}")
        raise typer.Exit
    if context.invoked_subcommand not in (None, "train") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"handrail {context.invoked_subcommand} runs in one process; start it without torchrun"
        )
    show_help_if_alone(context)


PANELS: dict[str, dict[str, Callable[..., Any] | typer.Typer]] = {
    "Before training": {
        "init": init_command, "check": check_command, "probe": probe_command, "harvest": harvest_command,
    },
    "Training and results": {
        "train": train_command, "compare": compare_command, "eval": eval_command, "report": report_command,
    },
    "Experts": {"plan": plan_command, "judge": judge_command},
    "Look up": {"methods": methods_command, "config": config_command},
    "Models": {"model": model},
}  # fmt: skip
for panel, commands in PANELS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, help=reflowed(inspect.getdoc(command) or ""), rich_help_panel=panel)(command)


def main(app: typer.Typer = app) -> None:
    """Run ``app`` on the arguments of the process.

    A UserError, memory that runs out wherever it does, or a file that cannot be read or written, is printed
    as one sentence and exits with code 2; a paused run exits with code 75.
    """
    try:
        with enough_memory("run"):
            app()
    except Paused as pause:
        Console(stderr=True, soft_wrap=True).print(str(pause), style="yellow", highlight=False, markup=False)
        sys.exit(RESUME_ME)
    except UserError as error:
        refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        refuse(f"{error.filename} cannot be read or written ({error.strerror}); choose another file")


def refuse(sentence: str) -> NoReturn:
    """Print an error and exit with code 2."""
    Console(stderr=True, soft_wrap=True).print(
        f"error: {sentence}", style="red", highlight=False, markup=False
    )
    sys.exit(2)
