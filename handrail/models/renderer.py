"""Conversion between text and tokens: prompts, references, and the text of completions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from handrail._util.errors import UserError
from handrail.data.config import PromptFormat
from handrail.types.problem import Problem

TAG = re.compile(r"<[^<>\s]+>")
DAYS = datetime(2001, 2, 3), datetime(2012, 11, 10)


class Renderer:
    """A tokenizer with its chat template, and checks for mistakes that would spoil a run silently.

    Holds no weights.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: PromptFormat,
        model: str,
        embeddings: int,
        ends: Iterable[int] = (),
        field: str = "",
    ) -> None:
        """``embeddings``: number of tokens with an embedding; ``ends``: end tokens of the generation_config.

        Raises UserError, naming ``field`` and ``model``, if the chat template cannot render a question and
        its answer.
        """
        self.tokenizer, self.data, self.model, self.embeddings = tokenizer, data, model, embeddings
        self.field = field or "model.path"
        self.chat = bool(tokenizer.chat_template) if data.chat is None else data.chat
        if self.chat and not tokenizer.chat_template:
            raise UserError(
                f"data.chat is on, but the tokenizer of {model} has no chat template; set data.chat = false"
            )
        if self.field == "model.path":  # other models, such as a teacher, may ignore unknown arguments
            self._check_arguments()
        self.end = self._turn_end() if self.chat else int(tokenizer.eos_token_id)
        self.ends = {self.end, int(tokenizer.eos_token_id), *ends}
        written = "|".join(re.escape(str(tokenizer.convert_ids_to_tokens(end))) for end in sorted(self.ends))
        self._written_end = re.compile(rf"(?:(?:{written})\s*)+\Z")

    @cached_property
    def vocabulary(self) -> int:
        """Number of ids that can be tokens: the largest id of a token, plus 1."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    # Prompts

    def prompt(self, problem: Problem, plan: str | None = None) -> list[int]:
        """Encode a problem's prompt, showing ``plan`` if given.

        Raises UserError if no completion could follow it.
        """
        where = f"{place(problem)}, field prompt"
        if self.chat or not isinstance(problem.prompt, str):
            refusal = f"{where}: the chat template refuses it: {{error}}"
            tokens = self._encode(
                self._render(self._messages(problem, plan), refusal, add_generation_prompt=True)
            )
        else:
            tokens = self._encode_start(self._text(problem.prompt, plan))
        self._check_prompt(tokens, where)
        return tokens

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain))

    def _encode_start(self, text: str) -> list[int]:
        """Encode a text prompt with the tokenizer's start tokens, but without an end token that it
        appends."""
        tokens = list(self.tokenizer.encode(text))
        if tokens and tokens[-1] in self.ends and self._encode(text)[-1:] != tokens[-1:]:
            tokens.pop()
        return tokens

    def _text(self, prompt: str, plan: str | None) -> str:
        text = self.data.prompt_template.replace("{prompt}", prompt)
        if plan is None:
            return text
        parts = {"{prompt}": text, "{plan}": plan}  # in one pass: either may contain the other's placeholder
        return re.sub(r"\{prompt\}|\{plan\}", lambda mark: parts[mark[0]], self.data.plan_template)

    def _messages(self, problem: Problem, plan: str | None) -> list[dict[str, str]]:
        if not self.chat:
            off = (
                "data.chat is off"
                if self.tokenizer.chat_template
                else f"{self.model} has no chat template; give it as text"
            )
            raise UserError(f"{place(problem)}, field prompt: it is chat messages, but {off}")
        prompt = problem.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages[-1] = {**messages[-1], "content": self._text(messages[-1]["content"], plan)}
        if self.data.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.data.system})
        return messages

    def _check_prompt(self, tokens: list[int], where: str) -> None:
        self._check_ids(tokens, where)
        bos, unknown = self.tokenizer.bos_token_id, self.tokenizer.unk_token_id
        if bos is not None and tokens[:2] == [bos, bos]:
            raise UserError(
                f"{where}: it begins with two start tokens {self.tokenizer.bos_token!r}; leave out the one "
                "in the data or in data.prompt_template"
            )
        last = next((token for token in reversed(tokens) if self.tokenizer.decode([token]).strip()), None)
        if last in self.ends:
            raise UserError(
                f"{where}: it ends in the end token {self.tokenizer.decode([last])!r}, so nothing should "
                "follow; "
                + (
                    "the chat template must open the assistant's turn"
                    if self.chat
                    else "leave it out of the prompt"
                )
            )
        if unknown is not None and 2 * tokens.count(unknown) > len(tokens):
            raise UserError(
                f"{where}: {tokens.count(unknown)} of its {len(tokens)} tokens are "
                f"{self.tokenizer.unk_token!r}, so {self.model} cannot read it; use a model that knows these "
                "words"
            )

    def _check_ids(self, tokens: Sequence[int], where: str) -> None:
        largest = max(tokens, default=0)
        if largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{where}: its token {token!r} has the id {largest}, but {self.model} has embeddings for "
                f"{self.embeddings} tokens only; use the model's own tokenizer, or enlarge its embeddings"
            )

    # Completions

    def completion(self, text: str, end: bool = True, plain: bool = False) -> list[int]:
        """Encode a completion, with the end token if ``end``; ``plain`` text cannot contain special
        tokens."""
        tokens = self._encode(text, plain)
        self._check_ids(tokens, "a completion")
        return [*tokens, self.end] if end else tokens

    def reference(self, problem: Problem, text: str) -> list[int]:
        """Encode a reference with the end token.

        Raises UserError if an end token occurs before its last token.
        """
        tokens = self._encode(self.clean(problem, text))
        self.check_reference(problem, tokens)
        return [*tokens, self.end]

    def check_reference(self, problem: Problem, tokens: Sequence[int]) -> None:
        """Raise UserError if a reference (without its end token) contains an end token or tokens unknown to
        the model."""
        where = f"{place(problem)}, field reference"
        self._check_ids(tokens, where)
        early = [token for token in tokens if token in self.ends]
        if early:
            raise UserError(
                f"{where}: it contains the end token {self.tokenizer.decode(early[:1])!r} and continues "
                "after it; give the assistant's last turn only"
            )

    def clean_references(self, problem: Problem) -> Problem:
        """Return the problem with all references cleaned. Raises UserError as ``clean``."""
        return replace(problem, references=tuple(self.clean(problem, text) for text in problem.references))

    def clean(self, problem: Problem, text: str) -> str:
        """Strip a trailing end token and the opening of the assistant's turn from a reference.

        Both would otherwise occur twice. Raises UserError if the reference repeats more of the prompt, or if
        nothing else is left.
        """
        where = f"{place(problem)}, field reference"
        text = self._written_end.sub("", text)
        text = text.removeprefix(
            next((opening for opening in self._openings if text.startswith(opening)), "")
        )
        tag = re.match(rf"\s*({TAG.pattern})", text)
        if tag and tag[1] in self._opening:
            raise UserError(
                f"{where}: it begins with {tag[1]}, which the chat template already writes; leave it out"
            )
        asked = self._text(problem.prompt, None) if isinstance(problem.prompt, str) and not self.chat else ""
        # Short prompts are exempt: a reference that starts with "2" does not repeat the prompt "2".
        if len(asked.split()) > 3 and text.startswith(asked):
            raise UserError(
                f"{where}: it begins with the whole prompt, which precedes it anyway; leave that out"
            )
        if not text.strip():
            raise UserError(
                f"{where}: it contains nothing but the beginning or the end of a turn; write the solution, "
                "or leave it out"
            )
        return text

    @cached_property
    def _opening(self) -> str:
        """Text with which the chat template opens the assistant's turn."""
        if not self.chat:
            return ""
        closed, opened = (self._trial("user", add_generation_prompt=opened) for opened in (False, True))
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    @cached_property
    def _openings(self) -> list[str]:
        """Openings that a reference may repeat, longest first: the assistant's opening from any of its tags
        on."""
        starts = {0, *(tag.start() for tag in TAG.finditer(self._opening))}
        found = [self._opening[start:] for start in starts] + [self.tokenizer.bos_token or ""]
        return sorted(
            {text for whole in found for text in (whole, whole.rstrip()) if text}, key=len, reverse=True
        )

    def text(self, tokens: Sequence[int]) -> str:
        """Decode a completion up to its first end token, for grading and display; keeps other special
        tokens."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        pad = self.tokenizer.pad_token_id  # looked up once, because every look-up takes microseconds
        kept = [token for token in tokens[:end] if token != pad]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    # The chat template

    def _render(self, messages: list[dict[str, str]], refusal: str, **how: Any) -> str:
        """Render a conversation.

        Raises UserError with the message ``refusal``, whose ``{error}`` is the template's.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, **how, **self.data.chat_template_kwargs
                )
            )
        except Exception as error:  # a template is a program and can raise anything
            raise UserError(
                refusal.replace("{error}", " ".join(str(error).split()) or repr(error))
            ) from error

    def _trial(self, *roles: str, **how: Any) -> str:
        """Render a test conversation in which each role states its name."""
        advice = "leave out data.system" if "system" in roles else "set data.chat = false"
        refusal = (
            f"{self.field}: the chat template of {self.model} cannot render messages of "
            f"{' and '.join(roles)} ({{error}}); fix it, or {advice}"
        )
        messages = [{"role": role, "content": f"I am the {role}."} for role in roles]
        return self._render(messages, refusal, **how)

    def _turn_end(self) -> int:
        """Special token that the chat template writes after the assistant's message; may not be the
        tokenizer's EOS."""
        roles = ["user", "assistant"] if self.data.system is None else ["system", "user", "assistant"]
        text = self._trial(*roles)
        lost = [role for role in roles if f"I am the {role}." not in text]
        if lost:
            raise UserError(
                f"{self.field}: the chat template of {self.model} leaves out what the {lost[0]} says; fix it"
            )
        behind = text.rpartition("I am the assistant.")[2]
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        return next(
            (token for token in self._encode(behind) if token in special), int(self.tokenizer.eos_token_id)
        )

    def _check_arguments(self) -> None:
        arguments = self.data.chat_template_kwargs
        if arguments and not self.chat:
            raise UserError(
                f"data.chat_template_kwargs is set, but {self.model} is prompted without a chat template; "
                "leave it out"
            )
        template = str(self.tokenizer.get_chat_template()) if arguments else ""
        for name in arguments:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                near = difflib.get_close_matches(name, set(re.findall(r"[a-z]\w*_\w+", template)), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(
                    f"data.chat_template_kwargs: the chat template of {self.model} has no {name!r}{hint}"
                )

    @cached_property
    def warning(self) -> str | None:
        """Warning if the chat template writes the date into prompts, so that a run differs from day to
        day."""
        if not self.chat:
            return None
        first, second = (
            self._trial("user", add_generation_prompt=True, strftime_now=day.strftime) for day in DAYS
        )
        if first == second:
            return None
        return (
            f"the chat template of {self.model} writes today's date into prompts, so the same run gives "
            "other numbers on another day; fix the date in data.chat_template_kwargs if the template takes "
            "one (as date_string), or else in the template"
        )


def place(problem: Problem) -> str:
    return problem.where or f"problem {problem.id}"
