"""The training loop: problems → rollout → verify → guide → credit → drop and pack → surrogate → optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from handrail._util.errors import OutOfMemory, Paused, UserError
from handrail._util.files import whole_directory
from handrail._util.interrupts import Interrupts
from handrail._util.state import copy_state
from handrail.methods.autonpo import AutoNpo
from handrail.methods.base import Method, State
from handrail.methods.method_and_terms import state_of
from handrail.models.generate import Sampler
from handrail.models.trainable import TrainablePolicy
from handrail.training import checkpoint
from handrail.training.ahead import Ahead, sampling_ahead
from handrail.training.callbacks import (
    Callback,
    Checkpoints,
    Evaluation,
    Labels,
    LearningRate,
    Monitor,
    Progress,
    Report,
    Samples,
    Stop,
    Trackers,
)
from handrail.training.config import Config, load_config
from handrail.training.metrics import StepMetrics, summary
from handrail.training.resources import Clock
from handrail.training.resuming import require_unchanged, run_directory
from handrail.training.rollback import Rollback
from handrail.training.run import Run
from handrail.training.run_directory import RunDirectory, explain_errors, last_step, newest_checkpoint
from handrail.training.samples import batch_rows
from handrail.training.shared_state import learn, observe
from handrail.training.stopping import StopCriteria
from handrail.training.trained import keep_settings
from handrail.training.update import Outcome, logs_authors, together
from handrail.types.problem import Problem
from handrail.types.trajectory import Group
from handrail.verifiers.audit import refusal
from handrail.verifiers.pool import VerifierPool

LOOKED_AT = 64
"""Number of problems per source whose answers and references are graded before training starts."""


def train(
    config: Config | str | Path,
    output: str | Path | None = None,
    method: type[Method[Any]] | None = None,
    resume: bool = False,
    progress: Progress = lambda step, steps, metrics, seconds: None,
    callbacks: Sequence[Callback] = (),
    sampler: Callable[[TrainablePolicy], Sampler] | None = None,
) -> dict[str, Any]:
    """Train as configured, write the run directory ``output`` and return its summary.

    ``method`` replaces the configured one; the configured method settings apply only if they name that
    method. ``progress`` is called after every step with its number, the expected last step, its metrics and
    its seconds by part. The first call is for step 0 or, on resumption, for the step that the run resumes
    from, with the latest evaluation. ``callbacks`` run in addition to the loop's own. ``sampler`` returns
    what samples for the policy in place of ``sampler.name``.

    SIGINT or SIGTERM stops the run with a checkpoint; a second signal stops it immediately. Raises UserError
    for unusable input, before anything is written, and Paused if the run was stopped and can be resumed.
    """
    if not isinstance(config, Config):
        output = output or run_directory(config)
        config = load_config(config)
    if method is not None:
        settings = config.method if config.method.get("name") == method.name else {}
        config = config.model_copy(
            update={"method": {**settings, "name": f"{method.__module__}:{method.__qualname__}"}}
        )
    directory = Path(output or "runs/run")
    RunDirectory.claim(directory, config, resume)
    with Interrupts("stopping with a checkpoint") as interrupts, VerifierPool(config.verifier) as verifier:
        run = Loop(config, method, verifier, interrupts, callbacks, sampler)
        # Only the main process takes the lock and looks again at the directory, which another run may have
        # taken.
        with (
            explain_errors(directory),
            RunDirectory.lock(directory, config, resume)
            if run.accelerator.is_main_process
            else nullcontext(),
        ):
            return run.fit(directory, resume, progress)


class Loop(Run):
    """The steps of a run, from its start or its last checkpoint to its end."""

    def __init__(
        self,
        config: Config,
        method: type[Method[Any]] | None,
        verifier: VerifierPool,
        interrupts: Interrupts,
        callbacks: Sequence[Callback] = (),
        sampler: Callable[[TrainablePolicy], Sampler] | None = None,
    ) -> None:
        super().__init__(config, method, verifier, interrupts, sampler)
        self.added, self.callbacks = list(callbacks), list[Callback]()
        self.ahead: Ahead | None = None
        self.rollback: list[Callback] = []
        if isinstance(self.method, AutoNpo):
            self.rollback.append(Rollback(self.method, config))

    def fit(self, directory: Path, resume: bool, progress: Progress) -> dict[str, Any]:
        c = self.config.train
        newest = None
        with self.failing_together():  # storage may show other processes other checkpoints
            if resume and self.accelerator.is_main_process:
                newest = newest_checkpoint(directory)
        newest = self.broadcast(newest)
        if resume and last_step(directory) >= 0:
            require_unchanged(directory, self.contents)
        done = checkpoint.load(newest, self.updates, self.method) if newest else None
        self.checkpointed = done
        # Without a summary, a run at its last step was stopped before its end: it only has to be finished.
        complete = (directory / "summary.json").exists()
        if complete and (done or 0) >= c.steps:
            raise UserError(
                f"{newest} is already at step {done}, and train.steps is {c.steps}; raise it to go on"
            )
        with RunDirectory(directory, self.config, done, writes=self.accelerator.is_main_process) as out:
            self.out, self.directory = out, directory
            out.write_contents(self.contents)
            rows, timings = self.broadcast((out.read(out.metrics), out.read(out.timings)[1:]))
            before = rows[1:]
            criteria = StopCriteria(c, before, timings)
            if complete and criteria.spent:
                raise UserError(
                    f"{directory} has already spent its budget of {criteria.spent}; raise it to go on"
                )
            stopped = "" if complete or not rows else rows[-1].get("stopped", "")
            self.stop_reason = criteria.spent or stopped
            if self.accelerator.is_main_process:
                out.reopen()
            report = Report(progress, criteria)
            self.callbacks = [LearningRate(criteria), Samples(), Labels(), *self.rollback, Stop(criteria)]
            self.callbacks += [*self.added, Evaluation(), Monitor(rows), report, Checkpoints()]
            self.callbacks += [Trackers()] if c.trackers else []
            for callback in self.callbacks:
                callback.on_start(self, done or 0)
            if done is None:
                self.start()
            else:
                last_known = {
                    key: value for row in rows for key, value in row.items() if key.startswith("eval/")
                }
                report.after_log(self, done, last_known, {})
            with sampling_ahead(self) as self.ahead:
                self.steps(range((done or 0) + 1, 0 if self.stop_reason or self.gone_back else c.steps + 1))
            if not self.gone_back:
                return self.finish(directory)
        self.gone_back = False
        return self.fit(directory, True, progress)

    def finish(self, directory: Path) -> dict[str, Any]:
        """Write the model and the summary; return the summary in every process."""
        result: dict[str, Any] = {}
        with self.policy.at_hand():
            if self.accelerator.is_main_process:
                checkpoint.require_finite(self.out.checkpoints, self.config.train.steps, self.updates)
                for name, update in self.updates.items():
                    with whole_directory(directory / ("model" if name == "policy" else name)) as aside:
                        update.policy.save(aside)
                        keep_settings(aside, self.config.model_copy(update={"model": update.policy.config}))
        if self.accelerator.is_main_process:
            result = summary(self.out, self.config, self.method, self.stop_reason)
            self.out.write_summary(result)
        result = dict(self.broadcast(result))
        for callback in self.callbacks:
            callback.on_end(self, result)
        return result

    def start(self) -> None:
        """Run step 0: evaluate, and check the verifier on the data.

        Raises UserError if the verifier always fails.
        """
        clock = Clock()
        metrics = Evaluation.measure(self, 0, clock) | self.data.skipped
        warnings = list(self.data.notes)
        if self.accelerator.is_main_process:
            looked_at = [problem for source in self.data.sources for problem in source[:LOOKED_AT]]
            warnings.append(refusal(looked_at, self.config.verifier, self.verifier) or "")
        if failing := next(filter(None, gather_object([self.verifier.failing])), None):
            raise UserError(f"{failing}; fix the verifier (nothing has been trained yet)")
        if warning := "\n".join(filter(None, warnings)):
            metrics["warning"] = warning
        for callback in self.callbacks:
            if isinstance(callback, Monitor):
                callback.after_step(self, 0, metrics, clock)
        self.log(0, metrics, clock)

    def steps(self, numbers: range) -> None:
        """Run these steps, or fewer if a callback stops the run or goes back."""
        for step in numbers:
            for callback in self.callbacks:
                callback.before_step(self, step)
            metrics, clock = self.step(step, self.out)
            for callback in self.callbacks:
                callback.after_step(self, step, metrics, clock)
            if self.is_last(step) and self.stop_reason:
                metrics["stopped"] = self.stop_reason
            self.log(step, metrics, clock)
            if self.is_last(step) or self.gone_back:
                break

    def log(self, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        self.out.log(step, metrics, clock.seconds)
        for callback in self.callbacks:
            callback.after_log(self, step, metrics, clock.seconds)

    def step(self, number: int, out: RunDirectory) -> tuple[dict[str, Any], Clock]:
        """Run one step, from problems to updated weights; return its metrics and its timings."""
        clock, engine, method = Clock(), self.engine, self.method
        engine.begin(number)
        problems, places = self.problems(number)
        if self.policy.apart:  # before one process can be asked to stop, because all gather the weights
            self.policy.update_sampler()

        with (
            self.abortable(number, (Paused, UserError)),
            self.failing_together(),
            self.interrupts.abandonable(),
        ):
            with clock("sample"):
                groups = self.rollouts(number, problems, places)
                mismatch = self.policy.logprob_mismatch(groups)
            with clock("verify"):
                groups = engine.reward(method, groups, places)
            if failing := self.verifier.failing:
                raise UserError(f"{failing}; fix the verifier")
            with clock("measure"):
                metrics = StepMetrics(groups, places)
            for callback in self.callbacks:
                callback.after_reward(self, number, groups)
            with clock("guide"):
                guided = engine.guide(method, groups, places)
                observed = observe(method, guided, places)
        # Other processes would wait in the update for one that has run out of memory.
        alone = self.accelerator.num_processes == 1 and not self.policy.shards
        with clock("guide"):
            state = copy_state(state_of(method)) if alone else None
        with self.abortable(number, OutOfMemory, state) if alone else nullcontext():
            with clock("guide"):
                learn(method, observed)
            parts = self.parts(guided, places)
            if self.policy.sampler_differs and len(parts) > 1:
                with clock("update"):
                    parts = [(self.with_old_logp(groups), places) for groups, places in parts]
            for part in parts:
                with self.failing_together(), clock("guide"):
                    credited = engine.credit_places(method, *part)
                groups = [group for _, group in credited]
                for callback in self.callbacks:
                    callback.before_update(self, number, groups)
                with clock("update"):
                    outcomes = self.update(groups, logs_authors(number))
                metrics.add_update(credited, together(outcomes))
                self.watch_skips(number, groups, outcomes, out)

        engine.counts.update(engine.experts.take_counts())
        return metrics.result(engine) | mismatch, clock

    def with_old_logp(self, groups: Sequence[Group]) -> list[Group]:
        found: dict[int, Group] = {}
        for _, update, own in self.by_model(groups):
            found |= dict(zip(map(id, own), update.policy.with_old_logp(own), strict=True))
        return [found[id(group)] for group in groups]

    def update(self, groups: Sequence[Group], per_author: bool) -> dict[str, Outcome]:
        """Update each model by its groups, in every process, even in one without groups."""
        return {name: update(own, per_author) for name, update, own in self.by_model(groups)}

    def versions(self) -> list[int]:
        return [update.policy.version for update in self.updates.values()]

    def rollouts(self, step: int, problems: list[Problem], places: list[int]) -> list[Group]:
        if self.ahead:
            return self.ahead.rollouts(step)
        self.policy.update_sampler()  # in every process, because a sampler may serve all of them
        return self.engine.rollout(self.method, problems, places)

    def parts(
        self, guided: Sequence[list[Group]], places: Sequence[int]
    ) -> list[tuple[list[Group], list[int]]]:
        """Groups and their places for each of the step's updates, independent of the number of processes."""
        updates, problems = self.config.train.updates_per_step, self.config.train.problems_per_step
        out: list[tuple[list[Group], list[int]]] = [([], []) for _ in range(updates)]
        for groups, place in zip(guided, places, strict=True):
            part = out[place * updates // problems]
            part[0].extend(groups)
            part[1].extend([place] * len(groups))
        return out

    def watch_skips(
        self, step: int, groups: list[Group], outcomes: Mapping[str, Outcome], out: RunDirectory
    ) -> None:
        """Log the batch of a skipped update. Raises UserError after too many of one model in a row."""
        for name, update, own in self.by_model(groups):
            outcome = outcomes[name]
            if outcome.figures:
                self.skipped[name] = self.skipped[name] + 1 if outcome.skipped else 0
            if not outcome.skipped:
                continue
            if self.accelerator.is_main_process:
                out.skip(batch_rows(step, own, update.policy))
            if self.skipped[name] == self.config.train.max_skipped_updates:
                raise UserError(
                    f"no finite gradient in {self.skipped[name]} updates in a row, the last in step {step}; "
                    f"their batches are in {out.skipped}; {checkpoint.restart_advice(out.checkpoints)}"
                )

    @contextmanager
    def abortable(
        self,
        step: int,
        errors: type[Exception] | tuple[type[Exception], ...],
        state: State | None = None,
    ) -> Iterator[None]:
        """Enclose a part of a step: one of ``errors`` ends it with a checkpoint of the step before.

        ``state``: that of the method before the step, if this part may change it. Once an update may have
        changed the weights, the step before cannot be saved any more, and the error is raised as it is.
        """
        versions = self.versions()
        try:
            yield
        except errors as failed:
            if self.versions() != versions or self.policy.alone:
                raise
            for update in self.updates.values():
                update.optimizer.zero_grad()  # saving needs memory too
            Checkpoints.write(self, step - 1, state)
            raise type(failed)(
                f"{failed}; step {step - 1} is checkpointed, to go on with --resume"
            ) from failed
