"""What engines inside another trainer share: the host's rows are problems, its graded rollouts are groups."""

from __future__ import annotations

import hashlib
import inspect
import tomllib
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, ClassVar

import torch

from handrail._util.errors import BadRow, UserError
from handrail._util.seeds import derive
from handrail.data.layouts import final_answer
from handrail.engines.local import LocalEngine
from handrail.experts.registry import Experts
from handrail.methods import build
from handrail.methods.base import Method, Term
from handrail.methods.method_and_terms import observers
from handrail.models.config import RolloutConfig
from handrail.models.policy import Policy, with_old_logp
from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from handrail.verifiers.pool import VerifierPool

COLUMNS = ("id", "prompt", "answer", "reference", "references", "plan")


class HostedEngine(LocalEngine):
    """LocalEngine for rollouts that a host has sampled and graded; they are not graded again."""

    host: ClassVar[str]
    advice: ClassVar[str]
    """What to do if the host writes another prompt than Handrail."""
    no_answers: ClassVar[str]
    """What grades without telling answers, and how the verifier does instead: the end of a sentence."""

    verifier: VerifierPool | None  # type: ignore[assignment]

    def __init__(
        self, policy: Policy, verifier: VerifierPool | None, experts: Experts, seed: int = 0
    ) -> None:
        """``verifier``: None if the host grades."""
        super().__init__(policy, verifier, experts, seed)  # type: ignore[arg-type]
        self.known: dict[tuple[int, int], tuple[Problem, Trajectory]] = {}
        """The host's rollouts of this step, with their problems, by the ids of both objects."""

    def begin(self, step: int, version: int | None = None) -> None:
        super().begin(step, version)
        self.known = {}

    def group(self, problem: Problem, members: Sequence[Trajectory]) -> Group:
        """Make a group of a problem's graded rollouts.

        Raises UserError if Handrail would write another prompt than the host did.
        """
        prompt = self.policy.renderer.prompt(problem)
        if any(member.prompt_ids != prompt for member in members):
            raise UserError(
                f"problem {problem.id}: {self.host} writes its prompt with other tokens than Handrail would "
                f"for references and hints; {self.advice}"
            )
        self.known |= {(id(problem), id(each)): (problem, each) for each in members}
        return Group(problem, list(members))

    def guide_step(
        self, method: Method[Any], groups: Sequence[Group], old_logp: bool
    ) -> list[tuple[int, Group]]:
        """Reward and guide the groups of a step, and let the method learn from them.

        Returns each guided group with the place of its problem. ``old_logp``: True to set ``old_logp`` too,
        because the step has several updates.
        """
        found = self.guide(method, self.reward(method, groups))
        places = [place for place, several in enumerate(found) for _ in several]
        guided = [group for several in found for group in several]
        for each in observers(method):
            each.learn([seen for group in guided if (seen := each.observe(group)) is not None])
        if old_logp:
            guided = with_old_logp(self.policy, guided)
        return list(zip(places, guided, strict=True))

    def verify(self, pairs: Sequence[tuple[Problem, Trajectory]], answers: bool = False) -> list[Trajectory]:
        fresh = [answers or (id(problem), id(member)) not in self.known for problem, member in pairs]
        todo = [pair for pair, new in zip(pairs, fresh, strict=True) if new]
        graded = iter(self.grade(todo, answers) if todo else [])
        return [next(graded) if new else member for (_, member), new in zip(pairs, fresh, strict=True)]

    def grade(self, pairs: Sequence[tuple[Problem, Trajectory]], answers: bool) -> list[Trajectory]:
        """Grade trajectories that are not the host's rollouts."""
        return super().verify(pairs, answers)

    def require_answers(self, terms: Sequence[Term]) -> None:
        """Raise UserError if one of these terms reads answers, and the host grades."""
        reading = [term.name or type(term).__name__ for term in terms if term.needs_answers]
        if reading and self.verifier is None:
            raise UserError(f"{reading[0]} reads the answers in completions, which {self.no_answers}")


def rollout(
    renderer: Renderer,
    prompt: list[int],
    tokens: Sequence[int],
    logp: Sequence[float | None] | None = None,
) -> Trajectory:
    """Make an ungraded rollout; ``logp`` are the sampler's log-probabilities, if it tells them."""
    ended = bool(tokens) and tokens[-1] in renderer.ends
    member = Trajectory.by(Author.POLICY, prompt, tokens, renderer.text(tokens), finished=ended)
    if logp is None:
        return member
    known = torch.tensor([nan if value is None else value for value in logp])
    return member.with_columns(sampling_logp=known)


def problem_of(row: Mapping[str, Any], renderer: Renderer) -> Problem:
    """Make a problem of a row of the dataset, with the whole row as metadata.

    Raises UserError if the row cannot be used.
    """
    given = row.get("references") or row.get("reference") or ()
    references = (given,) if isinstance(given, str) else tuple(given)
    answer = row.get("answer")
    if answer is None:
        try:
            answer = next(filter(None, map(final_answer, references)), "")
        except BadRow as error:
            raise UserError(
                f"the row with the prompt {row['prompt']!r:.60}, field reference: {error.what}; "
                f"{error.advice}, or give the row an answer"
            ) from error
    name = row.get("id")
    if name is None:
        name = derive(row["prompt"], answer)
    problem = Problem(str(name), row["prompt"], str(answer), references, row.get("plan"), dict(row))
    return renderer.clean_references(problem)


def build_method(
    method: str | Mapping[str, Any],
    terms: Sequence[str | Mapping[str, Any] | Term],
    group_size: int,
    max_tokens: int,
) -> Method[Any]:
    """Make a method for the host's groups.

    ``method``: a name, settings with a ``name``, or a TOML file with a section ``[method]``. ``terms``:
    names, settings and objects, added to those of the settings; objects come last. Raises UserError if there
    is no such file or section, and as ``handrail.methods.build``.
    """
    settings: dict[str, Any]
    if isinstance(method, str):
        settings = section_of(method) if method.endswith(".toml") else {"name": method}
    else:
        settings = dict(method)
    objects = [term for term in terms if isinstance(term, Term)]
    named = [
        {"name": term} if isinstance(term, str) else term for term in terms if not isinstance(term, Term)
    ]
    settings["terms"] = [*settings.get("terms", ()), *map(dict, named)]
    return build(settings, RolloutConfig(group_size=group_size, max_tokens=max_tokens), terms=objects)


def section_of(file: str) -> dict[str, Any]:
    """Read the section ``[method]`` of a configuration. Raises UserError if that fails."""
    try:
        tree = tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"method: {file} cannot be read ({error}); give a configuration in TOML") from error
    if not isinstance(tree.get("method"), dict):
        raise UserError(f"method: {file} has no section [method]; add one")
    return dict(tree["method"])


def checksum(function: Any) -> str:
    """Checksum of a function's source; empty for None."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12] if function else ""
