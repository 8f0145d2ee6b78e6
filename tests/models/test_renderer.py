"""Prompts, references and graded text, with templates and tokenizers as they occur in practice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from handrail import Author, Context, Group, LocalEngine, Problem, Trajectory, UserError, train
from handrail.experts.judges import Scores
from handrail.methods import build
from handrail.models.hf import TransformersPolicy
from handrail.training.lengths import split_by_length
from handrail.training.policies import load_experts, load_policy, load_trainable_policy
from handrail.verifiers.pool import VerifierPool
from tests.conftest import Handrail, config
from tests.tiny_models import TEMPLATE, save_chat_model
from tests.training.test_loop import lines

THINKING = ("<think>", "</think>", "<answer>", "</answer>")
SOLUTION = "<think>two and three</think>\n<answer>5</answer>"
FORMAT = '''"""Pays for the format only."""
import re


def reward(problem, completion):
    return float(bool(re.fullmatch(r"<think>.*</think>\\s*<answer>.*</answer>", completion, re.S)))
'''
RUN = """
model = {path = "model", device = "cpu"}
data = {train = "d.jsonl"}
rollout = {max_tokens = 2}
train = {steps = 1}
"""
GENERATION = "{% if add_generation_prompt %}"


def policy(directory: Path, data: dict[str, Any] | None = None, **changes: Any) -> TransformersPolicy:
    return load_policy(
        config(model={"path": str(directory)}, data=data or {}, **changes), Accelerator(cpu=True)
    )


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> TransformersPolicy:
    return policy(save_chat_model(tmp_path_factory.mktemp("thinking"), special=THINKING))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> TransformersPolicy:
    """A model whose template opens the assistant's turn with <think>."""
    template = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
    return policy(save_chat_model(tmp_path_factory.mktemp("opened"), special=THINKING, template=template))


def problem(reference: str = SOLUTION, prompt: str = "what is two and three") -> Problem:
    return Problem("p", prompt, "5", (reference,), where="data.jsonl, line 3")


# Graded text


def test_equal_tokens_give_the_same_text_and_reward_for_any_author(
    thinking: TransformersPolicy, tmp_path: Path
) -> None:
    (tmp_path / "form.py").write_text(FORMAT)
    with VerifierPool(
        config(verifier={"name": f"{tmp_path / 'form.py'}:reward", "extract": None}).verifier
    ) as verifier:
        reference = Context(thinking.renderer, 64).reference(problem())
        assert (
            reference is not None
            and reference.text == SOLUTION
            and reference.author.tolist() == [Author.REFERENCE] * len(reference)
        )
        said = Trajectory.by(
            Author.POLICY, reference.prompt_ids, reference.tokens, thinking.renderer.text(reference.tokens)
        )
        graded = LocalEngine(thinking, verifier).verify([(problem(), reference), (problem(), said)])
    assert [(member.text, member.reward) for member in graded] == [(SOLUTION, 1.0)] * 2


def test_graded_text_ends_before_the_first_end_token(thinking: TransformersPolicy) -> None:
    tokens = thinking.renderer.completion(SOLUTION)
    assert (
        thinking.renderer.text([*tokens, *tokens]) == SOLUTION and thinking.renderer.text(tokens[-1:]) == ""
    )


def test_a_run_trains_on_grades_and_shows_special_tokens_in_references(
    tmp_path: Path,
) -> None:
    (tmp_path / "form.py").write_text(FORMAT)
    row = {"prompt": "what is two and three", "answer": "5", "reference": f"<|assistant|>{SOLUTION}<|end|>\n"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    changes: dict[str, Any] = {
        "model": {"path": str(save_chat_model(tmp_path / "model", special=THINKING))},
        "data": {"train": str(tmp_path / "data.jsonl")},
        "verifier": {"name": f"{tmp_path / 'form.py'}:reward", "extract": None},
        "method": {"name": "grpo+sft"},
        "rollout": {"max_tokens": 64, "group_size": 8},
        "train": {"steps": 1, "problems_per_step": 1},
    }
    train(config(**changes), tmp_path / "run")
    rows = lines(tmp_path / "run/samples.jsonl")
    (shown,) = [row for row in rows if row["role"] == "imitated"]
    assert (
        shown["text"] == SOLUTION
        and shown["tokens"].count("<|end|>") == 1
        and "<|assistant|>" not in shown["tokens"]
    )
    assert any(
        "<|" in row["text"] for row in rows if row["role"] == "trajectory"
    )  # a random model may write any token


def test_a_reference_continued_from_kept_steps_has_the_tokens_of_the_whole_text(
    thinking: TransformersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<think>1 + 1 = 2\n\n2 + 3 = 5\n\n</think>so five"
    asked, failed = problem(text), "<think>1 + 1 = 2\n\n2 + 3 = 6\n\nso six"
    rollout = Trajectory.by(
        Author.POLICY, thinking.renderer.prompt(asked), thinking.renderer.completion(failed), failed
    )
    rollout = replace(rollout, correct=False)
    method = build(
        {"name": "scope", "judge": "reference", "mode": "suffix"}, config(rollout={"max_tokens": 64}).rollout
    )
    with VerifierPool(config(verifier={"name": "exact", "extract": "so (five)"}).verifier) as verifier:
        engine = LocalEngine(policy(Path(thinking.config.path), rollout={"max_tokens": 64}), verifier)
        monkeypatch.setattr(engine.experts, "judge", lambda name, step_end: Second())
        ((group,),) = engine.guide(
            method, [Group(Problem("p", asked.prompt, "five", asked.references), [rollout])]
        )
    (repaired,) = group.trajectories
    assert repaired.text == text and repaired.tokens == thinking.renderer.completion(text)
    assert repaired.author.tolist() == sorted(repaired.author.tolist()) and set(repaired.author.tolist()) == {
        Author.POLICY,
        Author.REFERENCE,
    }


class Second:
    """A judge that finds the second step wrong."""

    def judge(self, attempts: Any) -> list[Scores | None]:
        return [[1.0, 0.0, *[None] * (len(steps) - 2)] for _, steps in attempts]


# References


def test_a_written_end_and_a_repeated_opening_are_removed(
    thinking: TransformersPolicy, opened: TransformersPolicy
) -> None:
    expected = thinking.renderer.completion(SOLUTION)
    for text in (
        SOLUTION,
        f"{SOLUTION}<|end|>",
        f"{SOLUTION}<|end|>\n<|end|> \n",
        f"<|assistant|>{SOLUTION}",
    ):
        assert thinking.renderer.reference(problem(text), text) == expected
    rest = "two and three</think>\n<answer>5</answer>"
    expected = opened.renderer.completion(rest)
    for text in (rest, f"<think>\n{rest}", f"<think>{rest}", f"<|assistant|>\n<think>\n{rest}<|end|>"):
        assert opened.renderer.reference(problem(text), text) == expected
    assert opened.renderer.text(expected) == rest  # what the prompt has opened is the prompt's


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("5<|end|><|user|>more<|end|>", "it contains the end token '<|end|>' and continues after it"),
        ("<|end|>", "it contains nothing but the beginning or the end of a turn"),
        (" <think>two", "it begins with <think>, which the chat template already writes"),
    ],
)
def test_a_reference_that_is_not_a_single_turn_is_refused(
    text: str, complaint: str, opened: TransformersPolicy
) -> None:
    with pytest.raises(
        UserError, match=f"data.jsonl, line 3, field reference: {complaint}".replace("|", r"\|")
    ):
        split_by_length(opened, [problem(text)])


def test_a_reference_that_repeats_a_text_prompt_is_refused(thinking: TransformersPolicy) -> None:
    bare = policy(Path(thinking.config.path), {"chat": False, "prompt_template": "Q: {prompt}\nA:"})
    assert bare.renderer.reference(problem("what is two and three? 5"), "what is two and three? 5")
    with pytest.raises(UserError, match="line 3, field reference: it begins with the whole prompt"):
        bare.renderer.reference(problem(), "Q: what is two and three\nA: 5")


# Prompts


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            TEMPLATE.replace("m['content']", "m['content'][0]['text'] + ''"),
            "cannot render messages of user and assistant .*'text'",
        ),
        (
            TEMPLATE.replace("m['content']", "m['content'] + 1"),
            "cannot render messages of user and assistant .*str",
        ),
        (
            "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('Only users end') }}{% endif %}"
            + TEMPLATE,
            "Only users end",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "leaves out what the assistant says",
        ),
    ],
)
def test_a_template_that_cannot_render_a_conversation_is_one_sentence(
    template: str, complaint: str, handrail: Handrail, tmp_path: Path
) -> None:
    save_chat_model(tmp_path / "model", template=template)
    (tmp_path / "d.jsonl").write_text('{"prompt": "what is two", "answer": "2"}\n')
    done = handrail("check", "d.jsonl", "--model", "model")
    assert done.code == 2
    with pytest.raises(UserError, match=f"model.path: the chat template of .*model .*{complaint}.*; fix it"):
        policy(tmp_path / "model")


def test_a_system_message_that_the_template_drops_or_refuses_is_named(tmp_path: Path) -> None:
    save_chat_model(
        tmp_path,
        template="{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + TEMPLATE,
    )
    assert policy(tmp_path).renderer.prompt(problem())
    with pytest.raises(UserError, match="leaves out what the system says"):
        policy(tmp_path, {"system": "Be brief."})
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    save_chat_model(tmp_path, template=refusing + TEMPLATE)
    with pytest.raises(
        UserError,
        match=r"messages of system and user and assistant \(No system\); fix it, or leave out data.system",
    ):
        policy(tmp_path, {"system": "Be brief."})


def test_a_prompt_that_ends_in_an_end_token_is_refused(tmp_path: Path) -> None:
    closed = policy(save_chat_model(tmp_path / "a", template=TEMPLATE.split(GENERATION)[0]))
    with pytest.raises(
        UserError, match=r"data.jsonl, line 3, field prompt: it ends in the end token '<\|end\|>'.*must open"
    ):
        split_by_length(closed, [problem()])
    spaced = policy(
        save_chat_model(tmp_path / "b", template=TEMPLATE.split(GENERATION)[0] + "\n\n"), {"system": "x"}
    )
    with pytest.raises(UserError, match="it ends in the end token"):
        spaced.renderer.prompt(problem())


def save_adding(directory: Path, around: str) -> Path:
    """Save a model whose tokenizer adds special tokens around a text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    save_chat_model(directory, special=["<s>"])
    file = str(directory / "tokenizer.json")
    core = Tokenizer.from_file(file)
    core.post_processor = TemplateProcessing(
        single=around, special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "<|end|>")]
    )
    core.save(file)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    return directory


def test_an_end_token_from_the_tokenizer_is_removed_and_one_in_the_data_is_refused(
    tmp_path: Path,
) -> None:
    adding = policy(save_adding(tmp_path, "<s> $A <|end|>"), {"chat": False})
    assert adding.tokenizer.decode(adding.renderer.prompt(problem())) == "<s>what is two and three"
    with pytest.raises(
        UserError, match=r"it ends in the end token '<\|end\|>', .*; leave it out of the prompt"
    ):
        adding.renderer.prompt(problem(prompt="what is two<|end|>"))


def test_two_start_tokens_are_refused(tmp_path: Path) -> None:
    adding = policy(save_adding(tmp_path, "<s> $A"), {"chat": False, "prompt_template": "<s>{prompt}"})
    with pytest.raises(UserError, match="line 3, field prompt: it begins with two start tokens '<s>'"):
        adding.renderer.prompt(problem())
    assert policy(tmp_path).renderer.reference(problem(), f"<s>{SOLUTION}") == policy(
        tmp_path
    ).renderer.completion(SOLUTION)


@pytest.mark.parametrize(
    ("field", "row"), [("prompt", ["what is <new>", "5"]), ("reference", ["what is two", "<new>"])]
)
def test_tokens_without_an_embedding_are_refused_by_check_and_train(
    field: str, row: list[str], handrail: Handrail, tmp_path: Path
) -> None:
    save_chat_model(tmp_path / "model")
    small = policy(tmp_path / "model").tokenizer
    small.add_tokens(["<new>"])
    small.save_pretrained(tmp_path / "model")
    rows = [["what is two", "5"], row]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": "5", "reference": r}) + "\n" for p, r in rows)
    )
    (tmp_path / "run.toml").write_text(RUN)
    for arguments in (
        ["check", "d.jsonl", "--model", "model", "--verifier", "normalized"],
        ["train", "run.toml"],
    ):
        done = handrail(*arguments)
        assert done.code == 2 and f"d.jsonl, line 2, field {field}: its token '<new>' has the id" in done.err


def test_unused_rows_of_an_embedding_are_accepted(tmp_path: Path) -> None:
    model = load_trainable_policy(
        config(model={"path": str(save_chat_model(tmp_path / "a"))}), Accelerator(cpu=True)
    )
    model.bare_model.resize_token_embeddings(400)
    model.save(tmp_path / "b")
    assert policy(tmp_path / "b").renderer.prompt(problem())


def test_a_prompt_of_mostly_unknown_words_is_refused(handrail: Handrail, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "what is two and three?", "answer": "5"}\n')
    done = handrail("check", "d.jsonl", "--model", "builtin:house-tiny")
    assert done.code == 2 and "d.jsonl, line 1, field prompt: 5 of its 5 tokens are '<unk>'" in done.err


# The template's arguments


ASKED = TEMPLATE.replace(
    "<|assistant|>{% endif", "<|assistant|>{% if enable_thinking is not false %}<think>{% endif %}{% endif"
)


def test_arguments_reach_the_template_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    save_chat_model(tmp_path, special=THINKING, template=ASKED)
    assert (
        policy(tmp_path)
        .tokenizer.decode(policy(tmp_path).renderer.prompt(problem()))
        .endswith("<|assistant|><think>")
    )
    quick = policy(tmp_path, {"chat_template_kwargs": {"enable_thinking": False}})
    assert quick.tokenizer.decode(quick.renderer.prompt(problem())).endswith("<|assistant|>")
    assert quick.renderer.reference(problem(), SOLUTION) == quick.renderer.completion(SOLUTION)
    with pytest.raises(
        UserError, match="chat_template_kwargs: .* has no 'enable_thinkin'; did you mean 'enable_thinking'"
    ):
        policy(tmp_path, {"chat_template_kwargs": {"enable_thinkin": False}})
    with pytest.raises(UserError, match="chat_template_kwargs is set, but .* without a chat template"):
        policy(tmp_path, {"chat": False, "chat_template_kwargs": {"enable_thinking": False}})


DATED = (
    "{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}<|system|>{{ day "
    "}}<|end|>" + TEMPLATE
)


def test_every_command_warns_of_a_template_that_writes_the_date(
    handrail: Handrail, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_chat_model(tmp_path / "model", template=DATED)
    (tmp_path / "d.jsonl").write_text('{"prompt": "what is two", "answer": "2"}\n')
    (tmp_path / "run.toml").write_text(RUN)
    for command in (
        "check d.jsonl --model model",
        "train run.toml",
        "eval model d.jsonl --set rollout.max_tokens=2",
    ):
        caplog.clear()
        handrail(*command.split())
        assert "the chat template of model writes today's date into prompts" in caplog.text, command
    caplog.clear()
    fixed = policy(tmp_path / "model", {"chat_template_kwargs": {"date_string": "1 Jan 2025"}})
    assert not caplog.text and "1 Jan 2025" in fixed.tokenizer.decode(fixed.renderer.prompt(problem()))


def test_a_teachers_template_does_not_need_the_policys_arguments_and_errors_name_its_setting(
    tmp_path: Path,
) -> None:
    save_chat_model(tmp_path / "broken", template="{{ messages[0]['content'][0]['text'] + 'x' }}")
    save_chat_model(tmp_path / "other")
    asked = config(
        data={"chat_template_kwargs": {"enable_thinking": False}},
        experts={"teacher": str(tmp_path / "broken")},
    )
    with pytest.raises(UserError, match="experts.teacher: the chat template of .*broken cannot render"):
        load_experts(asked, Accelerator(cpu=True)).corrector("model", True, 8, None)
    other = asked.model_copy(
        update={"experts": asked.experts.model_copy(update={"teacher": str(tmp_path / "other")})}
    )
    assert load_experts(other, Accelerator(cpu=True)).teacher.renderer.prompt(problem())
