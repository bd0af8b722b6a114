"""Requests in OpenAI's form to requests of a teacher. Pure: no network, no clock, no engine.

In:  the JSON of /v1/completions or /v1/chat/completions, what the service offers, and its tokenizer.
Out: `Asked`, of which one row is put to the teacher for every choice (openai_answers.py makes JSON of what comes back).

What cannot be done exactly as asked is refused, never left out in silence: ApiError, with the HTTP status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
from pydantic import Field, ValidationError

from teacher_serving.arrow import find_problems
from teacher_serving.config import RequestConfig, SamplingConfig, Strict
from teacher_serving.types import PROMPT_SCHEMA, TeacherInfo
from teacher_serving.wire import explain

MAX_STOPS = 4
MAX_CHOICES = 128
SEVERAL_FORMS = {"prompt": "a text, a list of token ids, or a list of one of them", "stop": "a text or a list of texts"}


class ApiError(ValueError):
    """A request that is not answered: HTTP status, and what was found, expected, is to be changed."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class _Body(Strict):
    """What both kinds of requests may say. Options that would change the answer and are not offered have one legal value."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    """Of sampling; -1 or 0: off. (An extension that vLLM has, too.)"""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    """Besides the model's own (an extension)."""
    return_tokens_as_token_ids: bool = False
    """Tokens of log-probabilities as `token_id:<id>` instead of their text (an extension)."""
    stream: Literal[False] | None = None
    stream_options: None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Mapping[str, float] | None = Field(default=None, max_length=0)
    user: str | None = None


class CompletionBody(_Body):
    """Of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0)
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class ChatBody(_Body):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Handed to the chat template (an extension)."""
    response_format: None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class Service:
    """What requests are held against."""

    info: TeacherInfo
    request: RequestConfig  # what holds where a request says nothing
    max_sequences: int


@dataclass(frozen=True)
class Asked:
    """One request, ready for the teacher."""

    prompts: list[list[int]]  # token ids
    num_choices: int  # for every prompt
    request: RequestConfig
    num_logprobs: int | None  # top entries wanted for every token; None: no log-probabilities at all
    as_token_ids: bool
    stops: tuple[str, ...] = field(default=())

    def table(self) -> pa.Table:
        """Rows of PROMPT_SCHEMA: every choice of the first prompt, then of the next."""
        rows = [prompt for prompt in self.prompts for _ in range(self.num_choices)]
        return pa.table({"uid": range(len(rows)), "prompt_ids": rows}, schema=PROMPT_SCHEMA)


def read_completion(body: Any, service: Service, tokenizer: Tokenizer, fresh_seed: int) -> Asked:
    """A request for completions. `fresh_seed`: for one that samples and names no seed. Errors: ApiError."""
    parsed = _parsed(CompletionBody, body)
    given: Any = parsed.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):  # one text, or the tokens of one
        given = [given]
    prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    return _asked(parsed, prompts, parsed.logprobs, parsed.max_tokens, service, fresh_seed)


def read_chat(body: Any, service: Service, tokenizer: Tokenizer, fresh_seed: int) -> Asked:
    """A request to go on with a conversation; `tools` go through the chat template. Errors: ApiError."""
    parsed = _parsed(ChatBody, body)
    if parsed.top_logprobs and not parsed.logprobs:
        raise ApiError(400, f"top_logprobs={parsed.top_logprobs} without logprobs; set logprobs=true")
    try:
        rendered = tokenizer.apply_chat_template(
            parsed.messages,
            tools=None if parsed.tool_choice == "none" else parsed.tools,
            add_generation_prompt=True,
            tokenize=False,
            **parsed.chat_template_kwargs,
        )
    except Exception as error:  # a template is a program of the model's: whatever it stumbles over is in the messages
        raise ApiError(400, f"messages: the model's chat template refuses them: {type(error).__name__}: {error}") from None
    prompt = tokenizer.encode(rendered, add_special_tokens=False)
    num_logprobs = (parsed.top_logprobs or 0) if parsed.logprobs else None
    return _asked(parsed, [prompt], num_logprobs, parsed.max_completion_tokens or parsed.max_tokens, service, fresh_seed)


def _parsed(kind: type[Any], body: Any) -> Any:
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}, expected a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems = [
            f"{name}: expected {SEVERAL_FORMS[name]}" if (name := str(item["loc"][0])) in SEVERAL_FORMS else explain(item)
            for item in error.errors()
        ]
        raise ApiError(400, "; ".join(dict.fromkeys(problems))) from None


def _asked(
    body: _Body,
    prompts: list[list[int]],
    num_logprobs: int | None,
    max_tokens: int | None,
    service: Service,
    fresh_seed: int,
) -> Asked:
    info = service.info
    if body.model not in (None, info.teacher_id):
        raise ApiError(404, f"model={body.model!r} is not served here; expected {info.teacher_id!r}", "model_not_found")
    if (num_logprobs or 0) > service.request.top_k:
        raise ApiError(
            400, f"found logprobs={num_logprobs}, expected at most {service.request.top_k}: what this teacher gives"
        )
    if not 1 <= len(prompts) * body.n <= service.max_sequences:
        raise ApiError(
            400,
            f"found {len(prompts)} prompts with n={body.n}, expected 1 to {service.max_sequences} sequences in a request",
        )
    stops = tuple([body.stop] if isinstance(body.stop, str) else body.stop or ())
    if len(stops) > MAX_STOPS or not all(stops):
        raise ApiError(400, f"found stop={list(stops)}, expected at most {MAX_STOPS} texts, none of them empty")
    request = RequestConfig(
        top_k=max(1, num_logprobs or 0),
        sampling=_sampling(body, max_tokens, service, fresh_seed),
        max_model_len=service.request.max_model_len,
    )
    for prompt in prompts:
        if outside := [token for token in prompt if not 0 <= token < info.vocab_size]:
            raise ApiError(400, f"prompt: token {outside[0]} is outside the vocabulary of {info.vocab_size}")
    asked = Asked(prompts, body.n, request, num_logprobs, body.return_tokens_as_token_ids, stops)
    problems = find_problems(asked.table(), info, context=request.context(info.max_model_len))
    for row, problem in enumerate(problems):
        if problem:
            raise ApiError(400, f"prompt {row // body.n}: {problem}")
    return asked


def _sampling(body: _Body, max_tokens: int | None, service: Service, fresh_seed: int) -> SamplingConfig:
    own = service.request.sampling
    if outside := [token for token in body.stop_token_ids or () if not 0 <= token < service.info.vocab_size]:
        raise ApiError(400, f"stop_token_ids {outside} are outside the vocabulary of {service.info.vocab_size}")
    ends = service.info.eos_token_ids if own.stop_token_ids is None else own.stop_token_ids
    temperature = own.temperature if body.temperature is None else body.temperature
    # At temperature 0 there is nothing to cut, though clients often say top_p all the same.
    top_p = own.top_p if body.top_p is None else body.top_p
    top_k = own.sample_top_k if body.top_k is None else max(0, body.top_k)
    return SamplingConfig(
        temperature=temperature,
        top_p=top_p if temperature else 1.0,
        sample_top_k=top_k if temperature else 0,
        max_tokens=max_tokens or own.max_tokens,
        seed=(fresh_seed if temperature else 0) if body.seed is None else body.seed,
        stop_token_ids=(*ends, *(token for token in body.stop_token_ids or () if token not in ends)),
    )
