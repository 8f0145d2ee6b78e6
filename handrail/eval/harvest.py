"""``handrail harvest``: sample problems from a checkpoint and keep what the verifier accepts, for NPO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.files import locked_file, text_of, writable, write_whole
from handrail._util.processes import accelerator
from handrail._util.progress import show
from handrail.data.answers import header, right, write_answers
from handrail.data.load import load_problems
from handrail.engines.local import LocalEngine
from handrail.methods.grpo import Grpo
from handrail.training.config import Config
from handrail.training.contents import code_digest, model_digest
from handrail.training.lengths import split_by_length
from handrail.training.policies import load_policy
from handrail.training.resuming import differences
from handrail.types.problem import digest
from handrail.verifiers.pool import VerifierPool


def harvest(
    config: Config,
    source: str,
    rollouts: int,
    keep: int,
    seed: int,
    limit: int | None,
    file: Path,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> tuple[int, int]:
    """Write at most ``keep`` right answers of ``rollouts`` to each problem of ``source`` to ``file``.

    The first line says how they were sampled; the same call goes on with a file that was left unfinished.
    Return the number of problems with an answer and of those that were sampled. Raises UserError if the file
    holds something else, if a problem is too long, or if the verifier fails.
    """
    problems = load_problems(source, config.data.columns)[:limit]
    what = {
        "model": config.model.path,
        "weights": model_digest(config.model.path),
        "verifier": [config.verifier.name, code_digest(config.verifier.name)],
        "source": source,
        "problems": digest(problems),
        "rollouts": rollouts,
        "keep": keep,
        "seed": seed,
        "temperature": config.rollout.temperature,
        "max_tokens": config.rollout.max_tokens,
    }
    with locked_file(writable(file)):
        done = _harvested(file, what)
        policy = load_policy(config, accelerator(config.model.device, config.model.dtype))
        problems, left_out = split_by_length(policy, problems, config.data.too_long, references=False)
        if left_out:
            show(f"{len(left_out)} problems are too long and are left out, first {left_out[0]}")
        method = Grpo(group_size=rollouts)
        size = max(1, config.rollout.batch_size // rollouts)
        done = done[: len(done) // size * size] if len(done) < len(problems) else done
        write_whole(file, json.dumps(what) + "\n" + "".join(done))
        with VerifierPool(config.verifier) as verifier, file.open("a", encoding="utf-8") as stream:
            engine = LocalEngine(policy, verifier, seed=seed, require_end=config.rollout.require_end)
            for start in range(len(done), len(problems), size):
                progress(start, len(problems))
                places = range(start, min(start + size, len(problems)))
                batch = [problems[place] for place in places]
                groups = engine.reward(method, engine.rollout(method, batch, places), places)
                if verifier.failing:
                    raise UserError(f"{verifier.failing}; fix the verifier")
                written = write_answers(right(group, keep) for group in groups)
                stream.write(written)
                stream.flush()
                done += written.splitlines()
    progress(len(problems), len(problems))
    return sum(bool(json.loads(line)["answers"]) for line in done), len(problems)


def _harvested(file: Path, what: dict[str, Any]) -> list[str]:
    """Return the whole lines of answers in ``file``.

    Raises UserError if it holds something else than answers that were harvested as ``what`` says.
    """
    advice = "choose another --output"
    lines = text_of(file, advice).splitlines(keepends=True) if file.exists() else []
    if not lines:
        return []
    there = header(lines)
    if there is None or not there.keys() & what.keys():
        raise UserError(f"{file} holds something else than a harvest; {advice}")
    if other := differences(there, what):
        raise UserError(f"{file} holds another harvest: {other}; {advice}")
    return [line for line in lines[1:] if line.endswith("\n")]
