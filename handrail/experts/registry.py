"""Registry of experts: step judges, correctors and planners, loaded on first use.

Your own can be anywhere: ``my_file.py:MyJudge``, a class without constructor arguments that implements its
protocol's only method.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from handrail._util.errors import Paused, UserError
from handrail._util.imports import load_attribute
from handrail._util.seeds import derive
from handrail.experts.config import EndpointConfig, ExpertsConfig, Role
from handrail.experts.correctors import Correction, Corrector, PolicyCorrector, ReferenceCorrector
from handrail.experts.judges import StepJudge
from handrail.experts.judges.reference import ReferenceJudge
from handrail.experts.planners import DataPlanner, Planner, PolicyPlanner, leaks
from handrail.experts.questions import CorrectionQuestion, JudgeQuestion, PlanQuestion
from handrail.models.policy import Policy
from handrail.types.problem import Problem

if TYPE_CHECKING:
    from handrail.experts.endpoint import Endpoint
    from handrail.models.renderer import Renderer

BUILT_IN: dict[Role, tuple[str, ...]] = {
    "judge": ("arithmetic", "reference", "prm", "llm"),
    "corrector": ("reference", "policy", "model", "endpoint"),
    "planner": ("auto", "column", "rule", "outline", "policy", "endpoint"),
}
VERBS: dict[Role, str] = {"judge": "judge", "corrector": "correct", "planner": "plans"}
RENAMED = {"rule": "arithmetic"}
"""Old names of judges, for error messages."""


class Experts:
    """Experts of one run.

    Every method raises UserError if the configuration lacks something that an expert needs.
    """

    def __init__(
        self,
        config: ExpertsConfig | None = None,
        endpoint: EndpointConfig | None = None,
        load: Callable[[str, str], Policy] | None = None,
        policy: Policy | None = None,
        device: torch.device | None = None,
        dtype: str = "float32",
    ) -> None:
        """``load(path, setting)`` loads a model as a policy; its errors name the setting. ``policy``: the one
        in training. ``dtype``: number type of the process reward model.

        Without ``policy``, experts that need it call ``load`` with the path "", which is the configured
        model.
        """
        self.config, self.server, self.load, self.trained = config or ExpertsConfig(), endpoint, load, policy
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.problems: Sequence[Problem] = ()
        """Training problems, for the ablation that takes another problem's plan."""
        self.counts: Counter[str] = Counter()

    def check(self, role: Role, name: str, setting: str) -> None:
        """Raise UserError, naming ``setting``, if the expert cannot be loaded."""
        if ":" not in name and name not in BUILT_IN[role]:
            new = RENAMED.get(name) if role == "judge" else None
            near = [new] if new else difflib.get_close_matches(name, BUILT_IN[role], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(BUILT_IN[role])}"
            raise UserError(f"{setting}: there is no {role} {name!r}; {hint}")
        match role:
            case "judge":
                self.judge(name)
            case "corrector":
                self.corrector(name, True, 1, None)
            case "planner":
                planner = self.planner(name, 1)
                if isinstance(planner, PolicyPlanner):
                    planner.check(setting)

    def answer(self, name: str, questions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        """Ask the expert ``name`` questions of one kind; ``seeds`` are for experts that sample.

        Raises UserError if a user's own expert fails.
        """
        role, answers = role_of(questions[0]), self._answers(name, questions, seeds)
        for question, answer in zip(questions, answers, strict=True):
            if complaint := misshapen(question, answer):
                raise UserError(f"the {role} {name} {complaint}")
        self.counts[f"{role}/asked"] += len(questions)
        self.counts[f"{role}/no_answer"] += sum(answer is None for answer in answers)
        return answers

    def _answers(self, name: str, questions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        try:
            return self._unchecked_answers(name, questions, seeds)
        except (UserError, Paused):
            raise
        except Exception as error:
            if ":" not in name:
                raise
            what = f"the {role_of(questions[0])} {name} fails"
            raise UserError(f"{what}: {type(error).__name__}: {error}") from error

    def _unchecked_answers(self, name: str, questions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        out: list[Any] = [None] * len(questions)
        for places in by_options(questions).values():
            asked, own = [questions[place] for place in places], [seeds[place] for place in places]
            first = asked[0]
            if isinstance(first, JudgeQuestion):
                answers: list[Any] = list(
                    self.judge(name, first.step_end).judge([(q.problem, q.steps) for q in asked])
                )
            elif isinstance(first, CorrectionQuestion):
                corrector = self.corrector(name, first.shown, first.max_tokens, first.step_end)
                answers = list(corrector.correct([q.draft for q in asked], first.whole, first.attempt, own))
            else:
                answers = self._plans(name, asked, own)
            if len(answers) != len(asked):
                raise UserError(
                    f"{name} gives {len(answers)} answers to {len(asked)} questions; return one for each"
                )
            for place, answer in zip(places, answers, strict=True):
                out[place] = answer
        return out

    def _plans(self, name: str, questions: Sequence[PlanQuestion], seeds: Sequence[int]) -> list[Any]:
        """Make plans that leak no values, or their replacements in an ablation."""
        if questions[0].ablation == "solution":
            return [question.reference for question in questions]
        pairs = [(question.problem, question.reference) for question in questions]
        if questions[0].ablation == "shuffled-plan":
            pairs = [(other, other.references[0]) for other in map(self._other, questions)]
        plans = list(self.planner(name, questions[0].max_tokens).plans(pairs, seeds))
        for place, ((problem, _), plan) in enumerate(zip(pairs, plans, strict=False)):
            if isinstance(plan, str) and leaks(plan, problem):
                self.counts.update({"planner/leaking": 1, "planner/no_answer": -1})
                plans[place] = None
        return plans

    def _other(self, question: PlanQuestion) -> Problem:
        """Another training problem: the same one whatever else is asked, in any number of processes."""
        if len(self._ring) < 2:
            raise UserError("there is no other training problem with a reference whose plan could be taken")
        after = bisect_right(self._ring, ring_order(question.problem), key=ring_order)
        return self._ring[after % len(self._ring)]

    @cached_property
    def _ring(self) -> list[Problem]:
        """One training problem with a reference for each id, in an order that depends on their ids alone."""
        by_id = {problem.id: problem for problem in self.problems if problem.references}
        return sorted(by_id.values(), key=ring_order)

    def judge(self, name: str, step_end: str | None = None) -> StepJudge:
        match name:
            case "reference":
                return ReferenceJudge(step_end)
            case "arithmetic":
                from handrail.experts.judges.arithmetic import ArithmeticJudge

                return ArithmeticJudge()
            case "prm":
                return self._prm
            case "llm":
                from handrail.experts.judges.llm import LlmJudge

                return LlmJudge(self.endpoint, self.endpoint.config.answer_tokens)
            case _:
                return cast(StepJudge, self._load_own("judge", name))

    def corrector(self, name: str, shown: bool, max_tokens: int, step_end: str | None) -> Corrector:
        """``shown``: True if the corrector sees the reference; "reference" and "policy" always do."""
        match name:
            case "reference":
                return ReferenceCorrector(step_end)
            case "policy":
                return PolicyCorrector(self.policy, True, max_tokens, step_end, self.counts)
            case "model":
                return PolicyCorrector(self.teacher, shown, max_tokens, step_end, self.counts)
            case "endpoint":
                from handrail.experts.correctors.llm import EndpointCorrector

                return EndpointCorrector(self.endpoint, shown, step_end, self.endpoint.config.answer_tokens)
            case _:
                return cast(Corrector, self._load_own("corrector", name))

    def planner(self, name: str, max_tokens: int) -> Planner:
        match name:
            case "policy":
                return PolicyPlanner(self.policy, max_tokens, self.counts)
            case "endpoint":
                from handrail.experts.planners.llm import EndpointPlanner

                return EndpointPlanner(self.endpoint, self.endpoint.config.answer_tokens)
            case "auto" | "column" | "rule" | "outline":
                return DataPlanner(name)
            case _:
                return cast(Planner, self._load_own("planner", name))

    def _load_own(self, role: Role, name: str) -> Any:
        """Return a user's own expert, instantiated once."""
        if name not in self._opened:
            made = load_attribute(name, role)
            try:
                self._opened[name] = made() if isinstance(made, type) else made
            except Exception as error:
                raise UserError(
                    f"{role}: {name} cannot be made without arguments: {type(error).__name__}: {error}"
                ) from error
        if not callable(getattr(self._opened[name], VERBS[role], None)):
            raise UserError(f"{role}: {name} has no method {VERBS[role]}, which every {role} needs")
        return self._opened[name]

    @cached_property
    def _opened(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _prm(self) -> StepJudge:
        if not self.config.prm:
            raise UserError('the step judge "prm" needs experts.prm, a process reward model\'s directory')
        from handrail.experts.judges.prm import PrmJudge

        return PrmJudge(self.config.prm, self.device, self.dtype)

    @cached_property
    def policy(self) -> Policy:
        return self.trained or self._load("", "model.path")

    @cached_property
    def teacher(self) -> Policy:
        if not self.config.teacher:
            raise UserError(
                'the corrector "model" needs experts.teacher, a causal language model\'s directory or name'
            )
        return self._load(self.config.teacher, "experts.teacher")

    def white_box(self, policy: Policy) -> Policy:
        """The teacher as a model whose probabilities are read.

        Raises UserError if none is set, or if its tokens are not those of ``policy``.
        """
        if not self.config.teacher:
            raise UserError(
                "what reads a teacher's probabilities needs experts.teacher, a local causal language model "
                "with the policy's tokenizer"
            )
        if id(self.teacher) not in self._compared:
            require_same_tokens(
                policy.renderer, self.teacher.renderer, f"experts.teacher: {self.config.teacher}"
            )
            self._compared.add(id(self.teacher))
        return self.teacher

    @cached_property
    def _compared(self) -> set[int]:
        return set()

    def _load(self, path: str, field: str) -> Policy:
        if self.load is None:
            raise UserError(f"{field}: this expert asks a model, and nothing here can load one")
        return self.load(path, field)

    @cached_property
    def endpoint(self) -> Endpoint:
        if self.server is None:
            raise UserError("an expert that asks a server needs a section [endpoint] with base_url and model")
        from handrail.experts.endpoint import Endpoint  # the client takes a second to import

        return Endpoint(self.server)

    def take_counts(self) -> Counter[str]:
        """Return the counts since the last call, including the endpoint's."""
        counts, self.counts = self.counts, Counter()
        return counts + (self.endpoint.take_counts() if "endpoint" in self.__dict__ else Counter())


def role_of(question: Any) -> Role:
    """The role of the experts that such a question is for."""
    kind = type(question)
    return "judge" if kind is JudgeQuestion else "corrector" if kind is CorrectionQuestion else "planner"


def ring_order(problem: Problem) -> int:
    return derive("another problem's plan", problem.id)


def require_same_tokens(ours: Renderer, theirs: Renderer, name: str) -> None:
    """Raise UserError, about ``name``, unless each of our tokens is one of theirs, with the same id and an
    embedding."""
    own, other = ours.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
    different = next((token for token, number in own.items() if other.get(token) != number), None)
    if different is None and ours.vocabulary <= theirs.embeddings:
        return
    what = "has too few embeddings" if different is None else f"does not have {different!r} by the same id"
    raise UserError(
        f"{name} {what}, so it cannot read the policy's tokens; choose a model with the policy's tokenizer"
    )


def misshapen(question: Any, answer: Any) -> str:
    """Describe what is wrong with the form of an expert's answer; empty if nothing is."""
    if answer is None:
        return ""
    if isinstance(question, PlanQuestion):
        return "" if isinstance(answer, str) else f"gives {answer!r:.60} for a plan; return a string or None"
    if isinstance(question, CorrectionQuestion):
        return "" if isinstance(answer, Correction) else f"gives {answer!r:.60}; return a Correction or None"
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return f"gives {answer!r:.60} for an attempt; return a list with a score for each step, or None"
    if len(answer) != len(question.steps):
        return f"gives {len(answer)} scores to {len(question.steps)} steps; return one for each"
    wrong = next(
        (score for score in answer if score is not None and not isinstance(score, int | float)), None
    )
    return f"gives the score {wrong!r:.60}; return numbers or None" if wrong is not None else ""


def by_options(questions: Sequence[Any]) -> dict[tuple[object, ...], list[int]]:
    """Group the indices of questions that can be answered in one call."""
    out: dict[tuple[object, ...], list[int]] = {}
    for place, question in enumerate(questions):
        options = {
            key: value
            for key, value in vars(question).items()
            if key not in ("problem", "steps", "draft", "reference")
        }
        out.setdefault(tuple(options.values()), []).append(place)
    return out
