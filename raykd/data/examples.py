"""Teacher output to training examples: the one way, whether it comes from the stream, the cache or a recorded file.

In:  a table with prompt columns (uid, messages_json, tools_json, prompt_ids, held_out, caws_tier, and for recorded
     conversations response_mask) and the columns of `TEACHER_OUTPUT_SCHEMA`.
Out: a table of `EXAMPLE_SCHEMA`, and a table of the rows that gave no example, with the reason.

The ids are the axis: what the teacher emitted (or scored) is never tokenised again. Text is decoded once per assistant
turn, searched once, and its spans become bits of `Mark` on the tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raykd.config import Config
from raykd.data.claims import claim_spans
from raykd.data.code_mode import code_mode_eligible, personal_data, tool_use
from raykd.data.detokenize import decode_tokens
from raykd.data.extractors import token_mask
from raykd.data.grammar import ToolGrammars, offered_schemas
from raykd.data.id_sets import CopyIndex, Turn
from raykd.data.integration import ResultIndex
from raykd.data.process_targets import SET_LOSSES, SeenResult, join_turns, process_targets
from raykd.data.refinement import decisions, refinement_tier
from raykd.sample_config import CodeModeConfig, HaltConfig
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source
from teacher_serving.identity import vocabulary_size

REJECTED_SCHEMA = pa.schema([("uid", pa.int64()), ("reason", pa.string())])


class BuiltExamples(NamedTuple):
    """What `build_examples` made of a batch: every row of the input is in exactly one of the two."""

    examples: pa.Table  # EXAMPLE_SCHEMA
    rejected: pa.Table  # REJECTED_SCHEMA


@dataclass(frozen=True)
class Wanted:
    """Which targets the losses of a run look at, and the rules for them. The default: marks of calls and reused values."""

    losses: frozenset[str] = frozenset()
    grammars: ToolGrammars | None = None  # where json_grammar is active
    halt: HaltConfig = HaltConfig()  # noqa: RUF009 (frozen)
    caws_tier: int = 2  # of loops whose row names none
    code_mode: CodeModeConfig = CodeModeConfig()  # noqa: RUF009 (frozen)

    @staticmethod
    def by(config: Config, tokenizer: Any) -> Wanted:
        """What a run wants; compiles nothing yet. Errors: ValueError of `ToolGrammars`."""
        losses = frozenset(config.loss.weights)
        grammars = ToolGrammars(tokenizer) if "json_grammar" in losses else None
        return Wanted(losses, grammars, config.halt, config.loss.caws_tier, config.code_mode)


def build_examples(teacher_rows: pa.Table, tokenizer: Any, wanted: Wanted = Wanted()) -> BuiltExamples:
    """Examples of a batch of teacher output, in order; rows without usable output are returned apart, with the reason.

    A row with a `response_mask` is a recorded conversation: its `output_ids` are the given text, the mask [T] says which of
    them the assistant wrote, and only their teacher scores are kept. Without one, the teacher wrote all of `output_ids`.
    `top_k` may be 0 (no scores).
    """
    columns = {name: teacher_rows[name].combine_chunks() for name in teacher_rows.column_names}
    is_token = known_ids(tokenizer, len(tokenizer))
    examples, rejected = [], []
    for index in range(teacher_rows.num_rows):
        row = _read_row(columns, index)
        reason = _unusable(row, is_token)
        if reason:
            rejected.append({"uid": row.uid, "reason": reason})
        else:
            ids, logprobs, log_tail = padding_to_tail(row.topk_ids, row.topk_logprobs, row.log_tail, is_token)
            row = replace(row, topk_ids=ids, topk_logprobs=logprobs, log_tail=log_tail)
            examples.append(_build(row, tokenizer, wanted))
    return BuiltExamples(examples_to_table(examples), pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))


@lru_cache(maxsize=4)
def known_ids(tokenizer: Any, num_tokens: int) -> np.ndarray:
    """Which ids [V] are tokens of a tokenizer, bool. `num_tokens`: of the tokenizer, which may be given more."""
    is_token = np.zeros(vocabulary_size(tokenizer), bool)
    is_token[list(tokenizer.get_vocab().values())] = True
    return is_token


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
    caws_tier: int  # 0: the row names none
    num_teacher_layers: int  # L
    hidden_states: np.ndarray  # [L*(P+T)*H]


def _read_row(columns: dict[str, pa.Array], index: int) -> _Row:
    def values(name: str, dtype: Any) -> np.ndarray:
        cell = columns[name][index].values if name in columns else None
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
        caws_tier=scalar("caws_tier", 0),
        num_teacher_layers=scalar("num_hidden_layers_shipped", 0),
        hidden_states=values("hidden_states", np.float16),
    )


def _unusable(row: _Row, is_token: np.ndarray) -> str | None:
    """Why a row gives no example, or None. `is_token`: of `known_ids`."""
    length = len(row.output_ids)
    if row.finish_reason.startswith("error"):
        return f"the teacher answered with {row.finish_reason}"
    if length == 0:
        return f"the teacher's output is empty (finish_reason {row.finish_reason!r})"
    if (padding := _is_padding(row.output_ids, is_token)).any():
        return (
            f"the teacher's output holds id {row.output_ids[padding].max()}, which is padding of its head: the tokenizer "
            f"has {len(is_token)} ids"
        )
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
    num_states = row.num_teacher_layers * (len(row.prompt_ids) + length)
    if len(row.hidden_states) % max(num_states, 1) or bool(num_states) != bool(len(row.hidden_states)):
        return (
            f"hidden_states has {len(row.hidden_states)} values, expected a multiple of {row.num_teacher_layers} layers x "
            f"{len(row.prompt_ids) + length} tokens"
        )
    return None


def _is_padding(ids: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """Which ids belong to rows of the teacher's head that are no token of it."""
    return (ids >= len(is_token)) | ~is_token[np.minimum(ids, len(is_token) - 1)]


def padding_to_tail(
    topk_ids: np.ndarray, topk_logprobs: np.ndarray, log_tail: np.ndarray, is_token: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top-k ids and log-probabilities [T*K] and tail [T] with the teacher's mass on padding rows of its head in the tail: a
    student has none there, no such row, or a token of its own. `is_token`: of `known_ids`."""
    padding = _is_padding(topk_ids, is_token)
    if not padding.any():
        return topk_ids, topk_logprobs, log_tail
    with np.errstate(divide="ignore"):
        on_padding = np.where(padding, np.exp(topk_logprobs.astype(np.float64)), 0.0)
        mass = on_padding.reshape(len(log_tail), -1).sum(axis=1)
        log_tail = np.logaddexp(log_tail.astype(np.float64), np.log(mass)).astype(np.float32)
    without = np.where(padding, np.float16(-np.inf), topk_logprobs)  # -inf: not among the K
    return np.where(padding, 0, topk_ids), without, log_tail


def _build(row: _Row, tokenizer: Any, wanted: Wanted) -> Example:
    mask = np.ones(len(row.output_ids), dtype=bool) if row.response_mask is None else row.response_mask
    turns = _runs(mask)
    messages = json.loads(row.messages_json)
    results = _results_before(messages, len(turns), recorded=row.response_mask is not None)
    schemas = offered_schemas(row.tools_json)
    copies = _copies(results, tokenizer) if wanted.losses & SET_LOSSES else {}
    targets, num_calls = [], 0  # calls in code included
    for (start, end), seen in zip(turns, results, strict=True):
        ids = row.output_ids[start:end]
        text, offsets = decode_tokens(tokenizer, ids)
        read = [SeenResult(result, copies.get(id(result))) for result in seen]
        turn = process_targets(Turn(text, offsets, ids, tokenizer), read, schemas, wanted.losses, wanted.grammars)
        if "claim_extraction" in wanted.losses:
            turn.marks[token_mask(offsets, claim_spans(text))] |= np.uint16(Mark.CLAIM)
        if "code_mode_preference" in wanted.losses:
            use = tool_use(text)
            num_calls += use.num_calls
            turn.marks[token_mask(offsets, use.code)] |= np.uint16(Mark.CODE_MODE)
            turn.marks[token_mask(offsets, use.direct)] |= np.uint16(Mark.DIRECT_TOOL)
        targets.append(turn)
    whole = join_turns([start for start, _ in turns], targets, len(mask))
    if "code_mode_preference" in wanted.losses and not _code_mode_pays(num_calls, messages, wanted.code_mode):
        whole.marks[:] &= ~np.uint16(Mark.CODE_MODE | Mark.DIRECT_TOOL)
    refined = messages if row.response_mask is not None else []
    halting = decisions(refined, turns, wanted.halt, default_tier=row.caws_tier or wanted.caws_tier)
    whole.marks[halting.position] |= np.uint16(Mark.DECISION)
    k, num_prompt = row.top_k, len(row.prompt_ids)
    return Example(
        uid=row.uid,
        source=Source.TEACHER if row.response_mask is None else Source.GOLD,
        input_ids=np.concatenate([row.prompt_ids, row.output_ids]),
        marks=np.concatenate([np.zeros(num_prompt, dtype=np.uint16), whole.marks]),
        topk_ids=row.topk_ids.reshape(-1, k)[mask] if k else np.empty((int(mask.sum()), 0), np.int32),
        topk_logprobs=row.topk_logprobs.reshape(-1, k)[mask] if k else np.empty((int(mask.sum()), 0), np.float16),
        log_tail=row.log_tail[mask] if k else np.empty(0, np.float32),
        teacher_id=row.teacher_id,
        held_out=row.held_out,
        num_calls=whole.num_calls,
        num_truncated_calls=whole.num_truncated_calls,
        missing=" ".join(f"{loss}:{reason}" for loss, reason in whole.missing.items()),
        quality=_quality(messages) if row.response_mask is not None else math.nan,
        caws_tier=row.caws_tier or refinement_tier(refined),
        halt_targets=halting.halt,
        set_position=whole.sets.position + np.int32(num_prompt),
        set_kind=whole.sets.kind,
        set_sizes=whole.sets.sizes,
        set_ids=whole.sets.ids,
        grammar_position=whole.grammar.position + np.int32(num_prompt),
        grammar_row=whole.grammar.row,
        grammar_masks=whole.grammar.masks,
        teacher_hidden=row.hidden_states.reshape(row.num_teacher_layers, num_prompt + len(mask), -1)
        if row.num_teacher_layers
        else np.empty((0, 0, 0), np.float16),
    )


def _copies(results: Sequence[Sequence[ResultIndex]], tokenizer: Any) -> dict[int, CopyIndex]:
    """Each result of the conversation as a `CopyIndex`, by the identity of its `ResultIndex`."""
    distinct = {id(result): result for seen in results for result in seen}
    return {key: CopyIndex("\n".join(result.texts), tokenizer) for key, result in distinct.items()}


def _code_mode_pays(num_calls: int, messages: Sequence[Mapping[str, Any]], config: CodeModeConfig) -> bool:
    """Is the sample, with all its turns and tool results, one for code mode?"""
    results = [message["content"] for message in messages if message["role"] == "tool" and message.get("content")]
    largest = max(map(len, results), default=0)
    private = personal_data(results, config.pii_patterns)
    return bool(code_mode_eligible(np.array([num_calls]), np.array([largest]), np.array([private]), config)[0])


def _quality(messages: Sequence[Mapping[str, Any]]) -> float:
    """Judge's score of the last assistant message; NaN without one."""
    scores = [message.get("judge_score") for message in messages if message["role"] == "assistant"]
    return math.nan if not scores or scores[-1] is None else float(scores[-1])


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


def examples_to_table(examples: Sequence[Example]) -> pa.Table:
    """Examples as a table of `EXAMPLE_SCHEMA`; the teacher's times, which an `Example` does not know, are 0."""
    columns: list[pa.Array] = []
    for field in EXAMPLE_SCHEMA:
        if pa.types.is_list(field.type):
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
    offsets = np.concatenate(([0], np.cumsum([len(array) for array in arrays], dtype=np.int64)))
    assert offsets[-1] < 2**31, f"{offsets[-1]} values of a column do not fit one table: fewer rows a call"
    flat = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, type=list_type.value_type), type=list_type)


def example_from_row(table: pa.Table, index: int) -> Example:
    """Row `index` of a table of `EXAMPLE_SCHEMA`."""
    row: dict[str, Any] = {}
    for field in EXAMPLE_SCHEMA:
        cell = table[field.name][index]
        row[field.name] = cell.values.to_numpy(zero_copy_only=False) if pa.types.is_list(field.type) else cell.as_py()
    del row["teacher_seconds"], row["teacher_wait_seconds"]
    top_k, layers = row.pop("top_k"), row.pop("num_teacher_layers")
    num_tokens = len(row["input_ids"])
    num_response = int(((row["marks"] & Mark.RESPONSE) != 0).sum())
    row["source"] = Source(row["source"])
    for name in ("topk_ids", "topk_logprobs"):
        row[name] = row[name].reshape(num_response, top_k)
    num_masks = int(row["grammar_row"].max(initial=-1)) + 1
    row["grammar_masks"] = row["grammar_masks"].reshape(num_masks, -1 if num_masks else 0)
    row["teacher_hidden"] = row["teacher_hidden"].reshape(layers, num_tokens if layers else 0, -1 if layers else 0)
    return Example(**row)


def decode_spans(example: Example, tokenizer: Any) -> dict[Mark, list[str]]:
    """The text under every mark, one string per run of marked tokens: what a reader checks, and the report colours."""
    return {
        mark: [
            decode_tokens(tokenizer, example.input_ids[start:end]).text for start, end in _runs((example.marks & mark) != 0)
        ]
        for mark in Mark
    }
