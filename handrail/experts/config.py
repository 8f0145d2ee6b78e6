"""Settings of experts, and of the server that some of them ask."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from handrail._util.section import Section


class ExpertsConfig(Section):
    """Other models that a method asks for advice, if its settings name them."""

    prm: str = ""
    """Process reward model for the step judge ``prm``: a directory or ``builtin:NAME``."""
    teacher: str = ""
    """Causal language model for the corrector ``model``: a directory or hub name."""


class EndpointConfig(Section):
    """A server with the OpenAI chat-completions protocol, for judges, correctors and planners."""

    base_url: str
    """Address of the server, without password and parameters."""
    model: str
    """Name of the model on the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; the key itself is never written anywhere."""
    concurrency: int = Field(8, ge=1)
    """Questions asked at the same time."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds to wait for an answer."""
    retries: int = Field(4, ge=0)
    """Further attempts, with growing pauses, after status 408, 409, 429 or 5xx, a timeout or a lost
    connection."""
    answer_tokens: int = Field(4096, ge=1)
    """Longest answer in tokens, the model's reasoning included; a longer answer counts as none."""
    max_calls: int | None = Field(None, ge=1)
    """Budget of requests; once it is spent, further questions go unanswered."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget of tokens, prompts and answers together; once it is spent, further questions go unanswered."""
    max_cost: float | None = Field(None, gt=0)
    """Budget of money, in the currency of the two prices, which it needs; once it is spent, further questions
    go unanswered."""
    input_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens."""
    output_price: float | None = Field(None, ge=0)
    """Price of a million answer tokens."""
    cache: str = "runs/endpoint-cache.sqlite"
    """File that keeps every answer, so that no run asks the same question twice."""
    pause_after: int = Field(10, ge=1)
    """Pause the run, with a checkpoint, after this many failed questions in a row."""

    @model_validator(mode="after")
    def _secretless(self) -> EndpointConfig:
        # The configuration is written into every run directory.
        if re.search(r"//[^/]*@|\?", self.base_url):
            raise ValueError(
                "base_url holds a name, a password or parameters; keep secrets in the environment variable of api_key_env"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError(
                "api_key_env is not the name of an environment variable; put the key into one, and its name here"
            )
        return self

    @model_validator(mode="after")
    def _priced(self) -> EndpointConfig:
        if self.max_cost is not None and None in (self.input_price, self.output_price):
            raise ValueError("max_cost needs input_price and output_price")
        return self
