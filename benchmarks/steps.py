"""CPU seconds for finding the tokens of each step of a completion: ``python -m benchmarks.steps``."""

from __future__ import annotations

import time

from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from handrail.data.config import PromptFormat
from handrail.methods.terms.step_tokens import number_steps
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Trajectory

TOKENS, STEPS, ROUNDS = 8192, 200, 3


def renderer() -> Renderer:
    """Return a renderer whose tokens are bytes."""
    names = ["<end>", *sorted(ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    return Renderer(words, PromptFormat(), "bytes", len(names))


def main() -> None:
    by_bytes = renderer()
    lines = ["x = " + "é1" * 12 for _ in range(STEPS)]  # with the break, 41 tokens each
    tokens = by_bytes.completion("\n".join(lines), end=False)[:TOKENS]
    member = Trajectory.by(Author.POLICY, [1], tokens, by_bytes.text(tokens))
    best = min(seconds(member, by_bytes) for _ in range(ROUNDS))
    steps, _ = number_steps(member, by_bytes, None)
    print(f"{best:.3f} s, the best of {ROUNDS} rounds, for {len(tokens)} tokens in {len(steps)} steps")


def seconds(member: Trajectory, by_bytes: Renderer) -> float:
    started = time.process_time()
    number_steps(member, by_bytes, None)
    return time.process_time() - started


if __name__ == "__main__":
    main()
