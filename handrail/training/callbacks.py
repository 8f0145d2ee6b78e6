"""Callbacks around each step: learning rate, stopping, evaluation, warnings, samples, checkpoints,
trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from handrail.methods.base import State
from handrail.methods.method_and_terms import state_of
from handrail.training import checkpoint
from handrail.training.diversity import diversity, measures
from handrail.training.evaluate import evaluate, figures, share_correct
from handrail.training.metrics import first_unverified
from handrail.training.monitor import CollapseMonitor
from handrail.training.resources import Clock
from handrail.training.run import Run
from handrail.training.samples import sample_rows
from handrail.training.stopping import StopCriteria
from handrail.types.trajectory import Group

Progress = Callable[[int, int, dict[str, Any], dict[str, float]], None]


class Callback:
    """Hooks that the loop calls in every process, in the order of the callbacks. Override those that you
    need.

    If the model is in shards (``train.fsdp``), let all processes call ``run.policy.score``, or none; only in
    ``after_reward`` and ``before_update`` may they do so differently often.

    ``run`` has the attributes ``config``, ``method``, ``policy``, ``engine``, ``optimizer``, ``accelerator``
    and ``directory``; ``run.stop(reason)`` ends the run after the current step, with a last evaluation and
    checkpoint.
    """

    def on_start(self, run: Run, step: int) -> None:
        """Called before the first step; ``step`` is 0, or the step that the run resumes from.

        Called again each time that AutoNPO goes back to an earlier checkpoint.
        """

    def before_step(self, run: Run, step: int) -> None:
        """Called before the step samples anything; ``step`` counts from 1."""

    def after_reward(self, run: Run, step: int, groups: Sequence[Group]) -> None:
        """Called with this process's groups of the step, sampled and graded, before ``guide``."""

    def before_update(self, run: Run, step: int, groups: Sequence[Group]) -> None:
        """Called before each update with this process's share of its groups, after credit."""

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        """Called before the step is logged.

        Entries added to ``metrics`` are logged; add the same in every process.
        """

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Called after the step is logged, with the ``seconds`` that each part took."""

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Called with the summary of the run, after the model is written."""


class LearningRate(Callback):
    """Set the optimizer's learning rate: warm-up, then a constant rate or a decay to 0."""

    def __init__(self, criteria: StopCriteria) -> None:
        self.criteria = criteria
        self.rate = 0.0

    def before_step(self, run: Run, step: int) -> None:
        self.rate = self.criteria.learning_rate(step)
        for update in run.updates.values():
            for group in update.optimizer.param_groups:
                group["lr"] = self.rate

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        metrics["learning_rate"] = self.rate


class Stop(Callback):
    """End the run when a budget is spent."""

    def __init__(self, criteria: StopCriteria) -> None:
        self.criteria = criteria

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        self.criteria.spend(metrics, clock.seconds)
        if self.criteria.spent:
            run.stop(self.criteria.spent)


class Evaluation(Callback):
    """Evaluate every held-out set before the first step, after the last one and every ``eval.every``
    steps."""

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        every = run.config.eval.every
        if run.is_last(step) or (every and step % every == 0):
            found = self.measure(run, step, clock)
            metrics.update({key: value for key, value in found.items() if key not in metrics})

    @staticmethod
    def measure(run: Run, step: int, clock: Clock) -> dict[str, Any]:
        """Return the accuracy on every set with its interval; per-problem accuracies go to
        evaluations.jsonl."""
        result: dict[str, Any] = {}
        samples = run.config.eval.samples
        if run.data.held_out:
            run.policy.update_sampler()  # in every process, even one without problems
        for name, problems in run.data.held_out.items():
            run.evaluator.begin(step)
            with clock("evaluate"):
                groups = evaluate(run.evaluator, run.accelerator, problems, samples, name)
            shares = {group.problem.id: share_correct(group) for group in groups}
            run.out.write_evaluation(step, name, shares)
            result = first_unverified(run.evaluator.unverified) | result
            result |= {f"eval/{name}/{key}": value for key, value in figures(groups).items()}
            if samples > 1:
                result |= {
                    f"eval/{name}/{key}": value
                    for key, value in diversity(list(map(measures, groups))).items()
                }
        return result


class Monitor(Callback):
    """Add a warning to the metrics if they show signs of collapse."""

    def __init__(self, before: Iterable[Mapping[str, Any]]) -> None:
        """``before``: the metrics of all previous steps."""
        self.said = CollapseMonitor(before)

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        if warning := self.said(metrics):
            metrics["warning"] = "\n".join(filter(None, [metrics.get("warning"), warning]))


class Samples(Callback):
    """Write the trajectories of every ``train.samples_every``-th step to samples.jsonl."""

    def before_update(self, run: Run, step: int, groups: Sequence[Group]) -> None:
        every = run.config.train.samples_every
        if every and run.accelerator.is_main_process and (step - 1) % every == 0:
            for _, update, own in run.by_model(groups):
                run.out.sample(sample_rows(step, own, run.method, update.policy))


class Labels(Callback):
    """Write the labels that terms changed in a step to labels.jsonl."""

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        if run.accelerator.is_main_process:
            run.out.label({"step": step, **row} for term in run.method.terms for row in term.changed_labels())


class Checkpoints(Callback):
    """Write a checkpoint every ``train.checkpoint_every`` steps and after the last one."""

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        every = run.config.train.checkpoint_every
        if step and every and (step % every == 0 or run.is_last(step)):
            self.write(run, step)

    @staticmethod
    def write(run: Run, step: int, state: State | None = None) -> None:
        """Write a checkpoint in the main process, after the shards of all, while the others wait.

        ``state``: that of the method and its terms after ``step``; by default the present one.
        """
        if step == run.checkpointed:
            return
        root = run.out.checkpoints
        if run.policy.shards:
            with run.failing_together():
                checkpoint.save_shard(root, step, run.updates)
        with run.failing_together(), run.policy.at_hand():
            if run.accelerator.is_main_process:
                run.out.sync()
                state = state or state_of(run.method)
                checkpoint.save(root, step, run.config.train, run.updates, state)
        run.checkpointed = step


class Report(Callback):
    """Call ``progress`` with every step's number, the expected last step, its metrics and its seconds by
    part."""

    def __init__(self, progress: Progress, criteria: StopCriteria) -> None:
        self.progress, self.criteria = progress, criteria

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        self.progress(step, self.criteria.last_step(step), metrics, seconds)


class Trackers(Callback):
    """Log every finite number to ``train.trackers`` (Weights & Biases, trackio, MLflow, ...) through
    Accelerate."""

    def on_start(self, run: Run, step: int) -> None:
        if run.accelerator.trackers:  # the run has gone back to an earlier checkpoint
            return
        config = run.config.model_dump(mode="json", exclude_none=True, exclude={"compare"})
        run.accelerator.init_trackers(run.config.train.tracker_project, config={"handrail": str(config)})

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        timed = {**metrics, **{f"seconds/{name}": value for name, value in seconds.items()}}
        numbers = {
            name: value
            for name, value in timed.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        run.accelerator.log(numbers, step=step)

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        run.accelerator.end_training()
