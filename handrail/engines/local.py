"""Local engine: the policy in this process generates and scores, a process pool verifies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan
from typing import Any, TypeVar

import torch
from torch import Tensor

from handrail._util.errors import UserError
from handrail._util.seeds import derive
from handrail.experts.registry import Experts
from handrail.methods.base import Method
from handrail.methods.context import Context
from handrail.methods.requests import (
    Ask,
    Flow,
    Generate,
    Pending,
    Score,
    TopTokens,
    Verify,
    drive,
    gather,
)
from handrail.models.policy import Policy, room
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory
from handrail.verifiers.pool import VerifierPool, grade_rollouts, unreached

Places = Sequence[int] | None
Asked = TypeVar("Asked", Score, TopTokens)
Found = TypeVar("Found")


class LocalEngine:
    """Answer requests with a policy, a verifier and experts.

    Completions depend only on the seed, the step, the problem and its place in the step.
    """

    def __init__(
        self,
        policy: Policy,
        verifier: VerifierPool,
        experts: Experts | None = None,
        seed: int = 0,
        require_end: bool = True,
        critic: Policy | None = None,
    ) -> None:
        """``require_end``: True if a truncated completion counts as wrong, whatever it says. ``critic``: the
        model that the method trains beside the policy, if any."""
        self.policy, self.verifier, self.seed, self.require_end = policy, verifier, seed, require_end
        self.experts, self.critic = experts or Experts(policy=policy), critic
        self.step = self.version = 0
        self.counts: Counter[str] = Counter()
        self.unverified: dict[str, str] = {}
        """Reason -> one line about the first completion that got no verdict for that reason."""

    def begin(self, step: int, version: int | None = None) -> None:
        """Start a step and reset the counts.

        ``version``: the step that made the policy's weights; by default the one before.
        """
        self.step, self.counts, self.unverified = step, Counter(), {}
        self.version = max(0, step - 1) if version is None else version

    def context(self, place: int, problem: Problem, verb: str, number: int = 0) -> Context:
        rng = random.Random(derive(self.seed, self.step, verb, place, number, problem.id))
        policy = self.policy
        return Context(policy.renderer, policy.max_tokens, policy.context, self.step, rng, self.counts)

    # The verbs, over all groups of a step

    def groups(self, method: Method[Any], problems: Sequence[Problem]) -> list[Group]:
        """Sample, grade, guide and credit problems; return the groups that an update would learn from."""
        graded = self.reward(method, self.rollout(method, problems))
        return self.credit(method, [each for found in self.guide(method, graded) for each in found])

    def rollout(self, method: Method[Any], problems: Sequence[Problem], places: Places = None) -> list[Group]:
        """Sample the method's number of rollouts for every problem, ungraded.

        ``places``, here and below: the index of each problem in the step, over all processes; samples depend
        on it.
        """

        async def sample(problem: Problem) -> Group:
            n = method.samples(problem)
            return Group(problem, await Generate(self.policy.renderer.prompt(problem), n) if n else [])

        placed = zip(range(len(problems)) if places is None else places, problems, strict=True)
        return self.run(
            [(self._key("rollout", place, problem), sample(problem)) for place, problem in placed]
        )

    def reward(self, method: Method[Any], groups: Sequence[Group], places: Places = None) -> list[Group]:
        """Grade every trajectory and set its reward."""
        return self._verb("reward", method.reward, groups, places)

    def guide(self, method: Method[Any], groups: Sequence[Group], places: Places = None) -> list[list[Group]]:
        """Guide every group; return the list of groups that each one becomes."""

        async def guide(group: Group, ctx: Context) -> list[Group]:
            found = await method.guide(group, ctx)
            guided = found if isinstance(found, list) else [found]
            for term in method.terms:
                guided = await gather(*(term.guide(each, ctx) for each in guided))
            return guided

        return self._verb("guide", guide, groups, places)

    def credit(self, method: Method[Any], groups: Sequence[Group], places: Places = None) -> list[Group]:
        """The credited groups, without those that the method leaves out."""
        return [group for _, group in self.credit_places(method, groups, places)]

    def credit_places(
        self, method: Method[Any], groups: Sequence[Group], places: Places = None
    ) -> list[tuple[int, Group]]:
        """Like ``credit``, each group with its place."""
        places = list(range(len(groups)) if places is None else places)
        return [
            (place, group)
            for place, group in zip(places, self._verb("credit", method.credit, groups, places), strict=True)
            if group is not None and method.keeps(group)
        ]

    def _verb(
        self,
        name: str,
        verb: Callable[[Group, Context], Flow],
        groups: Sequence[Group],
        places: Places = None,
    ) -> list[Any]:
        places = list(range(len(groups)) if places is None else places)
        flows, seen = [], Counter[int]()
        for place, group in zip(places, groups, strict=True):
            number = seen[place]  # ``guide`` may make several groups of one
            seen[place] += 1
            key = (*self._key(name, place, group.problem), number)
            flows.append((key, verb(group, self.context(place, group.problem, name, number))))
        return self.run(flows)

    def _key(self, verb: str, place: int, problem: Problem) -> tuple[object, ...]:
        return (verb, self.step, place, problem.id)

    def run(self, flows: Sequence[tuple[tuple[object, ...], Flow]]) -> list[Any]:
        """Run coroutines that await requests, each with a key that is unique within the step."""
        return drive(flows, self.answer)

    # Answers

    def answer(self, pending: list[Pending]) -> Sequence[Any]:
        """Answer each request; all are of the same kind."""
        requests = [each.request for each in pending]
        if isinstance(requests[0], Ask | Generate) and any(each.key[0] == "credit" for each in pending):
            raise UserError(
                "credit samples or asks an expert, when part of the step may have been learned already; "
                "do it in guide, and keep the result in Group.notes or in a column"
            )
        match requests[0]:
            case Generate():
                found = self._generate(requests, [derive(self.seed, *each.key) for each in pending])
                if pending[0].key[0] != "rollout":  # the other verbs sample besides
                    self.counts["tokens/resampled"] += sum(len(each) for group in found for each in group)
                return found
            case Score():
                return self._score(requests)
            case Verify():
                pairs = [(request.problem, request.trajectory) for request in requests]
                return self.verify(pairs, answers=any(request.answer for request in requests))
            case TopTokens():
                return self._top_tokens(requests)
            case Ask():
                return self._ask(requests, [derive(self.seed, *each.key) for each in pending])
        raise TypeError(f"this engine does not answer {type(requests[0]).__name__}")

    def _generate(self, requests: Sequence[Generate], seeds: Sequence[int]) -> list[list[Trajectory]]:
        def sample(model: str, places: Sequence[int]) -> list[list[Trajectory]]:
            policy, kind = self._model(model)
            if kind == "reference":
                raise UserError("a method samples from the model before training, which can only score")
            return self._sample(
                policy, [requests[place] for place in places], [seeds[place] for place in places]
            )

        return by_model(requests, sample)

    def _sample(
        self, policy: Policy, requests: Sequence[Generate], seeds: Sequence[int]
    ) -> list[list[Trajectory]]:
        prompts, limits, flat_seeds = [], [], []
        for request, seed in zip(requests, seeds, strict=True):
            limit = policy.max_tokens if request.max_tokens is None else request.max_tokens
            limit = room(policy, request.prompt_ids, limit)
            if limit < 1:
                length, context = len(request.prompt_ids), policy.context
                raise UserError(
                    f"there is no room for a token behind {length} tokens; the model's context is {context}"
                )
            prompts += [request.prompt_ids] * request.n
            limits += [limit] * request.n
            flat_seeds += [derive(seed, number) for number in range(request.n)]
        completions = iter(policy.generate(prompts, flat_seeds, limits))
        return [
            [replace(next(completions), version=self.version) for _ in range(request.n)]
            for request in requests
        ]

    def _score(self, requests: Sequence[Score]) -> list[Tensor]:
        def score(model: str, places: Sequence[int]) -> list[Tensor]:
            policy, model = self._model(model)
            asked = [requests[place] for place in places]
            fitting = self._fitting(policy, asked)
            targets = [each.token_ids if each.targets is None else each.targets for each in fitting]
            scored = policy.score(
                [each.prompt_ids for each in fitting], [each.token_ids for each in fitting], model, targets
            )
            found = dict(zip(map(id, fitting), scored, strict=True))
            return [found.get(id(each), torch.full((len(each.token_ids),), nan)) for each in asked]

        return by_model(requests, score)

    def _top_tokens(self, requests: Sequence[TopTokens]) -> list[Tensor | None]:
        known = self.policy.renderer.vocabulary

        def top(model: str, places: Sequence[int]) -> list[Tensor | None]:
            policy, model = self._model(model)
            asked = [requests[place] for place in places]
            fitting = self._fitting(policy, asked)
            likeliest = policy.top_tokens(
                [each.prompt_ids for each in fitting], [each.token_ids for each in fitting], model, known
            )
            found = dict(zip(map(id, fitting), likeliest, strict=True))
            return [found.get(id(each)) for each in asked]

        return by_model(requests, top)

    def _fitting(self, policy: Policy, asked: Sequence[Asked]) -> list[Asked]:
        """The requests that the model's context has room for; the others are counted."""
        fitting = [
            each
            for each in asked
            if room(policy, each.prompt_ids, len(each.token_ids)) == len(each.token_ids)
        ]
        self.counts["score/no_room"] += len(asked) - len(fitting)
        return fitting

    def _model(self, name: str) -> tuple[Policy, str]:
        """Return the policy that holds a model, and the model's name there."""
        match name:
            case "policy" | "reference":
                return self.policy, name
            case "teacher":
                return self.experts.white_box(self.policy), "policy"
            case "critic" if self.critic:
                return self.critic, "policy"
        raise UserError(
            f"a method asks the model {name!r}; there are policy, reference, teacher, and critic "
            "if the method names it in trained"
        )

    def verify(self, pairs: Sequence[tuple[Problem, Trajectory]], answers: bool = False) -> list[Trajectory]:
        """Set ``correct`` and ``reward`` from the verifier's verdicts; the reward is NaN without a verdict.

        ``answers``: True to set ``answer`` too; that of a truncated trajectory is None with ``require_end``.
        With ``require_end``, a truncated trajectory is wrong and earns nothing.
        """
        out = []
        found = grade_rollouts(self.verifier, pairs, self.require_end, answers)
        for (problem, member), verdict in zip(pairs, found, strict=True):
            if verdict.correct is None:
                self.counts.update(["verifier/unverified", f"verifier/{verdict.status}"])
                self.unverified.setdefault(verdict.status, unreached(problem, verdict))
            reward = nan if verdict.correct is None else verdict.reward
            out.append(replace(member, reward=reward, correct=verdict.correct, answer=verdict.answer))
        return out

    def _ask(self, requests: Sequence[Ask], seeds: Sequence[int]) -> list[Any]:
        out: dict[int, Any] = {}
        kinds = [(request.expert, type(request.question)) for request in requests]
        for kind in dict.fromkeys(kinds):
            places = [place for place, each in enumerate(kinds) if each == kind]
            questions = [requests[place].question for place in places]
            answers = self.experts.answer(kind[0], questions, [seeds[place] for place in places])
            out.update(zip(places, answers, strict=True))
        return [out[place] for place in range(len(requests))]


def by_model(requests: Sequence[Any], answer: Callable[[str, Sequence[int]], list[Found]]) -> list[Found]:
    """Answer the requests to each model together, and return the answers in the order of the requests.

    ``answer``: is given a model and the places of the requests to it.
    """
    out: dict[int, Found] = {}
    for model in dict.fromkeys(request.model for request in requests):
        places = [place for place, request in enumerate(requests) if request.model == model]
        out.update(zip(places, answer(model, places), strict=True))
    return [out[place] for place in range(len(requests))]
