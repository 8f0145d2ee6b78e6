"""The local engine with a policy of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from handrail import METHODS, Author, LocalEngine, Policy, Problem, Trajectory, UserError, VerifierPool
from handrail.models.trainable import TrainablePolicy

PROBLEM = Problem("p", "77 A 8 ?", "70", ("77 + 8 = 85 ; 85 * 2 = 70 # 70",), "add double")


class Server(Policy):
    """A policy that generates only, by turns right and wrong, as one behind a server might."""

    max_tokens = 48

    def __init__(self, policy: TrainablePolicy) -> None:
        self.renderer = policy.renderer

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        assert max_tokens == [self.max_tokens] * len(prompts)
        texts = ["# 70", "# 1"] * len(prompts)
        return [
            Trajectory.by(Author.POLICY, prompt, self.renderer.completion(text), text)
            for prompt, text in zip(prompts, texts, strict=False)
        ]


def test_a_policy_of_ones_own_needs_only_to_generate(policy: TrainablePolicy, verifier: VerifierPool) -> None:
    engine = LocalEngine(Server(policy), verifier)
    (group,) = engine.groups(METHODS["luffy"](group_size=5, max_tokens=48), [PROBLEM])
    assert [member.reward for member in group.trajectories] == [1, 0, 1, 0, 1]
    assert [float(member.column("advantage")[0]) for member in group.trajectories] == pytest.approx(
        [0.4, -0.6, 0.4, -0.6, 0.4]
    )
    with pytest.raises(UserError, match="Server cannot score completions; choose a method that only samples"):
        engine.groups(METHODS["dmpo"](group_size=4, max_tokens=48), [PROBLEM])


def test_the_model_before_training_scores_only_if_it_was_kept(policy: TrainablePolicy) -> None:
    prompt, completion = policy.renderer.prompt(PROBLEM), policy.renderer.completion("# 70")
    with pytest.raises(UserError, match="there is no model 'reference' to score with; declare it"):
        policy.score([prompt], [completion], "reference")
