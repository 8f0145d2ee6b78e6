"""The experts that a configuration names: step judges, correctors and planners, made when a method asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from handrail._util.errors import UserError
from handrail.experts.config import EndpointConfig, ExpertsConfig
from handrail.experts.correctors import Corrector, PolicyCorrector, ReferenceCorrector
from handrail.experts.judges import StepJudge
from handrail.experts.judges.reference import ReferenceJudge
from handrail.experts.planners import DataPlanner, DataPlannerName, Planner, PolicyPlanner
from handrail.models import Policy

if TYPE_CHECKING:
    from handrail.experts.endpoint import Endpoint

JudgeName = Literal["rule", "reference", "prm", "llm"]
PlannerName = Literal[DataPlannerName, "policy", "endpoint"]
CorrectorName = Literal["reference", "policy", "model", "endpoint"]


class Experts:
    """Makes experts for one run. Every method raises UserError where the configuration lacks what an expert needs."""

    def __init__(
        self,
        config: ExpertsConfig,
        endpoint: EndpointConfig | None = None,
        load: Callable[[str, str], Policy] | None = None,
        policy: Policy | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``load`` opens the model of a path as a policy, and blames a setting for it if it cannot; ``policy`` is the one in training.

        Without ``policy``, the model of the configuration is loaded as "" when an expert asks for it.
        """
        self.config, self.server, self.load, self.trained = config, endpoint, load, policy
        self.device = device or torch.device("cpu")

    def judge(self, name: JudgeName, step_end: str | None = None) -> StepJudge:
        match name:
            case "reference":
                return ReferenceJudge(step_end)
            case "rule":
                from handrail.experts.judges.arithmetic import RuleJudge

                return RuleJudge()
            case "prm":
                from handrail.experts.judges.prm import PrmJudge

                if not self.config.prm:
                    raise UserError('the step judge "prm" needs experts.prm, a process reward model\'s directory')
                return PrmJudge(self.config.prm, self.device)
            case "llm":
                from handrail.experts.judges.llm import LlmJudge

                return LlmJudge(self.endpoint, self.endpoint.config.answer_tokens)

    def corrector(self, name: CorrectorName, shown: bool, max_tokens: int, step_end: str | None) -> Corrector:
        """``shown``: the corrector sees the reference. The reference itself, and the policy, always do."""
        match name:
            case "reference":
                return ReferenceCorrector(step_end)
            case "policy":
                return PolicyCorrector(self.policy, True, max_tokens, step_end)
            case "model":
                return PolicyCorrector(self.teacher, shown, max_tokens, step_end)
            case "endpoint":
                from handrail.experts.correctors.llm import EndpointCorrector

                return EndpointCorrector(self.endpoint, shown, step_end, self.endpoint.config.answer_tokens)

    def planner(self, name: PlannerName, max_tokens: int) -> Planner:
        match name:
            case "policy":
                return PolicyPlanner(self.policy, max_tokens)
            case "endpoint":
                from handrail.experts.planners.llm import EndpointPlanner

                return EndpointPlanner(self.endpoint, self.endpoint.config.answer_tokens)
            case _:
                return DataPlanner(name)

    @cached_property
    def policy(self) -> Policy:
        return self.trained or self._load("", "model.path")

    @cached_property
    def teacher(self) -> Policy:
        if not self.config.teacher:
            raise UserError('the corrector "model" needs experts.teacher, a causal language model\'s directory or name')
        return self._load(self.config.teacher, "experts.teacher")

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
        """What the endpoint has counted since the last call."""
        return self.endpoint.take_counts() if "endpoint" in self.__dict__ else Counter()
