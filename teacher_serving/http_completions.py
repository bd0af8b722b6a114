"""The language of /v1/completions: bodies of requests, and what comes back as arrays.

In:  token ids and settings; parsed JSON.
Out: request bodies; Answers whose log-probabilities are flat arrays, no object per token once the JSON is read.

Log-probabilities are those of the model at temperature 1, over the whole vocabulary: what vLLM gives unless it is started
with another --logprobs-mode. Shape letters: P prompt tokens, T output tokens, K top-k entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_serving.arrow import NOTHING, Answer
from teacher_serving.config import HttpTeacherConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_ID = "token_id:"
"""How vLLM names a token where it is asked for ids (return_tokens_as_token_ids)."""
NO_MASS = -9999.0
"""What servers write for a log-probability of -inf, which JSON does not have."""


class ReplyError(Exception):
    """An answer that cannot be read."""


@dataclass(frozen=True)
class Offer:
    """What an endpoint has turned out to understand and to give."""

    by_ids: bool  # prompts may be token ids
    extensions: bool  # it knows vLLM's words: ids come back, stop tokens and top_k are heeded
    top_k: int  # K that it gives of the `top_k` asked for; 0: text alone


class Wording:
    """Makes requests as one endpoint understands them, and reads its answers."""

    def __init__(self, config: HttpTeacherConfig, tokenizer: Tokenizer, stop_token_ids: Sequence[int], offer: Offer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._stop_token_ids = list(stop_token_ids)
        self._offer = offer

    def to_write(self, prompt_ids: np.ndarray, max_tokens: int, seed: int | None) -> dict[str, Any]:
        """The body that asks for a completion of so many tokens at most."""
        sampling = self._config.sampling
        body: dict[str, Any] = {
            "model": self._config.model,
            "prompt": self._prompt(prompt_ids),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0.0,  # a server may have other defaults for its model
            "frequency_penalty": 0.0,
        }
        if seed is not None:
            body["seed"] = seed
        if self._offer.top_k:
            body["logprobs"] = self._offer.top_k
        if self._offer.extensions:
            body |= {
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "add_special_tokens": False,
                "skip_special_tokens": False,
                "stop_token_ids": self._stop_token_ids,
                "ignore_eos": True,  # the stop tokens are the whole list
                "top_k": sampling.sample_top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }
        return body

    def to_score(self, ids: np.ndarray) -> dict[str, Any]:
        """The body that asks what a given text's tokens [P + T] were worth."""
        return {
            "model": self._config.model,
            "prompt": ids.tolist(),
            "max_tokens": 1,  # nobody wants it, and none at all is not to be had
            "prompt_logprobs": self._offer.top_k,
        }

    def _prompt(self, prompt_ids: np.ndarray) -> list[int] | str:
        ids = prompt_ids.tolist()
        return ids if self._offer.by_ids else self._tokenizer.decode(ids, skip_special_tokens=False)

    def read_written(self, reply: dict[str, Any]) -> Answer:
        """The completion in an answer. Errors: ReplyError."""
        choice = choice_of(reply)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ReplyError(f"the server finished with {reason!r}")
        ids = choice.get("token_ids")
        output_ids = self._ids_of_text(choice, reason) if ids is None else np.asarray(ids, np.int32)
        if not len(output_ids):
            return NOTHING
        if not self._offer.top_k:
            return Answer(output_ids, (), reason)
        return Answer(output_ids, (of_written(choice.get("logprobs"), output_ids, self._offer.top_k),), reason)

    def _ids_of_text(self, choice: dict[str, Any], reason: str) -> np.ndarray:
        text = choice.get("text")
        if not isinstance(text, str):
            raise ReplyError("the server's answer has neither token ids nor a text")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if reason == "stop" and not (ids and ids[-1] in self._stop_token_ids):
            ids += self._stop_token_ids[:1]  # it belongs to the completion, and servers leave it out of the text
        return np.asarray(ids, np.int32)

    def read_scored(self, reply: dict[str, Any], prompt_length: int, ids: np.ndarray) -> Answer:
        """The scores of given text (`ids` [P + T], of which P are prompt) in an answer. Errors: ReplyError."""
        tops = (choice_of(reply).get("prompt_logprobs") or [])[prompt_length:]
        output_ids = ids[prompt_length:].astype(np.int32)
        return Answer(output_ids, (of_given(tops, output_ids, self._offer.top_k),), "given")


def choice_of(reply: dict[str, Any]) -> dict[str, Any]:
    """The one choice of an answer. Errors: ReplyError."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ReplyError(f"the server's answer has no choices, but {sorted(reply)}")
    return choices[0]


def of_written(logprobs: dict[str, Any] | None, output_ids: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """`logprobs` of a choice of T tokens as columns, see `columns`. Errors: ReplyError."""
    names, of_tokens, tops = ((logprobs or {}).get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    _check_length(tops, len(output_ids))
    if not np.array_equal(ids_of_names(names), output_ids):
        raise ReplyError("the server's log-probabilities are those of other tokens than the text's")
    ids = ids_of_names([name for top in tops for name in top])
    values = [value for top in tops for value in top.values()]
    counts = np.array([len(top) for top in tops])
    return columns(ids, with_no_mass(values), counts, output_ids, with_no_mass(of_tokens), top_k)


def of_given(
    tops: Sequence[dict[str, dict[str, Any]] | None], output_ids: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`prompt_logprobs` of T tokens as columns, see `columns`. Errors: ReplyError."""
    _check_length(tops, len(output_ids))
    known = [top for top in tops if top is not None]
    try:
        of_tokens = [top[str(token)]["logprob"] for top, token in zip(known, output_ids.tolist(), strict=True)]
    except KeyError as error:
        raise ReplyError("the server's log-probabilities are those of other tokens than the text's") from error
    ids = np.array([int(token) for top in known for token in top], np.int32)
    values = [entry["logprob"] for top in known for entry in top.values()]
    counts = np.array([len(top) for top in known])
    return columns(ids, with_no_mass(values), counts, output_ids, with_no_mass(of_tokens), top_k)


def _check_length(tops: Sequence[dict[str, Any] | None], num_tokens: int) -> None:
    num_positions = sum(top is not None for top in tops)
    if num_positions != num_tokens:
        raise ReplyError(f"the server gives log-probabilities of {num_positions} positions for {num_tokens} tokens")


def columns(
    ids: np.ndarray, values: np.ndarray, counts: np.ndarray, sampled_ids: np.ndarray, sampled: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K + 1] and log-probabilities [T, K + 1] of T tokens, each token itself in front of its top-k.

    K is `top_k`, or as many as the position with the fewest has: all positions of an answer have one width.

    Args:
        ids, values: of all positions one after the other, `counts` [T] of them each. The token that stands there is among
            them, on top of the K where it is none of these; by rank it is then the last.
        sampled_ids, sampled: [T] of the tokens that stand there.
    """
    k = min(top_k, int(counts.min()))
    inside = np.arange(counts.max()) < counts[:, None]
    all_ids = np.zeros(inside.shape, np.int32)
    all_ids[inside] = ids
    all_values = np.full(inside.shape, -np.inf, np.float32)
    all_values[inside] = values
    order = np.argsort(-all_values, axis=1, kind="stable")[:, :k]
    return (
        np.column_stack((sampled_ids, np.take_along_axis(all_ids, order, axis=1))),
        np.column_stack((sampled, np.take_along_axis(all_values, order, axis=1))),
    )


def ids_of_names(names: Sequence[str]) -> np.ndarray:
    """int32 token ids of names `token_id:N`. Errors: ReplyError for a name that is a token's text, shared by many ids."""
    if any(not name.startswith(TOKEN_ID) for name in names):
        raise ReplyError("the server names tokens by their text, which different ids may share")
    return np.array([int(name[len(TOKEN_ID) :]) for name in names], np.int32)


def with_no_mass(values: Sequence[float]) -> np.ndarray:
    """float32 log-probabilities; what stands for none is -inf."""
    array = np.array(values, np.float32)
    array[array <= NO_MASS] = -np.inf
    return array
