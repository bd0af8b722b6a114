"""Between Arrow tables and the engines' arrays: lists without copies, answers into TEACHER_OUTPUT_SCHEMA.

In:  a request table and one Answer a row, with the float32 log-probabilities as the engine gave them.
Out: a table of TEACHER_OUTPUT_SCHEMA, built from NumPy buffers: no Python object per token.

Shape letters: T output tokens of a row, N output tokens of the whole table, K top-k entries, V vocabulary,
C columns as an engine returns them (K, or K+1 with the sampled token in front), P prompt tokens, L shipped layers,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, TeacherInfo

TAIL_FLOOR = 2.0**-24
"""Tail mass below which 1 - sum(p) of float32 log-probabilities is rounding noise (half an ulp of 1)."""

NO_STATES = np.empty((0, 0, 0), np.float16)


class Answer(NamedTuple):
    """What an engine has to say about one row, in full precision."""

    output_ids: np.ndarray  # [T] int32
    pieces: Sequence[tuple[np.ndarray, np.ndarray]]  # (ids, logprobs), each [n, C]; the n add up to T
    finish_reason: str
    states: np.ndarray = NO_STATES  # [L, P + T, H] float16, see `shipped_states`

    @staticmethod
    def error(reason: str) -> Answer:
        """A row that has no answer, and says why."""
        return Answer(np.empty(0, np.int32), (), f"error: {reason}")


NOTHING = Answer.error("the teacher returned nothing")
"""The answer of a teacher that finished without a single token."""


class ListColumn(NamedTuple):
    """A list<int32> column as two arrays: row r is values[offsets[r]:offsets[r + 1]]. A null row is empty."""

    values: np.ndarray
    offsets: np.ndarray  # [rows + 1]

    @staticmethod
    def of(table: pa.Table, name: str) -> ListColumn:
        """The named column, without a copy where it is one chunk of int32."""
        column = table.column(name).cast(pa.list_(pa.int32())).combine_chunks()
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return ListColumn(array.flatten().to_numpy(zero_copy_only=True), offsets)

    def row(self, index: int) -> np.ndarray:
        """One row's values."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[rows] number of values of each."""
        return np.diff(self.offsets)

    def row_any(self, values: np.ndarray) -> np.ndarray:
        """[rows] bool: whether any of a row's values (a bool for each) is set."""
        counts = np.concatenate(([0], np.cumsum(values)))
        return counts[self.offsets[1:]] > counts[self.offsets[:-1]]


def find_problems(table: pa.Table, info: TeacherInfo, *, context: int) -> list[str | None]:
    """For every row why the engine must not be given it, or None.

    `context` is the most tokens a row may have: prompt and one token to be written, or prompt and given output.
    """
    prompt = ListColumn.of(table, "prompt_ids")
    outside = prompt.row_any((prompt.values < 0) | (prompt.values >= info.vocab_size))
    num_tokens = prompt.lengths
    if "output_ids" in table.column_names:
        output = ListColumn.of(table, "output_ids")
        outside |= output.row_any((output.values < 0) | (output.values >= info.vocab_size))
        num_tokens = num_tokens + output.lengths
    else:
        num_tokens = num_tokens + 1

    def problem(row: int) -> str | None:
        if prompt.lengths[row] == 0:
            return "the prompt is empty"
        if num_tokens[row] > context:
            return f"{num_tokens[row]} tokens are needed, the teacher's context has {context}"
        if outside[row]:
            return f"a token id is outside the vocabulary of {info.vocab_size}"
        return None

    return [problem(row) for row in range(table.num_rows)]


def request_seed(seed: int, uid: int, attempt: int) -> int:
    """One of 2**31 seeds for one prompt and try, by a multiply-xorshift hash (splitmix64)."""
    x = (uid ^ (seed * 0x9E3779B97F4A7C15) ^ (attempt * 0xD1B54A32D192ED03)) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) & (2**31 - 1)


def split_columns(
    ids: np.ndarray, logprobs: np.ndarray, sampled_ids: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top-k entries in rank order and the sampled token's log-probability, from what an engine returned.

    ids, logprobs: [N, C], the sampled token in column 0. With C > K the other columns are the top-k in rank order,
    whether the sampled token is among them or not: column 0 is dropped. With C = K the sampled token was taken out of
    its rank: it is sorted back in. Returns ids [N, K], logprobs [N, K], sampled logprob [N].
    """
    num_columns = ids.shape[1]
    assert num_columns >= top_k, f"the engine returned {num_columns} columns, expected {top_k} or {top_k + 1}"
    assert np.array_equal(ids[:, 0], sampled_ids), "column 0 of the engine's log-probabilities is not the sampled token"
    sampled_logprob = logprobs[:, 0]
    if num_columns > top_k:
        return ids[:, 1 : top_k + 1], logprobs[:, 1 : top_k + 1], sampled_logprob
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1), sampled_logprob


def log_tail(topk_logprobs: np.ndarray, vocab_size: int) -> np.ndarray:
    """Log of the probability outside the top-k: [N, K] float32 in rank order -> [N] float32.

    log(1 - sum p) in float64, within two bounds: no less than TAIL_FLOOR, below which float32 log-probabilities say
    nothing; and no more than V - K times the least of the top-k, which each of the others stays under. So a position
    without doubt gets a tail as small as it is, and K = V gives -inf.
    """
    probabilities = np.exp(topk_logprobs.astype(np.float64))
    rest = np.maximum(1.0 - probabilities.sum(axis=1), TAIL_FLOOR)
    bound = (vocab_size - topk_logprobs.shape[1]) * probabilities[:, -1]
    with np.errstate(divide="ignore"):
        return np.log(np.minimum(rest, bound)).astype(np.float32)


def half_states(states: np.ndarray) -> np.ndarray:
    """States of any float type as float16; what is out of its range is at the end of it."""
    limit = np.finfo(np.float16).max
    return states.clip(-limit, limit).astype(np.float16)


def shipped_states(states: np.ndarray, num_tokens: int) -> np.ndarray:
    """States [L, num_tokens, H] as they are shipped: NaN at the last token, where no engine that writes has one.

    The last token written was never read by the model, and its state would predict what nobody asks for. So that text has
    the same states whether it was written or given, and by whichever engine, given text has none there either.

    Args:
        states: [L, n, H] float16 of at least the num_tokens - 1 first tokens.
    """
    num_layers, num_states, hidden_size = states.shape
    assert num_states >= num_tokens - 1, f"states of {num_states} tokens for a sequence of {num_tokens}"
    shipped = np.full((num_layers, num_tokens, hidden_size), np.nan, np.float16)
    shipped[:, :-1] = states[:, : num_tokens - 1]
    return shipped


def same_answer(a: Answer, b: Answer) -> bool:
    """Whether two runs of one request agree; a lone request repeats itself but for rounding."""
    if not np.array_equal(a.output_ids, b.output_ids) or a.finish_reason != b.finish_reason:
        return False
    ids_a, ids_b = (np.concatenate([ids for ids, _ in x.pieces]) for x in (a, b))
    logprobs_a, logprobs_b = (np.concatenate([logprobs for _, logprobs in x.pieces]) for x in (a, b))
    return np.array_equal(ids_a, ids_b) and np.allclose(logprobs_a, logprobs_b, rtol=1e-4, atol=1e-4)


def answers_table(rows: pa.Table, answers: Sequence[Answer], info: TeacherInfo, top_k: int, weight_version: str) -> pa.Table:
    """One answer for every row of the request, as a table of TEACHER_OUTPUT_SCHEMA. With `top_k` 0 there are no scores."""
    assert len(answers) == rows.num_rows, f"{len(answers)} answers for {rows.num_rows} rows"
    lengths = np.array([len(answer.output_ids) for answer in answers], np.int64)
    assert lengths.sum() * top_k < 2**31, f"{lengths.sum()} tokens x {top_k} do not fit one table: fewer rows a call"
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    output_ids = _joined([answer.output_ids for answer in answers], np.empty(0, np.int32))
    pieces = [piece for answer in answers for piece in answer.pieces]
    ids = _joined([piece[0] for piece in pieces], np.empty((0, top_k + 1), np.int32))
    logprobs = _joined([piece[1] for piece in pieces], np.empty((0, top_k + 1), np.float32))
    scored_offsets = offsets if top_k else np.zeros_like(offsets)
    num_scored = scored_offsets[-1]
    assert len(ids) == num_scored, f"log-probabilities of {len(ids)} positions for {num_scored} tokens"
    topk_ids, topk_logprobs, sampled_logprob = split_columns(ids, logprobs, output_ids[:num_scored], top_k)
    tail = log_tail(topk_logprobs, info.vocab_size) if top_k else np.empty(0, np.float32)
    with np.errstate(over="ignore"):  # below -65504 is -inf
        half = topk_logprobs.astype(np.float16)
    states = [answer.states.reshape(-1) for answer in answers]
    state_offsets = np.concatenate(([0], np.cumsum([len(part) for part in states], dtype=np.int64)))
    assert state_offsets[-1] < 2**31, f"{state_offsets[-1]} hidden values do not fit one table: fewer rows a call"
    num_rows = rows.num_rows
    columns = {
        "uid": rows.column("uid"),
        "prompt_ids": rows.column("prompt_ids"),
        "output_ids": _list_array(output_ids, offsets, pa.int32()),
        "topk_ids": _list_array(topk_ids, offsets * top_k, pa.int32()),
        "topk_logprobs": _list_array(half, offsets * top_k, pa.float16()),
        "log_tail": _list_array(tail, scored_offsets, pa.float32()),
        "sampled_logprob": _list_array(sampled_logprob, scored_offsets, pa.float32()),
        "top_k": pa.repeat(pa.scalar(top_k, pa.int32()), num_rows),
        "finish_reason": pa.array([answer.finish_reason for answer in answers], pa.string()),
        "teacher_id": pa.repeat(info.teacher_id, num_rows),
        "teacher_fingerprint": pa.repeat(info.fingerprint, num_rows),
        "weight_version": pa.repeat(weight_version, num_rows),
        "num_hidden_layers_shipped": pa.array([len(answer.states) for answer in answers], pa.int32()),
        "hidden_states": _list_array(_joined(states, np.empty(0, np.float16)), state_offsets, pa.float16()),
    }
    return pa.table(columns).cast(TEACHER_OUTPUT_SCHEMA)


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays) if arrays else empty


def _list_array(values: np.ndarray, offsets: np.ndarray, value_type: pa.DataType) -> pa.ListArray:
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, value_type))
