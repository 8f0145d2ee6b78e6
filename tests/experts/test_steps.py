from __future__ import annotations

from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from handrail.data.config import PromptFormat
from handrail.experts.steps import Prefixes, split_steps
from handrail.methods.terms.step_tokens import number_steps
from handrail.models.renderer import Renderer
from handrail.types.trajectory import Author, Trajectory


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1 + 1 = 2 , 2 * 2 = 4 ; 4 - 1 = 3 # 4 3", ["1 + 1 = 2 , 2 * 2 = 4 ; ", "4 - 1 = 3 # 4 3"]),
        ("First.\n\nThen a\nb.\n\n\nDone.", ["First.\n\n", "Then a\nb.\n\n\n", "Done."]),
        ("He has 3.5.\nSo 4; not 5.\n#### 4\n", ["He has 3.5.\n", "So 4; not 5.\n", "#### 4\n"]),
        ("He has 3.5 kg. He eats 1. Left: 2.5.", ["He has 3.5 kg. ", "He eats 1. ", "Left: 2.5."]),
        ("\n\nFirst\n\nSecond\n\n", ["\n\nFirst\n\n", "Second\n\n"]),
        ("one step", ["one step"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_steps_end_at_the_coarsest_separator_in_the_solution(text: str, steps: list[str]) -> None:
    assert split_steps(text) == steps


def test_the_end_of_a_step_can_be_configured() -> None:
    assert split_steps("a -> b\n\nc -> d", r"-> ") == ["a -> ", "b\n\nc -> ", "d"]


@given(st.text(alphabet="ab1.;! \n\t", max_size=40), st.sampled_from([None, "x*", ";|", r"\s"]))
def test_joined_steps_give_the_solution_and_no_step_is_blank(text: str, end: str | None) -> None:
    steps = split_steps(text, end)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps)


END, PAD = 0, 1


def renderer(*words: str, bytewise: bool = True) -> Renderer:
    """Return a renderer whose tokens are an end token, padding, words, and all bytes.

    ``bytewise``: True for the bytes of GPT-2's tokenizers, False for Llama's, which begin words with a space.
    """
    bytes_ = pre_tokenizers.ByteLevel.alphabet() if bytewise else [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<end>", "<pad>", *words, *sorted(bytes_)]
    core = Tokenizer(
        models.BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=not bytewise)
    )
    if bytewise:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    else:
        spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    return Renderer(tokenizer, PromptFormat(), "test", len(names))


BYTES, WORDS = renderer(), renderer("▁a", "▁", "b", "\n", bytewise=False)


def counted(tokens: list[int], text: str, by: Renderer) -> int:
    """Count the tokens before the end of ``text`` by decoding every prefix as a whole."""
    lengths = range(len(tokens) + 1)
    count = bisect_right(lengths, len(text), key=lambda n: len(by.text(tokens[:n]))) - 1
    while not text.startswith(by.text(tokens[:count])):
        count -= 1
    return count


@settings(deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 257), max_size=40), st.integers(0, 60))
def test_tokens_of_a_prefix_are_those_of_whole_decodings(text: str, noise: list[int], place: int) -> None:
    """Tokens are bytes, so that most characters are cut somewhere; noise are bytes that make none."""
    tokens = BYTES.completion(text, end=False, plain=True)
    tokens[place:place] = noise
    prefixes, whole = Prefixes(tokens, BYTES), BYTES.text(tokens)
    for n in range(len(tokens) + 1):
        assert prefixes.text(n) == BYTES.text(tokens[:n])
    for length in range(len(whole) + 1):
        assert prefixes.count(whole[:length]) == counted(tokens, whole[:length], BYTES)


@settings(deadline=None)
@given(st.lists(st.integers(0, 261), max_size=80))
def test_prefixes_of_a_decoder_that_strips_the_first_space_and_makes_a_mark_of_each_byte(
    tokens: list[int],
) -> None:
    prefixes = Prefixes(tokens, WORDS)
    for n in range(len(tokens) + 1):
        assert prefixes.text(n) == WORDS.text(tokens[:n])


def test_steps_of_a_long_completion_are_found_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["x = " + "é1" * 12 for _ in range(200)]
    tokens = BYTES.completion("\n".join(lines), end=False)
    member = Trajectory.by(Author.POLICY, [2], tokens, BYTES.text(tokens))
    decoded, text = 0, BYTES.text

    def counting(part: list[int]) -> str:
        nonlocal decoded
        decoded += len(part)
        return text(part)

    monkeypatch.setattr(BYTES, "text", counting)
    steps, number = number_steps(member, BYTES, None)
    assert len(steps) == 200 and number.tolist() == [place // 41 for place in range(len(tokens))]
    assert decoded < 20 * len(tokens)  # whole prefixes would be about 1,400 times as many
