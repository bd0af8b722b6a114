"""A teacher's answers in OpenAI's form. Pure, as openai_api.py, which reads the requests.

In:  the request, the teacher's table for it, a tokenizer.
Out: the JSON of /v1/completions and /v1/chat/completions, and that of errors.

Log-probabilities are those of the whole vocabulary at temperature 1, whatever the sampling; those of the best tokens are
rounded to half precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from teacher_serving.openai_api import ApiError, Asked, Tokenizer


@dataclass(frozen=True)
class Choice:
    """One completion, cut where a stop text begins."""

    text: str
    tokens: list[str]
    logprobs: list[float]
    top: list[list[tuple[str, float]]]  # for every token: the best `num_logprobs` with their names
    finish_reason: str


def read_choices(asked: Asked, answers: pa.Table, tokenizer: Tokenizer) -> list[Choice]:
    """The choices in the order of `Asked.table`. Errors: ApiError 503 where the teacher has no answer to one."""
    for row, reason in enumerate(answers["finish_reason"].to_pylist()):
        if reason.startswith("error"):
            raise ApiError(503, f"the teacher gave no answer to choice {row}: {reason.removeprefix('error: ')}")
    return [_choice(asked, answers.slice(row, 1).to_pylist()[0], tokenizer) for row in range(answers.num_rows)]


def _choice(asked: Asked, answer: dict[str, Any], tokenizer: Tokenizer) -> Choice:
    ids, width, num_top = answer["output_ids"], asked.request.top_k, asked.num_logprobs or 0

    def name(token: int) -> str:
        return f"token_id:{token}" if asked.as_token_ids else tokenizer.decode([token], skip_special_tokens=False)

    text, kept, reason = tokenizer.decode(ids, skip_special_tokens=True), len(ids), answer["finish_reason"]
    if places := [place for stop in asked.stops if (place := text.find(stop)) >= 0]:
        text, reason = text[: min(places)], "stop"
        kept = _tokens_before([len(tokenizer.decode([token], skip_special_tokens=True)) for token in ids], len(text))
    starts = [place * width for place in range(kept)]
    return Choice(
        text=text,
        tokens=[name(token) for token in ids[:kept]],
        logprobs=[_finite(value) for value in answer["sampled_logprob"][:kept]],
        top=[
            [
                (name(answer["topk_ids"][place]), _finite(answer["topk_logprobs"][place]))
                for place in range(start, start + num_top)
            ]
            for start in starts
        ],
        finish_reason=reason,
    )


def _tokens_before(lengths: Sequence[int], end: int) -> int:
    """How many tokens, of so many characters each, end within the first `end` characters."""
    return sum(reached <= end for reached in itertools.accumulate(lengths))


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return value if math.isfinite(value) else -9999.0


def completion_answer(asked: Asked, choices: Sequence[Choice], model: str, name: str, created: int) -> dict[str, Any]:
    """The JSON of /v1/completions. `name`: of this answer; `created`: seconds since 1970."""

    def logprobs(choice: Choice) -> dict[str, Any] | None:
        if asked.num_logprobs is None:
            return None
        return {
            "tokens": choice.tokens,
            "token_logprobs": choice.logprobs,
            "top_logprobs": [dict(entry) for entry in choice.top] if asked.num_logprobs else None,
            "text_offset": [0, *itertools.accumulate(map(len, choice.tokens))][: len(choice.tokens)],
        }

    listed = [
        {"index": index, "text": choice.text, "logprobs": logprobs(choice), "finish_reason": choice.finish_reason}
        for index, choice in enumerate(choices)
    ]
    head = {"id": name, "object": "text_completion", "created": created, "model": model}
    return {**head, "choices": listed, "usage": _usage(asked, choices)}


def chat_answer(asked: Asked, choices: Sequence[Choice], model: str, name: str, created: int) -> dict[str, Any]:
    """The JSON of /v1/chat/completions. Tool calls stay in the text, in the model's own form."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    def logprobs(choice: Choice) -> dict[str, Any] | None:
        if asked.num_logprobs is None:
            return None
        rows = zip(choice.tokens, choice.logprobs, choice.top, strict=True)
        return {
            "content": [
                entry(token, logprob) | {"top_logprobs": [entry(*other) for other in top]} for token, logprob, top in rows
            ]
        }

    listed = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": logprobs(choice),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    head = {"id": name, "object": "chat.completion", "created": created, "model": model}
    return {**head, "choices": listed, "usage": _usage(asked, choices)}


def _usage(asked: Asked, choices: Sequence[Choice]) -> dict[str, int]:
    prompt, completion = sum(map(len, asked.prompts)), sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_answer(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error, in OpenAI's form."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
