"""Teacher scores of an offline row, brought into the stream's form: K ids, their log-probabilities, the mass outside.

In:  `topk_ids` and `topk_logprobs`, or `teacher_logits`, of a row. Out: `Scores`, a row for every output token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from raykd.data.conversation import RowError
from raykd.data.offline_fields import read_floats, read_ids, read_number

MASS_TOLERANCE = 0.02
"""Half-precision log-probabilities of K entries may add up to a little more than 1."""
LEAST_TAIL = 1e-10
"""Mass outside the K where rounding leaves none: a logarithm must exist."""


class Scores(NamedTuple):
    """Teacher scores of T output tokens. K is 0 where the row has none."""

    topk_ids: np.ndarray  # int32 [T, K]
    topk_logprobs: np.ndarray  # float16 [T, K], nats; -inf: missing
    log_tail: np.ndarray  # float32 [T], nats; [0] where K is 0


def read_scores(fields: Mapping[str, Any], num_prompt: int, num_output: int, vocab_size: int, top_k: int) -> Scores:
    """Scores of the output tokens; `top_k` is the K that logits are reduced to.

    Where the row has everything but the last token (the end-of-text token, which its author did not write), that one has no
    scores. Raises RowError.
    """
    if "topk_ids" in fields:
        scores = _from_topk(fields, num_output, vocab_size)
    elif "teacher_logits" in fields:
        logits = _logits_of_output(fields["teacher_logits"], num_prompt, num_output, vocab_size)
        scores = scores_of_logits(logits, min(top_k, vocab_size), vocab_size)
    else:
        none = np.empty((num_output, 0))
        return Scores(none.astype(np.int32), none.astype(np.float16), np.empty(0, np.float32))
    missing = num_output - len(scores.topk_ids)
    if not missing:
        return scores
    return Scores(
        np.pad(scores.topk_ids, ((0, missing), (0, 0))),
        np.pad(scores.topk_logprobs, ((0, missing), (0, 0)), constant_values=-np.inf),
        np.pad(scores.log_tail, (0, missing)),
    )


def _from_topk(fields: Mapping[str, Any], num_output: int, vocab_size: int) -> Scores:
    ids = read_ids(fields["topk_ids"], "topk_ids", vocab_size)
    logprobs = read_floats(fields.get("topk_logprobs"), "topk_logprobs", missing=-np.inf)
    if ids.shape != logprobs.shape:
        raise RowError(f"topk_ids has shape {list(ids.shape)} and topk_logprobs {list(logprobs.shape)}, expected the same")
    if ids.ndim == 1:
        k = int(read_number(fields.get("top_k"), "top_k", 1, vocab_size))
        if len(ids) % k:
            raise RowError(f"topk_ids has {len(ids)} entries, expected a multiple of top_k={k}")
        ids, logprobs = ids.reshape(-1, k), logprobs.reshape(-1, k)
    if ids.ndim != 2 or len(ids) not in (num_output, num_output - 1):
        raise RowError(f"topk_ids has {len(ids)} rows, expected one for each of {num_output} output tokens")
    mass = np.exp(logprobs).sum(axis=1)
    if (logprobs > MASS_TOLERANCE).any() or (mass > 1 + MASS_TOLERANCE).any():
        raise RowError(f"topk_logprobs are no log-probabilities: those of one token add up to {mass.max():.3g}")
    if "log_tail" in fields:
        log_tail = read_floats(fields["log_tail"], "log_tail", missing=-np.inf)
        if log_tail.shape != (len(ids),):
            raise RowError(f"`log_tail` has {log_tail.size} entries, expected {len(ids)}")
    else:
        log_tail = np.log(np.maximum(1 - mass, LEAST_TAIL))
    return Scores(ids, logprobs.astype(np.float16), log_tail.astype(np.float32))


def _logits_of_output(value: Any, num_prompt: int, num_output: int, vocab_size: int) -> np.ndarray:
    """The logits [T or T - 1, V] that predict the output tokens.

    The rows may be those of the output tokens, or of the whole sequence, where row t predicts token t + 1; in either case
    with or without the one that predicts the last token.
    """
    logits = read_floats(value, "teacher_logits")
    if logits.ndim == 1 and len(logits) % vocab_size == 0:
        logits = logits.reshape(-1, vocab_size)
    if logits.ndim != 2 or logits.shape[1] < vocab_size:
        raise RowError(
            f"`teacher_logits` has shape {list(logits.shape)}, expected rows of {vocab_size} or more: one per token id"
        )
    if (logits == -np.inf).all(axis=1).any():
        raise RowError("`teacher_logits` has a row of -inf only")
    whole = num_prompt + num_output - 1
    if len(logits) in (num_output, num_output - 1):
        return logits
    if len(logits) in (whole, whole - 1):
        return logits[num_prompt - 1 :]
    raise RowError(
        f"`teacher_logits` has {len(logits)} rows, expected {num_output} (one per output token) or {whole} (row t predicts "
        "token t + 1 of the sequence)"
    )


def scores_of_logits(logits: np.ndarray, top_k: int, vocab_size: int) -> Scores:
    """The K likeliest ids per row of logits [T, >= V], and the mass of all others (columns beyond the vocabulary too)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs[:, :vocab_size], axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(logprobs, ids, axis=1)
    np.put_along_axis(logprobs, ids, -np.inf, axis=1)
    tail = np.exp(logprobs).sum(axis=1)
    if logprobs.shape[1] > top_k:  # 0 only where nothing is outside
        tail = np.maximum(tail, LEAST_TAIL)
    with np.errstate(divide="ignore"):
        return Scores(ids.astype(np.int32), chosen.astype(np.float16), np.log(tail).astype(np.float32))
