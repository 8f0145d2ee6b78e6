"""The networks of i-MENTOR: how badly a predictor imitates a random target on a row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from handrail.methods.base import State
from handrail.types.trajectory import Trajectory

WIDTH = 16
"""Size of a token's embedding."""


class Novelty(nn.Module):
    """Embedding, batch normalization, target and predictor (16, 8, 1 units, LeakyReLU, sigmoid), and AdamW.

    The target itself is not trained; the embedding and the normalization are. ``steps`` counts AdamW's.
    """

    steps: Tensor

    def __init__(self, vocabulary: int, length: int, learning_rate: float) -> None:
        """``length``: number of tokens in a row. The first weights are the same in every process."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(vocabulary, WIDTH)
            self.norm = nn.BatchNorm1d(WIDTH * length)
            self.target = perceptron(WIDTH * length).requires_grad_(False)
            self.predictor = perceptron(WIDTH * length)
        self.register_buffer("steps", torch.tensor(0))
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate)

    def forward(self, rows: Tensor) -> Tensor:
        """(target − predictor)² [B] of token ids [B, length]."""
        inputs = self.norm(self.embedding(rows).flatten(1))
        errors: Tensor = (self.target(inputs.detach()) - self.predictor(inputs)).square().squeeze(1)
        return errors

    def step(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the errors [B] of at least two rows, then take one step on their mean."""
        errors: Tensor = self(torch.tensor(rows))
        self.optimizer.zero_grad()
        torch.autograd.backward(errors.mean())
        self.optimizer.step()
        self.steps += 1
        return errors.detach()

    def state(self) -> State:
        moments = self.optimizer.state_dict()["state"]
        return {
            "nets": dict(self.state_dict()),
            "moments": {str(place): entry for place, entry in moments.items()},
        }

    def load_state(self, state: State) -> None:
        self.load_state_dict(state["nets"])
        moments = {int(place): entry for place, entry in state["moments"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def padded(member: Trajectory, prompt_tokens: int, response_tokens: int) -> tuple[int, ...]:
    """The last tokens of the prompt and the first of the completion, padded with 0 to one length."""
    prompt, response = member.prompt_ids[-prompt_tokens:], member.tokens[:response_tokens]
    return (
        *[0] * (prompt_tokens - len(prompt)),
        *prompt,
        *response,
        *[0] * (response_tokens - len(response)),
    )


def perceptron(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.LeakyReLU(), nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 1), nn.Sigmoid()
    )


def bonuses(errors: Tensor, scale: float) -> Tensor:
    """scale·(e − min e)/(max e − min e); zeros if all errors are equal."""
    spread = errors.max() - errors.min()
    return scale * (errors - errors.min()) / spread if spread > 0 else torch.zeros_like(errors)
