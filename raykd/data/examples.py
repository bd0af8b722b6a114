"""Teacher output to training examples: the one way, whether it comes from the stream, the cache or a recorded file.

In:  a table with prompt columns (uid, messages_json, tools_json, prompt_ids, held_out, and for recorded conversations
     response_mask) and the columns of `TEACHER_OUTPUT_SCHEMA`.
Out: a table of `EXAMPLE_SCHEMA`, and a table of the rows that gave no example, with the reason.

The ids are the axis: what the teacher emitted (or scored) is never tokenised again. Text is decoded once per assistant
turn, searched once, and its spans become bits of `Mark` on the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raykd.data.detokenize import decode_tokens
from raykd.data.integration import ResultIndex
from raykd.data.process_targets import mark_turn
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source
from teacher_serving.identity import vocabulary_size

REJECTED_SCHEMA = pa.schema([("uid", pa.int64()), ("reason", pa.string())])


class BuiltExamples(NamedTuple):
    """What `build_examples` made of a batch: every row of the input is in exactly one of the two."""

    examples: pa.Table  # EXAMPLE_SCHEMA
    rejected: pa.Table  # REJECTED_SCHEMA


def build_examples(teacher_rows: pa.Table, tokenizer: Any) -> BuiltExamples:
    """Examples of a batch of teacher output, in order; rows without usable output are returned apart, with the reason.

    A row with a `response_mask` is a recorded conversation: its `output_ids` are the given text, the mask [T] says which of
    them the assistant wrote, and only their teacher scores are kept. Without one, the teacher wrote all of `output_ids`.
    `top_k` may be 0 (no scores).
    """
    columns = {name: teacher_rows[name].combine_chunks() for name in teacher_rows.column_names}
    num_ids = vocabulary_size(tokenizer)
    examples, rejected = [], []
    for index in range(teacher_rows.num_rows):
        row = _read_row(columns, index)
        reason = _unusable(row, num_ids)
        if reason:
            rejected.append({"uid": row.uid, "reason": reason})
        else:
            examples.append(_build(_without_padding_ids(row, num_ids), tokenizer))
    return BuiltExamples(examples_to_table(examples), pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))


@dataclass(frozen=True)
class _Row:
    """One row of the input, as views of its Arrow buffers."""

    uid: int
    held_out: bool
    messages_json: str
    tools_json: str
    prompt_ids: np.ndarray  # [P]
    output_ids: np.ndarray  # [T]
    response_mask: np.ndarray | None  # [T]
    topk_ids: np.ndarray  # [T*K]
    topk_logprobs: np.ndarray
    log_tail: np.ndarray  # [T]
    top_k: int
    finish_reason: str
    teacher_id: str


def _read_row(columns: dict[str, pa.Array], index: int) -> _Row:
    def values(name: str, dtype: Any) -> np.ndarray:
        cell = columns[name][index].values
        return np.empty(0, dtype) if cell is None else cell.to_numpy(zero_copy_only=False).astype(dtype, copy=False)

    def scalar(name: str, default: Any) -> Any:
        value = columns[name][index].as_py() if name in columns else None
        return default if value is None else value

    has_mask = "response_mask" in columns and columns["response_mask"][index].is_valid
    return _Row(
        uid=columns["uid"][index].as_py(),
        held_out=scalar("held_out", False),
        messages_json=scalar("messages_json", "[]"),
        tools_json=scalar("tools_json", "[]"),
        prompt_ids=values("prompt_ids", np.int32),
        output_ids=values("output_ids", np.int32),
        response_mask=values("response_mask", np.bool_) if has_mask else None,
        topk_ids=values("topk_ids", np.int32),
        topk_logprobs=values("topk_logprobs", np.float16),
        log_tail=values("log_tail", np.float32),
        top_k=scalar("top_k", 0),
        finish_reason=scalar("finish_reason", ""),
        teacher_id=scalar("teacher_id", ""),
    )


def _unusable(row: _Row, num_ids: int) -> str | None:
    """Why a row gives no example, or None. `num_ids`: those that the tokenizer knows."""
    length = len(row.output_ids)
    if row.finish_reason.startswith("error"):
        return f"the teacher answered with {row.finish_reason}"
    if length == 0:
        return f"the teacher's output is empty (finish_reason {row.finish_reason!r})"
    if (largest := row.output_ids.max()) >= num_ids:
        return f"the teacher's output holds id {largest}, which is padding of its head: the tokenizer has {num_ids} ids"
    if len(row.prompt_ids) == 0:
        return "the prompt has no tokens, so nothing predicts the first response token"
    if row.response_mask is not None and len(row.response_mask) != length:
        return f"response_mask has {len(row.response_mask)} entries, expected one for each of {length} recorded tokens"
    if row.response_mask is not None and not row.response_mask.any():
        return "no token of the recorded conversation was written by the assistant"
    expected = length * row.top_k
    if len(row.topk_ids) != expected or len(row.topk_logprobs) != expected:
        return f"{len(row.topk_ids)} top-k entries found, expected {length} tokens x K {row.top_k} = {expected}"
    if row.top_k and len(row.log_tail) != length:
        return f"log_tail has {len(row.log_tail)} entries, expected {length}"
    return None


def _without_padding_ids(row: _Row, num_ids: int) -> _Row:
    """The row with the teacher's mass on padding rows of its head in the tail: a student has none there, or no such row."""
    padding = row.topk_ids >= num_ids
    if not padding.any():
        return row
    with np.errstate(divide="ignore"):
        mass = np.where(padding, np.exp(row.topk_logprobs.astype(np.float64)), 0.0).reshape(-1, row.top_k).sum(axis=1)
        log_tail = np.logaddexp(row.log_tail.astype(np.float64), np.log(mass)).astype(np.float32)
    return replace(
        row,
        topk_ids=np.where(padding, 0, row.topk_ids),
        topk_logprobs=np.where(padding, np.float16(-np.inf), row.topk_logprobs),  # -inf: not among the K
        log_tail=log_tail,
    )


def _build(row: _Row, tokenizer: Any) -> Example:
    mask = np.ones(len(row.output_ids), dtype=bool) if row.response_mask is None else row.response_mask
    turns = _runs(mask)
    results = _results_before(json.loads(row.messages_json), len(turns), recorded=row.response_mask is not None)
    tool_names = _tool_names(row.tools_json)
    output_marks = np.zeros(len(mask), dtype=np.uint16)
    num_calls = num_truncated = 0
    for (start, end), seen in zip(turns, results, strict=True):
        text, offsets = decode_tokens(tokenizer, row.output_ids[start:end])
        turn = mark_turn(text, offsets, seen, tool_names)
        output_marks[start:end] = turn.marks
        num_calls += turn.num_calls
        num_truncated += turn.num_truncated_calls
    k = row.top_k
    return Example(
        uid=row.uid,
        source=Source.TEACHER if row.response_mask is None else Source.GOLD,
        input_ids=np.concatenate([row.prompt_ids, row.output_ids]),
        marks=np.concatenate([np.zeros(len(row.prompt_ids), dtype=np.uint16), output_marks]),
        topk_ids=row.topk_ids.reshape(-1, k)[mask] if k else np.empty((int(mask.sum()), 0), np.int32),
        topk_logprobs=row.topk_logprobs.reshape(-1, k)[mask] if k else np.empty((int(mask.sum()), 0), np.float16),
        log_tail=row.log_tail[mask] if k else np.empty(0, np.float32),
        teacher_id=row.teacher_id,
        held_out=row.held_out,
        num_calls=num_calls,
        num_truncated_calls=num_truncated,
    )


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _results_before(messages: list[dict[str, Any]], num_turns: int, *, recorded: bool) -> list[list[ResultIndex]]:
    """The tool results seen before each assistant turn.

    In a recorded conversation the last turn is the last assistant message, and so on backwards, because a conversation may
    have been cut from the left. A completion that the teacher wrote comes after all messages.
    """
    seen: list[ResultIndex] = []
    before: list[list[ResultIndex]] = []
    for message in messages:
        if message["role"] == "assistant":
            before.append(list(seen))
        elif message["role"] == "tool" and message.get("content"):
            seen.append(ResultIndex([message["content"]]))
    if not recorded:
        return [seen] * num_turns
    missing = max(0, num_turns - len(before))
    return [[] for _ in range(missing)] + before[len(before) - (num_turns - missing) :]


def _tool_names(tools_json: str) -> frozenset[str]:
    return frozenset(tool.get("function", tool)["name"] for tool in json.loads(tools_json))


def examples_to_table(examples: Sequence[Example]) -> pa.Table:
    """Examples as a table of `EXAMPLE_SCHEMA`; the teacher's times, which an `Example` does not know, are 0."""
    lists = {"input_ids", "marks", "topk_ids", "topk_logprobs", "log_tail"}
    columns: list[pa.Array] = []
    for field in EXAMPLE_SCHEMA:
        if field.name in lists:
            columns.append(_list_array([getattr(e, field.name).reshape(-1) for e in examples], field.type))
        elif field.name == "top_k":
            columns.append(pa.array([e.topk_ids.shape[1] for e in examples], type=field.type))
        elif field.name in ("teacher_seconds", "teacher_wait_seconds"):
            columns.append(pa.array(np.zeros(len(examples), dtype=np.float32)))
        else:
            columns.append(pa.array([getattr(e, field.name) for e in examples], type=field.type))
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA)


def _list_array(arrays: list[np.ndarray], list_type: pa.ListType) -> pa.ListArray:
    dtype = list_type.value_type.to_pandas_dtype()
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=list_type.value_type), type=list_type)


def example_from_row(table: pa.Table, index: int) -> Example:
    """Row `index` of a table of `EXAMPLE_SCHEMA`."""
    row = {name: table[name][index] for name in EXAMPLE_SCHEMA.names}
    k = row["top_k"].as_py()
    marks = row["marks"].values.to_numpy()
    num_response = int(((marks & Mark.RESPONSE) != 0).sum())
    return Example(
        uid=row["uid"].as_py(),
        source=Source(row["source"].as_py()),
        input_ids=row["input_ids"].values.to_numpy(),
        marks=marks,
        topk_ids=row["topk_ids"].values.to_numpy().reshape(num_response, k),
        topk_logprobs=row["topk_logprobs"].values.to_numpy().reshape(num_response, k),
        log_tail=row["log_tail"].values.to_numpy(),
        teacher_id=row["teacher_id"].as_py(),
        held_out=row["held_out"].as_py(),
        num_calls=row["num_calls"].as_py(),
        num_truncated_calls=row["num_truncated_calls"].as_py(),
    )


def decode_spans(example: Example, tokenizer: Any) -> dict[Mark, list[str]]:
    """The text under every mark, one string per run of marked tokens: what a reader checks, and the report colours."""
    return {
        mark: [
            decode_tokens(tokenizer, example.input_ids[start:end]).text for start, end in _runs((example.marks & mark) != 0)
        ]
        for mark in Mark
    }
