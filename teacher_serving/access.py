"""How a teacher that runs elsewhere is reached: the options of it that say nothing about what it writes or records.

In:  keyword arguments or a mapping (from YAML). Out: frozen parts of the configs in config.py.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Frozen, and unknown keys are errors; field docstrings become the fields' descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BudgetConfig(Strict):
    """What a teacher that is paid for may cost, over all runs that share its cache; nothing is set: as much as it takes."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens together."""
    max_cost: float | None = Field(default=None, gt=0.0)
    """In the currency of the prices."""
    prompt_price: float | None = Field(default=None, ge=0.0)
    """Of a million prompt tokens."""
    completion_price: float | None = Field(default=None, ge=0.0)
    """Of a million completion tokens."""

    @model_validator(mode="after")
    def _cost_has_prices(self) -> BudgetConfig:
        prices = (self.prompt_price, self.completion_price)
        if self.max_cost is not None and None in prices:
            raise ValueError(
                f"budget.max_cost={self.max_cost:g} with prompt_price={prices[0]} and completion_price={prices[1]}; "
                "expected the prices of a million tokens of both kinds"
            )
        return self


class RemoteAccess(Strict):
    """What every way to a teacher elsewhere has in common."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; the key itself stands in no file and no log. None: no key."""
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """Seconds until a request without an answer is given up, and made again or its row an error row."""
    max_retries: int = Field(default=6, ge=0)
    """How often a request is made again that timed out, found no server, or was put off (HTTP 408, 429, 5xx)."""

    @property
    def api_key_names(self) -> tuple[str, ...]:
        """Environment variables that hold keys."""
        return () if self.api_key_env is None else (self.api_key_env,)

    @model_validator(mode="after")
    def _key_has_a_name(self) -> RemoteAccess:
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            raise ValueError(
                "api_key_env is no name of an environment variable; expected letters, digits and _, such as "
                "TEACHER_API_KEY, and the key in that variable alone"
            )
        return self


class HttpAccess(RemoteAccess):
    """The way to an OpenAI-compatible endpoint (`/v1/completions`), such as a stock `vllm serve`."""

    kind: Literal["http"] = "http"
    address: str
    """Where the API is, such as http://localhost:8000/v1."""
    model: str
    """Name under which the endpoint serves the model (one of those at `/v1/models`)."""
    connections: int = Field(default=32, ge=1)
    """Requests of one actor that are under way at once."""
    requests_per_s: float | None = Field(default=None, gt=0.0)
    """Requests that all actors together begin in a second, at most. None: no limit."""
    tokens_per_s: float | None = Field(default=None, gt=0.0)
    """Prompt and completion tokens that all actors together ask for in a second, on average. None: no limit."""
    budget: BudgetConfig = BudgetConfig()
    """When to stop. What is answered by then is kept, and a larger budget goes on from there."""

    @model_validator(mode="after")
    def _address_is_one(self) -> HttpAccess:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"address={self.address!r}; expected http://HOST:PORT/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"address of {parts.hostname} holds credentials or a query; expected http(s)://HOST:PORT/PATH alone, with "
                "the key in an environment variable that api_key_env names"
            )
        return self


class ServedAccess(RemoteAccess):
    """The way to a shared teacher: an engine of raykd that runs as a service (python -m teacher_serving.serve)."""

    kind: Literal["served"] = "served"
    app: str | None = None
    """Name of the application in this run's own cluster: the fast way. Either this or `address`."""
    address: str | None = None
    """URL of the service, http://HOST:PORT and its route, for a run in any other cluster."""

    @model_validator(mode="after")
    def _one_way_there(self) -> ServedAccess:
        if (self.app is None) == (self.address is None):
            raise ValueError(f"app={self.app} and address={self.address}: expected one of the two, the other left out")
        if self.app is not None and self.api_key_env is not None:
            raise ValueError(f"api_key_env={self.api_key_env} with app={self.app} has no effect: a cluster asks for no key")
        if self.address is not None and urlsplit(self.address).scheme not in ("http", "https"):
            raise ValueError(f"address={self.address!r}; expected http://HOST:PORT or https://HOST, perhaps with a route")
        return self


class Share(Strict):
    """How much one of several teachers has to do."""

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Its share, relative to the others', of the prompts that name no teacher. 0: those that name it, and no others."""


class HttpShare(HttpAccess, Share):
    """One of several teachers, at an endpoint."""


class ServedShare(ServedAccess, Share):
    """One of several teachers, a shared one."""


OneOfSeveral = Annotated[HttpShare | ServedShare, Field(discriminator="kind")]
