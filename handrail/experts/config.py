"""Settings of experts, and of the server that some of them query."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from handrail._util.section import Section

Role = Literal["judge", "corrector", "planner"]


class ExpertsConfig(Section):
    """Models of the experts that a method's settings name."""

    prm: str = ""
    """Process reward model for the step judge ``prm``: a directory or ``builtin:NAME``."""
    teacher: str = ""
    """Causal language model for the corrector ``model``: a directory or hub name."""
    critic: str = ""
    """Causal language model that becomes the critic of a method that trains one; it must have the policy's
    tokenizer. By default, the model that the policy starts from."""


class EndpointConfig(Section):
    """A server with the OpenAI chat-completions protocol, for judges, correctors and planners."""

    base_url: str
    """Address of the server, without password and parameters."""
    model: str
    """Name of the model on the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; the key itself is never written anywhere."""
    concurrency: int = Field(8, ge=1)
    """Number of concurrent requests."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds to wait for an answer."""
    retries: int = Field(4, ge=0)
    """Number of retries, with growing delays, after status 408, 409, 429 or 5xx, a timeout or a lost
    connection."""
    answer_tokens: int = Field(4096, ge=1)
    """Maximum answer length in tokens, including the model's reasoning; a longer answer counts as no
    answer."""
    max_calls: int | None = Field(None, ge=1)
    """Budget of requests; once it is spent, further questions go unanswered."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget of prompt and answer tokens together; once it is spent, further questions go unanswered."""
    max_cost: float | None = Field(None, gt=0)
    """Budget of money, in the currency of the two prices, which must be set; once it is spent, further
    questions go unanswered."""
    input_price: float | None = Field(None, ge=0)
    """Price per million prompt tokens."""
    output_price: float | None = Field(None, ge=0)
    """Price per million answer tokens."""
    cache: str = "runs/endpoint-cache.sqlite"
    """File that stores every answer, so that no run asks the same question twice."""
    pause_after: int = Field(10, ge=1)
    """Pause the run, with a checkpoint, after this many consecutive failed questions."""

    @model_validator(mode="after")
    def _no_secrets(self) -> EndpointConfig:
        # The configuration is written to every run directory, so it must not contain secrets.
        if re.search(r"//[^/]*@|\?", self.base_url):
            raise ValueError(
                "base_url holds a name, a password or parameters; keep secrets in the environment variable "
                "of api_key_env"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError(
                "api_key_env is not the name of an environment variable; put the key into one, and its name "
                "here"
            )
        return self

    @model_validator(mode="after")
    def _has_prices(self) -> EndpointConfig:
        if self.max_cost is not None and None in (self.input_price, self.output_price):
            raise ValueError("max_cost needs input_price and output_price")
        return self
