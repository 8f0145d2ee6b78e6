"""``handrail eval`` and ``handrail probe``: measure a model without training it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from handrail._util.errors import UserError
from handrail._util.files import write_whole
from handrail._util.names import near, slug
from handrail._util.progress import console, quiet, show
from handrail.cli.options import DATA, ConfigFile, Data, Settings, build_config, default_verifier, with_model
from handrail.training.config import Config
from handrail.training.trained import model_of, settings_file

Seed = Annotated[int, typer.Option(help="Seed of the sampling: the same seed gives the same completions.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N problems of each set.")]


def eval_command(
    model: Annotated[str, typer.Argument(help="Run directory, model directory, hub name or builtin:NAME.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Held-out sets: {DATA}; or NAME=SOURCE (default: eval.sets of the run or of --config)."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 8,
    seed: Seed = 0,
    limit: Limit = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write (default: in runs/, named after the model and the sets)."),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Measure a model: pass@k, maj@k, pick@k, routing, length and diversity, with intervals.

    The same command continues an evaluation that was stopped.
    """
    parsed, sets = load_settings_and_sets(model, data, config, settings)
    directory = output or Path("runs") / "-".join(["eval", slug(model), *sets])
    if parsed.rollout.temperature == 0 and samples > 1:
        raise UserError("rollout.temperature is 0, so all samples would be the same; add --samples 1")
    from handrail.eval.evaluation import evaluate_sets
    from handrail.eval.report.tables import evaluation_table

    with Progress(console=console) as shown:
        tasks = {name: shown.add_task(name) for name in sets}
        summary = evaluate_sets(
            parsed, sets, samples, seed, limit, directory,
            lambda name, done, n: shown.update(tasks[name], completed=done, total=n),
        )  # fmt: skip
    console.print(evaluation_table(summary))
    for name, figures in summary.items():
        warn_unverified(figures, figures["problems"] * samples, f"{name}: ")
    show(f"graded by the verifier {parsed.verifier.name!r}")
    write_whole(directory / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(f"summary: {directory / 'summary.json'}")


def probe_command(
    model: Annotated[str, typer.Argument(help="Run directory, model directory, hub name or builtin:NAME.")],
    data: Data,
    rollouts: Annotated[
        int, typer.Option(min=4, help="Completions per problem, and the largest group size to consider.")
    ] = 8,
    seed: Seed = 0,
    limit: Limit = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write (default: in runs/, named after the model and the data)."),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find out which problems give a signal, what is wrong with the data, and which method to start with.

    The same command continues a probe that was stopped. Exit code 1 means faults that would spoil a run.
    """
    parsed, _ = load_settings_and_sets(model, [data], config, settings)
    directory = output or Path("runs") / f"probe-{slug(model)}-{slug(data)}"
    from handrail.eval.probe import probe

    with Progress(console=console) as shown:
        task = shown.add_task("problems")
        found = probe(
            parsed, data, rollouts, seed, limit, directory,
            lambda done, n: shown.update(task, completed=done, total=n),
        )  # fmt: skip
    show_findings(found, parsed.verifier.name)
    show_recommendation(found["recommendation"])
    file = directory / "problems.jsonl"
    show(
        f"\nresults per problem: {file}; set it as the probe of a source, "
        "and train leaves out problems that are faulty or all right"
    )
    if spoiled := found["spoiled_by"]:
        show("error: too many faults, which would spoil a run: " + ", ".join(spoiled))
        raise typer.Exit(1)


def harvest_command(
    model: Annotated[str, typer.Argument(help="Run directory, model directory, hub name or builtin:NAME.")],
    data: Data,
    output: Annotated[
        Path, typer.Option(help="File of answers to write, for the setting cache of the method npo.")
    ],
    rollouts: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="Answers to keep per problem.")] = 1,
    seed: Seed = 0,
    limit: Limit = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Sample a later checkpoint's answers and keep the right ones, with their log-probabilities, for npo.

    The same command continues a harvest that was stopped.
    """
    parsed, _ = load_settings_and_sets(model, [data], config, settings)
    from handrail.eval.harvest import harvest

    with Progress(console=console) as shown:
        task = shown.add_task("problems")
        solved, problems = harvest(
            parsed, data, rollouts, keep, seed, limit, output,
            lambda done, n: shown.update(task, completed=done, total=n),
        )  # fmt: skip
    show(f"{solved} of {problems} problems have an answer: {output}")
    show(f'train with method.name = "npo" and method.cache = "{output}"')


def show_findings(found: dict[str, Any], verifier: str) -> None:
    """Print what a probe found out about the problems and the data."""
    from handrail.eval.faults import FAULTS
    from handrail.eval.report.tables import probe_table

    kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in found["kinds"].items() if n)
    show(f"{found['problems']} problems, {found['rollouts']} rollouts each: {kinds}")
    show(f"graded by the verifier {verifier!r}")
    show("; ".join(f"{name} {format_estimate(estimate)}" for name, estimate in found["pass"].items()))
    console.print(probe_table(found))
    warn_unverified(found, (found["problems"] - found["kinds"]["not_sampled"]) * found["rollouts"])
    if lengths := found.get("reference_tokens"):
        likely = (
            f"; probability {found['reference_probability']:.2f} per token (geometric mean)"
            if "reference_probability" in found
            else ""
        )
        show(
            f"references: {found['with_reference']} problems have one, "
            f"median {lengths['median']:.0f} tokens, at most {lengths['longest']}{likely}"
        )
    for fault, n in found["faults"].items():
        console.print(f"fault: {n} × {fault}: {FAULTS[fault]}", style="yellow", soft_wrap=True)
    for name, share in found.get("other_verifiers", {}).items():
        show(f"the verifier {name!r} would accept {share:.1%} of the references")


def show_recommendation(advice: dict[str, Any]) -> None:
    """Print what to start with, and why."""
    before = f"first {advice['before']}; until then, " if advice["before"] else ""
    start = f'start with method.name = "{advice["method"]}", rollout.group_size = {advice["group_size"]}'
    show(f"\n{before}{start}")
    if advice["then"]:
        show(f"then {advice['then']}")
    for reason in advice["reasons"]:
        show(f"- {reason}")


def warn_unverified(figures: dict[str, Any], attempts: int, where: str = "") -> None:
    """Warn if some completions are unverified."""
    if n := figures["unverified"]:
        counted = "completions are unverified and count neither as correct nor as wrong"
        show(f"warning: {where}{n} of {attempts} {counted}, first {figures['first_unverified']}")


def load_settings_and_sets(
    model: str, data: list[str] | None, config: Path | None, settings: list[str] | None
) -> tuple[Config, dict[str, str]]:
    """Return the configuration with ``model`` as its model, and the sets by name. Raises UserError."""
    quiet()
    if not data and not config and settings_file(model_of(model)) is None:
        from handrail.models.builtin import locate  # imports torch

        if not Path(locate(model)).exists():
            raise UserError(
                f"there is no directory {model}{near(Path(model))} "
                "(to measure a model of the Hugging Face hub, name data)"
            )
        raise UserError("there is no data to measure on; name a source, a --config with eval.sets, or a run")
    sets = sets_by_name(data or [])
    fitting = {"name": default_verifier(*sets.values())}
    parsed = build_config(
        config, settings, model={"path": model}, data={"train": list(sets.values())}, verifier=fitting
    )
    parsed = with_model(parsed, model)
    sets = sets or parsed.eval.sets
    if not sets:
        raise UserError(f"{config or model}: eval.sets is empty; name the data to measure on")
    return parsed, sets


def sets_by_name(data: list[str]) -> dict[str, str]:
    """Map the name of each set, given as NAME=SOURCE or derived from the source, to its source.

    Raises UserError if two sets have the same name.
    """
    sets: dict[str, str] = {}
    for item in data:
        given = re.fullmatch(r"([\w.-]+)=(.+)", item)
        name, source = (
            given.groups()
            if given
            else (re.sub(r"[^\w.=-]+", "-", item.removesuffix(".jsonl")).strip("-"), item)
        )
        if name in sets:
            raise UserError(f"two sets are called {name}; give one another name, as in other={source}")
        sets[name] = source
    return sets


def format_estimate(estimate: dict[str, float]) -> str:
    return "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**estimate)
