"""Compare the time of a training step with that of TRL's GRPOTrainer: ``python -m benchmarks.step_time``.

The two alternate in one process, with the same weights, prompts, group size, lengths, objective and
optimizer. The models are copies whose end token is never sampled, so every completion has the full length. A
problem determines whether its group is dead, so the share of dead groups is exact. Times are medians over the
rounds after the first. Peak memory is measured in a separate process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from handrail._util.interrupts import Interrupts
from handrail._util.memory import peak_resident
from handrail.data.load import load_problems
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.training.config import Config, parse_config
from handrail.training.loop import Loop
from handrail.training.run_directory import RunDirectory
from handrail.types.problem import Problem
from handrail.verifiers.pool import VerifierPool

Times = dict[str, float]
NEVER = "<|never|>"


def graded(text: str, dead: bool) -> float:
    """Reward 0 for every completion of a dead group; otherwise 0 or 1, at random."""
    return 0.0 if dead else float(zlib.crc32(text.encode()) % 2)


def reward(problem: Problem, completion: str) -> float:
    """The reward function for Handrail."""
    return graded(completion, problem.answer == "dead")


def rewards(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward function for TRL."""
    return [graded(text, each == "dead") for text, each in zip(completions, answer, strict=True)]


def endless(path: str, directory: Path) -> Path:
    """Copy a model and replace its end token by a new one with logit 0, so that it hardly ever ends a
    completion."""
    model, tokenizer = load_model(ModelConfig(path=path, device="cpu"))
    tokenizer.add_special_tokens({"eos_token": NEVER})
    tokenizer.chat_template = None  # the model's own end-of-turn token would end completions
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data[-1] = 0
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_problems(source: str, problems: int, dead: float, file: Path) -> Path:
    with file.open("w", encoding="utf-8") as stream:
        for place, problem in enumerate(load_problems(source)[:problems]):
            answer = "dead" if place < round(dead * problems) else "alive"
            references = {"reference": problem.references[0]} if problem.references else {}
            plan = {"plan": problem.plan} if problem.plan else {}
            stream.write(
                json.dumps(
                    {"prompt": problem.prompt, "answer": answer, "id": problem.id, **references, **plan}
                )
                + "\n"
            )
    return file


def configuration(
    model: Path, problems: Path, options: argparse.Namespace, method: str, group_size: int
) -> Config:
    ours = {
        "name": method,
        "loss_normalizer": "sequence",
        **({"entropy_bonus": 0.0} if method == "luffy" else {}),
    }
    return parse_config({
        "model": {"path": str(model), "device": options.device, "dtype": options.dtype},
        "data": {"train": str(problems)},
        "verifier": {"name": "benchmarks.step_time:reward"},
        "rollout": {"group_size": group_size, "max_tokens": options.tokens, "require_end": False},
        "method": ours,
        "train": {"problems_per_step": options.problems, "samples_every": 0,
        "micro_batch_tokens": options.micro_batch_tokens},
    })  # fmt: skip


class Handrail:
    """Steps of the real loop."""

    def __init__(self, config: Config, directory: Path, verifier: VerifierPool) -> None:
        self.run, self.number = Loop(config, None, verifier, Interrupts("stopping")), 0
        self.out = RunDirectory(directory, config, None)

    def step(self) -> Times:
        self.number += 1
        started = time.perf_counter()
        metrics, clock = self.run.step(self.number, self.out)
        whole = time.perf_counter() - started
        return {
            "sampling": clock.seconds["sample"],
            "update": clock.seconds["update"],
            "step": whole,
            "tokens": metrics["tokens/sampled"],
        }


def trl_trainer(model: Path, problems: Path, options: argparse.Namespace, directory: Path, steps: int) -> Any:
    """Make TRL's trainer with the same objective and the settings that it needs on a CPU."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    loaded, tokenizer = load_model(ModelConfig(path=str(model), device="cpu"))
    arguments = GRPOConfig(
        output_dir=str(directory), use_cpu=options.device == "cpu", bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=options.problems * options.group_size, num_generations=options.group_size,
        max_completion_length=options.tokens, loss_type="grpo", learning_rate=1e-6, max_grad_norm=1.0,
        max_steps=steps,
        logging_strategy="no", save_strategy="no", disable_tqdm=True, weight_decay=0.01,
        lr_scheduler_type="constant",
    )  # fmt: skip
    columns = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
    return GRPOTrainer(
        loaded, reward_funcs=rewards, args=arguments, train_dataset=columns, processing_class=tokenizer
    )


def trl_steps(trainer: Any, before_each: Callable[[], None], after_each: Callable[[Times], None]) -> None:
    """Train; call ``before_each`` step and ``after_each`` with its times."""
    from transformers import PrinterCallback, TrainerCallback

    sampling: list[float] = []
    generate = trainer._generate_single_turn

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        out = generate(*arguments, **named)
        sampling.append(time.perf_counter() - started)
        return out

    class Alternate(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            before_each()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            whole = time.perf_counter() - self.started
            tokens = (
                trainer._metrics["train"]["completions/mean_length"][-1]
                * trainer.args.per_device_train_batch_size
            )
            after_each(
                {"sampling": sampling[-1], "update": whole - sampling[-1], "step": whole, "tokens": tokens}
            )

    trainer._generate_single_turn = timed
    trainer.add_callback(Alternate())
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def alternating(model: Path, problems: Path, options: argparse.Namespace, root: Path) -> dict[str, Times]:
    """Return the medians of both, and of our other methods with the same number of sampled tokens."""
    found: dict[str, list[Times]] = defaultdict(list)
    with VerifierPool(configuration(model, problems, options, "grpo", 1).verifier) as verifier:
        sizes = {"grpo": options.group_size, "luffy": options.group_size + 1, "sort": options.group_size}
        ours = {
            name: Handrail(configuration(model, problems, options, name, size), root / name, verifier)
            for name, size in sizes.items()
            if name in options.methods.split(",")
        }
        trainer = trl_trainer(model, problems, options, root / "trl", options.rounds + 1)

        def others() -> None:
            for name, each in ours.items():
                found[name].append(each.step())

        trl_steps(trainer, others, found["TRL"].append)
    return {
        name: {key: median(each[key] for each in rounds[1:]) for key in rounds[0]}
        for name, rounds in found.items()
    }


def peak_memory(who: str, model: Path, problems: Path, options: argparse.Namespace, root: Path) -> None:
    """Run two steps of one of them in this process and print its peak memory."""
    if who == "TRL":
        trl_steps(trl_trainer(model, problems, options, root / "trl", 2), lambda: None, lambda times: None)
    else:
        with VerifierPool(configuration(model, problems, options, who, 1).verifier) as verifier:
            ours = Handrail(
                configuration(model, problems, options, who, options.group_size), root / "memory", verifier
            )
            ours.step()
            ours.step()
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    print(f"peak {torch.cuda.max_memory_allocated() if on_gpu else peak_resident()}")


def measured_apart(who: str, arguments: list[str]) -> float:
    """Peak memory in bytes, from a separate process."""
    command = [sys.executable, "-m", "benchmarks.step_time", *arguments, "--memory-of", who]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.rsplit("peak ", 1)[1])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:house-tiny")
    parser.add_argument("--data", default="task:house-rules?level=hard&n=64&seed=1")
    parser.add_argument("--problems", type=int, default=8, help="groups a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="length of every completion")
    parser.add_argument("--dead", default="0,0.5,0.9", help="shares of groups without any reward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", default="grpo,luffy,sort")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = endless(options.model, root / "model")
        shares = [float(share) for share in options.dead.split(",")]
        for share in shares:
            problems = write_problems(options.data, options.problems, share, root / "problems.jsonl")
            if options.memory_of:
                return peak_memory(options.memory_of, model, problems, options, root / f"memory-{share}")
            times = alternating(model, problems, options, root / f"{share}")
            print(
                f"\n{options.model}, {options.problems} × {options.group_size} completions, {share:.0%} of "
                "groups dead"
            )
            print_table(times)
        peaks = {who: measured_apart(who, [*arguments, "--dead", str(shares[0])]) for who in ("TRL", "grpo")}
        print(
            "\npeak memory of the process, or of the GPU: "
            + ", ".join(f"{who} {peak / 2**20:.0f} MiB" for who, peak in peaks.items())
        )
        print(f"{peaks['grpo'] / peaks['TRL']:.2f} of TRL's")


def print_table(times: dict[str, Times]) -> None:
    print(f"{'':8}{'sampling':>10}{'update':>10}{'step':>10}{'tokens':>8}{'of TRL':>9}{'of grpo':>9}")
    for name, each in times.items():
        against = [
            f"{each['step'] / times[other]['step']:.2f}" if other in times else ""
            for other in ("TRL", "grpo")
        ]
        cells = [f"{each[key]:.3f} s" for key in ("sampling", "update", "step")]
        print(
            f"{name:8}"
            + "".join(f"{cell:>10}" for cell in cells)
            + f"{each['tokens']:8.0f}{against[0]:>9}{against[1]:>9}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
