"""AutoNPO's rollback: on a plateau, go back to an earlier checkpoint with the answers found since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object

from handrail._util.errors import UserError
from handrail._util.files import remove_directory, write_whole
from handrail._util.processes import dealt_back
from handrail._util.seeds import derive
from handrail.data.answers import read_answers, right, write_answers
from handrail.methods.autonpo import AutoNpo
from handrail.methods.grpo import Grpo
from handrail.training import checkpoint
from handrail.training.callbacks import Callback, Checkpoints
from handrail.training.config import Config
from handrail.training.evaluate import share_correct
from handrail.training.metrics import tokens_sampled, training_seconds
from handrail.training.resources import Clock
from handrail.training.run import Run
from handrail.training.run_directory import RunDirectory, append
from handrail.types.trajectory import Group, Trajectory


class Rollback(Callback):
    """Watch for a plateau; then probe the recent mistakes and choose the checkpoint to go back to.

    What it decided is in ``rollbacks.jsonl``: ``from`` and ``to`` are steps, ``to`` is null if the run stayed
    where it was, and ``step`` is the one that the run went on from. The answers are in ``answers-N.jsonl``,
    and the metrics of the steps that were given up in ``branches/N/``. A run that is killed while it decides
    makes the same decision again.
    """

    def __init__(self, method: AutoNpo, config: Config) -> None:
        """Raises UserError if the run keeps no checkpoint to go back to, or cannot see a plateau."""
        if config.sampler.name == "vllm":
            raise UserError(
                "method autonpo finds a plateau by the entropy of the rollouts, which vLLM does not tell; "
                'set sampler.name = "transformers"'
            )
        if not config.train.checkpoint_every or config.train.keep_last < 2:
            raise UserError(
                "method autonpo goes back to earlier checkpoints, of which the run keeps too few; set "
                "train.checkpoint_every, and train.keep_last to at least 2"
            )
        self.method = method
        self.failed: dict[int, list[str]] = {}
        """Problems whose rollouts were all wrong, by step, over all processes."""
        self.wrong: list[str] = []
        """Those of this process in the present step."""

    def on_start(self, run: Run, step: int) -> None:
        files = [run.out.metrics, run.out.mistakes, run.out.rollbacks]
        rows, mistakes, self.decided = run.broadcast([run.out.read(file) for file in files])
        self.steps = rows[1:]
        self.failed = {row["step"]: row["problems"] for row in mistakes}
        self.method.until = self.decided[-1]["from"] if self.decided else 0
        self.seconds = run.broadcast(self.seconds_given_up(run.out))
        if self.decided and (file := self.decided[-1]["answers"]):
            self.method.answers = read_answers(str(run.directory / file), "method.answers")
        if step and self.on_plateau(run, step):  # killed while it decided
            self.decide(run, step)

    def after_reward(self, run: Run, step: int, groups: Sequence[Group]) -> None:
        wrong = [
            group.problem.id
            for group in groups
            if group.rollouts and all(member.correct is False for member in group.rollouts)
        ]
        self.wrong = wrong

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        self.failed[step] = gather_object(self.wrong)
        if self.decided and step == self.decided[-1]["step"] + 1:  # what was given up was not free
            spent = metrics.get("tokens/resampled", 0) + self.decided[-1]["tokens"]
            metrics["tokens/resampled"] = spent
            clock.seconds["given_up"] = self.seconds
        self.steps.append(metrics)
        if run.accelerator.is_main_process and self.failed.get(step):
            append(run.out.mistakes, {"step": step, "problems": self.failed[step]})

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        if self.on_plateau(run, step) and not run.is_last(step):
            self.decide(run, step)

    def on_plateau(self, run: Run, step: int) -> bool:
        until = self.method.until
        went_back = sum(row["to"] is not None for row in self.decided)
        if step <= until or went_back >= self.method.settings.most:
            return False
        return self.method.on_plateau(self.steps[until:])

    def decide(self, run: Run, step: int) -> None:
        """Probe the mistakes, and go back or stay."""
        Checkpoints.write(run, step)
        groups = self.probe(run, step)
        members = [member for group in groups for member in group.rollouts]
        earlier = {
            step - checkpoint.step_of(path): path
            for path in checkpoint.checkpoints(run.out.checkpoints)
            if 0 < step - checkpoint.step_of(path) <= self.method.settings.farthest
        }
        solved = {delta: self.solved(groups, step - delta) for delta in earlier}
        divergence = self.divergence(run, members, earlier, run.out.checkpoints / f"step-{step:06d}")
        delta = self.method.best(solved, divergence)
        given_up = self.steps[step - delta :] if delta else []
        tokens = sum(map(tokens_sampled, given_up)) + sum(map(len, members))
        row: dict[str, Any] = {
            "from": step,
            "to": step - delta if delta else None,
            "answers": None,
            "tokens": tokens,
        }
        row |= {"step": step - (delta or 0), "solved": solved, "divergence": divergence}
        if run.accelerator.is_main_process:
            self.write(run, row, groups)
        run.accelerator.wait_for_everyone()
        if delta:
            run.gone_back = True
        else:
            self.decided.append(row)
            self.method.until = step

    def seconds_given_up(self, out: RunDirectory) -> float:
        """What the steps took that the last decision gave up."""
        if not self.decided or self.decided[-1]["to"] is None:
            return 0.0
        timings = out.read(out.path / "branches" / str(len(self.decided)) / "timings.jsonl")
        return sum(training_seconds(row) for row in timings if row["step"] > self.decided[-1]["to"])

    def probe(self, run: Run, step: int) -> list[Group]:
        """Sample and grade problems that failed lately."""
        s = self.method.settings
        known = {problem.id: problem for problem in run.data.training}
        recent = {at: names for at, names in self.failed.items() if at > step - s.farthest}
        random = Random(derive("autonpo", run.config.train.seed, step))
        problems = [known[name] for name in spread(recent, random) if name in known][: s.probe_problems]
        places = run.shard(range(len(problems)))
        run.evaluator.begin(step)
        method = Grpo(group_size=s.probe_rollouts)
        run.policy.update_sampler()  # in every process, even one without problems
        sampled = run.evaluator.rollout(method, [problems[place] for place in places], places)
        mine = run.evaluator.reward(method, sampled, places)
        return dealt_back(gather_object([mine]))

    def solved(self, groups: Sequence[Group], since: int) -> float:
        """Q: mean share of right completions of the problems that failed after step ``since``."""
        failed = {name for at, names in self.failed.items() if at > since for name in names}
        shares = [share_correct(group) for group in groups if group.problem.id in failed]
        return fmean([share for share in shares if share is not None] or [0.0])

    @staticmethod
    def divergence(
        run: Run, members: Sequence[Trajectory], earlier: dict[int, Path], present: Path
    ) -> dict[int, float]:
        """KL(policy || checkpoint) per token, in nats, by Δ; the policy is left as it was."""

        def logps() -> torch.Tensor:
            prompts = [member.prompt_ids for member in members]
            return torch.cat(run.policy.score(prompts, [member.tokens for member in members]))

        if not members:
            return dict.fromkeys(earlier, 0.0)
        own, out = logps(), {}
        for delta, path in earlier.items():
            run.policy.load_state(path / "model")
            out[delta] = (own - logps()).mean().item()
        run.policy.load_state(present / "model")
        return out

    def write(self, run: Run, row: dict[str, Any], groups: Sequence[Group]) -> None:
        """Write the decision last, so that a run that is killed before makes it again."""
        directory, number = run.directory, len(self.decided) + 1
        if row["to"] is not None:
            lines = write_answers(right(group) for group in groups)
            row["answers"] = f"answers-{number}.jsonl"
            write_whole(directory / row["answers"], json.dumps({"step": row["from"]}) + "\n" + lines)
            branch = directory / "branches" / str(number)
            branch.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.out.metrics, branch)
            shutil.copy(run.out.timings, branch)
            for path in reversed(checkpoint.checkpoints(run.out.checkpoints)):
                if checkpoint.step_of(path) > row["to"]:
                    remove_directory(path)
        append(run.out.rollbacks, row)


def spread(failed: Mapping[int, Sequence[str]], random: Random) -> list[str]:
    """Order the problems that failed in each step so that every beginning has as many of each step as
    possible: first one of each step, the newest step first, then a second one."""
    by_step = [random.sample(sorted(names), len(names)) for _, names in sorted(failed.items(), reverse=True)]
    return list(dict.fromkeys(name for turn in zip_longest(*by_step) for name in turn if name is not None))
