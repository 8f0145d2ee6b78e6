"""The loop: problems → rollout → verify → guide → credit → drop and pack → surrogate → optimiser."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from handrail._util.errors import Paused, UserError
from handrail._util.files import whole_directory
from handrail._util.interrupts import Interrupts
from handrail._util.processes import accelerator
from handrail._util.seeds import derive
from handrail.data.sampler import Schedule
from handrail.methods import build
from handrail.methods.base import Method
from handrail.methods.context import Tools
from handrail.training import checkpoint
from handrail.training.budget import Budget
from handrail.training.config import Config, load_config
from handrail.training.contents import contents, probed_with_another_model
from handrail.training.diversity import diversity, measures
from handrail.training.evaluate import evaluate, figures, share_correct
from handrail.training.metrics import StepMetrics, first_unverified, summary
from handrail.training.monitor import Watch
from handrail.training.policies import load_experts, load_learning_policy
from handrail.training.resources import Clock
from handrail.training.resuming import require_unchanged, run_directory
from handrail.training.run_data import fit, load_data
from handrail.training.run_directory import RunDirectory, explained, last_step, newest_checkpoint
from handrail.training.samples import batch_rows, sample_rows
from handrail.training.trained import keep_settings
from handrail.training.update import Outcome, Update, taken_apart
from handrail.types import Group, Problem
from handrail.verifiers.audit import refusal
from handrail.verifiers.pool import VerifierPool

log = logging.getLogger("handrail")
LOOKED_AT = 64
"""How many answers and references of each source are graded before training begins."""

Progress = Callable[[int, int, dict[str, Any], dict[str, float]], None]


def train(
    config: Config | str | Path,
    output: str | Path | None = None,
    method: type[Method] | None = None,
    resume: bool = False,
    progress: Progress = lambda step, steps, metrics, seconds: None,
) -> dict[str, Any]:
    """Trains as ``config`` says, writes the run directory ``output`` and returns its summary.

    ``method`` stands in for the configured one, with its own settings unless the configuration names it; ``progress`` is called
    after every step with its number, the last one's as far as a budget lets it be foretold, its metrics and its seconds by part; first
    with step 0, or when a run goes on, with the step it goes on from and the last evaluation.
    SIGINT or SIGTERM stops the run with a checkpoint; a second one at once.
    Raises UserError, before anything is written, for whatever cannot be used, and Paused where the run was stopped to be resumed.
    """
    if not isinstance(config, Config):
        output = output or run_directory(config)
        config = load_config(config)
    if method is not None:
        settings = config.method if config.method.get("name") == method.name else {}
        config = config.model_copy(update={"method": {**settings, "name": f"{method.__module__}:{method.__qualname__}"}})
    directory = Path(output or "runs/run")
    RunDirectory.claim(directory, config, resume)
    with Interrupts("stopping with a checkpoint") as interrupts, VerifierPool(config.verifier) as verifier:
        run = Run(config, method, verifier, interrupts)
        # One process alone: another may get here only when the first one has begun to write.
        with explained(directory), RunDirectory.owned(directory, config, resume) if run.accelerator.is_main_process else nullcontext():
            return run.to_the_end(directory, resume, progress)


class Run:
    """One training run: what is loaded once, and the step."""

    def __init__(self, config: Config, method: type[Method] | None, verifier: VerifierPool, interrupts: Interrupts) -> None:
        if config.rollout.temperature == 0:
            raise UserError("rollout.temperature is 0, so all rollouts of a group would be the same; train with one above 0")
        self.config = config
        self.method = build(config.method, config.rollout, method)
        data = load_data(config)
        if self.method.needs_references and not any(problem.references for problem in data.training):
            raise UserError(
                f"{config.method['name']} learns from references, and no training problem has one; name their column in data.columns, "
                "or take a method without them"
            )
        self.contents = contents(config, data.sources, data.held_out)
        for warning in filter(None, (probed_with_another_model(source, config.model.path) for source in config.data.train)):
            log.warning("data.train: %s", warning)
        self.accelerator = accelerator(config.model.device)
        self.verifier, self.interrupts = verifier, interrupts
        self.policy = load_learning_policy(config, self.accelerator, keep_start=self.method.kl > 0)
        self.policy.poll = interrupts.check
        self.experts = load_experts(config, self.accelerator, self.policy)
        self.method.prepare(self.experts)
        self.data = fit(data, self.policy, config)
        shares = [source.share for source in config.data.train]
        self.schedule = Schedule(self.data.sources, shares, config.train.problems_per_step, config.train.seed)
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        c = config.train
        betas = (c.betas[0], c.betas[1])
        optimizer = torch.optim.AdamW(parameters, lr=c.learning_rate, betas=betas, weight_decay=c.weight_decay, eps=c.epsilon)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.skipped = 0
        self.checkpointed: int | None = None
        self.update = Update(self.method, self.policy, self.accelerator, self.optimizer, c)

    def to_the_end(self, directory: Path, resume: bool, progress: Progress) -> dict[str, Any]:
        c = self.config.train
        newest = newest_checkpoint(directory) if resume else None
        if resume and last_step(directory) >= 0:
            require_unchanged(directory, self.contents)
        done = checkpoint.load(newest, self.policy, self.optimizer, self.method) if newest else None
        self.checkpointed = done
        # Without a summary, the run was stopped between its last checkpoint and its end: it has to be ended only.
        complete = (directory / "summary.json").exists()
        if complete and (done or 0) >= c.steps:
            raise UserError(f"{newest} is at step {done} already, and train.steps is {c.steps}; raise train.steps to go on")
        with RunDirectory(directory, self.config, done, writes=self.accelerator.is_main_process) as out:
            out.made_from(self.contents)
            rows, timings = self.agreed((out.read(out.metrics), out.read(out.timings)[1:]))
            before = rows[1:]
            budget = Budget(c, before, timings)
            spent = budget.spent
            if complete and spent:
                raise UserError(f"{directory} has spent its budget of {spent} already; raise it to go on")
            if self.accelerator.is_main_process:
                out.reopen()
            watch = Watch(rows)
            if done is None:
                self.start(out, watch, progress)
            else:
                last_known = {key: value for row in rows for key, value in row.items() if key.startswith("eval/")}
                progress(done, budget.last_step(done), last_known, {})
            self.steps(range((done or 0) + 1, 0 if spent else c.steps + 1), out, budget, watch, progress)
            result: dict[str, Any] = {}
            if self.accelerator.is_main_process:
                checkpoint.require_finite(out.checkpoints, c.steps, self.policy)
                with whole_directory(directory / "model") as aside:
                    self.policy.save(aside)
                    keep_settings(aside, self.config)
                result = summary(out, self.config, self.method, budget.spent)
                out.summarise(result)
            return dict(self.agreed(result))

    def start(self, out: RunDirectory, watch: Watch, progress: Progress) -> None:
        """Step 0: held-out accuracy, and what the verifier makes of the data. Raises UserError for a verifier that only fails."""
        clock = Clock()
        metrics = self.evaluate(0, out, clock)
        metrics |= self.data.skipped
        warnings = [*self.data.notes, watch(metrics)]
        if self.accelerator.is_main_process:
            looked_at = [problem for source in self.data.sources for problem in source[:LOOKED_AT]]
            warnings.append(refusal(looked_at, self.config.verifier, self.verifier))
        if failing := next(filter(None, gather_object([self.verifier.failing])), None):
            raise UserError(f"{failing}; mend the verifier, for nothing has been trained yet")
        if warning := "\n".join(filter(None, warnings)):
            metrics["warning"] = warning
        out.log(0, metrics, clock.seconds)
        progress(0, self.config.train.steps, metrics, clock.seconds)

    def steps(self, numbers: range, out: RunDirectory, budget: Budget, watch: Watch, progress: Progress) -> None:
        """These steps, or fewer if the budget is spent before."""
        c = self.config.train
        for step in numbers:
            rate = budget.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            metrics, clock = self.step(step, out)
            metrics["learning_rate"] = rate
            budget.spend(metrics, clock.seconds)
            last = step == c.steps or bool(self.agreed(budget.spent))
            if last or (self.config.eval.every and step % self.config.eval.every == 0):
                metrics = self.evaluate(step, out, clock) | metrics
            if warning := watch(metrics):
                metrics["warning"] = warning
            out.log(step, metrics, clock.seconds)
            progress(step, budget.last_step(step), metrics, clock.seconds)
            if c.checkpoint_every and (step % c.checkpoint_every == 0 or last):
                self.checkpoint(step, out)
            if last:
                break

    def checkpoint(self, step: int, out: RunDirectory) -> None:
        """Written by the main process; the others wait for it."""
        if self.accelerator.is_main_process and step != self.checkpointed:
            out.sync()
            checkpoint.save(out.checkpoints, step, self.config.train, self.policy, self.optimizer, self.method)
        self.checkpointed = step
        self.accelerator.wait_for_everyone()

    def agreed(self, value: Any) -> Any:
        """The main process's ``value``, in every process."""
        return broadcast_object_list([value])[0]

    def step(self, number: int, out: RunDirectory) -> tuple[dict[str, Any], Clock]:
        """One step, from problems to updated weights: its metrics, and what took how long."""
        clock = Clock()
        tools = self.tools("step", number)
        problems = self.mine(self.schedule.problems(number))

        with self.nothing_changed_yet(number, out):
            with clock("sample"):
                groups = self.method.rollout(problems, tools)
                gap = self.policy.gap(groups)
            with clock("verify"):
                groups = tools.verify(groups)
            if failing := self.verifier.failing:
                raise UserError(f"{failing}; mend the verifier")
            metrics = StepMetrics(groups)
            with clock("guide"):
                groups = self.method.guide(groups, tools)
        if self.policy.draws_otherwise and self.config.train.updates_per_step > 1:
            with clock("update"):
                groups = self.policy.anchored(groups)
        for part in split(groups, self.config.train.updates_per_step):
            with clock("guide"):
                part = self.method.credit(part, tools)
            if self.wants_samples(number):
                out.sample(sample_rows(number, part, self.method, self.policy))
            with clock("update"):
                outcome = self.update(part, taken_apart(number))
            metrics.updated(part, outcome)
            self.watch_skips(number, part, outcome, out)

        tools.counts.update(self.experts.take_counts())
        return metrics.result(tools) | gap, clock

    def watch_skips(self, step: int, groups: list[Group], outcome: Outcome, out: RunDirectory) -> None:
        """Keeps the batch of a skipped update. Raises UserError after too many in a row."""
        self.skipped = self.skipped + 1 if outcome.skipped else 0
        if not outcome.skipped:
            return
        if self.accelerator.is_main_process:
            out.skip(batch_rows(step, groups, self.policy))
        if self.skipped == self.config.train.most_skipped:
            raise UserError(
                f"no finite gradient in {self.skipped} updates in a row, the last in step {step}; their batches are in {out.skipped}; "
                f"{checkpoint.anew(out.checkpoints)}"
            )

    @contextmanager
    def nothing_changed_yet(self, step: int, out: RunDirectory) -> Iterator[None]:
        """The part of a step that may be left halfway: where one process is asked to stop or fails in it, all raise after a checkpoint."""
        failed: Paused | UserError | None = None
        try:
            with self.interrupts.abandonable():
                yield
        except (Paused, UserError) as error:
            failed = error
        if failed := next(filter(None, gather_object([failed])), None):
            self.checkpoint(step - 1, out)
            raise type(failed)(f"{failed}; step {step - 1} is checkpointed, to go on with --resume") from failed

    def evaluate(self, step: int, out: RunDirectory, clock: Clock) -> dict[str, Any]:
        """Accuracy on every held-out set, with its interval; that on each problem goes to evaluations.jsonl."""
        result: dict[str, Any] = {}
        for name, problems in self.data.held_out.items():
            tools = self.tools("eval")
            with clock("evaluate"):
                groups = evaluate(tools, self.accelerator, problems, self.config.eval.samples, name)
            out.evaluated(step, name, {group.problem.id: share_correct(group) for group in groups})
            result = first_unverified(tools) | result
            result |= {f"eval/{name}/{key}": value for key, value in figures(groups).items()}
            if self.config.eval.samples > 1:
                result |= {f"eval/{name}/{key}": value for key, value in diversity(list(map(measures, groups))).items()}
        return result

    def tools(self, *purpose: object) -> Tools:
        """Tools whose randomness, and the model's, depends on the seed, the purpose and the process only."""
        seed = derive(self.config.train.seed, *purpose, self.accelerator.process_index)
        set_seed(seed % 2**32)
        return Tools(self.policy, self.verifier, self.config.rollout.require_end, random.Random(seed))

    def mine(self, problems: list[Problem]) -> list[Problem]:
        return problems[self.accelerator.process_index :: self.accelerator.num_processes]

    def wants_samples(self, step: int) -> bool:
        every = self.config.train.samples_every
        return bool(every) and self.accelerator.is_main_process and (step - 1) % every == 0


def split(items: Sequence[Group], parts: int) -> Iterator[list[Group]]:
    """As equal as can be; every process yields as many parts, empty ones if need be."""
    for part in range(parts):
        yield list(items[part * len(items) // parts : (part + 1) * len(items) // parts])
