"""Offline rows to examples, through the same function as the stream.

In:  rows as read from JSONL (fields: `offline_fields.py`), and the tokenizer.
Out: per row an `Example`, or the reason why there is none.

Prompt and response are tokenised as one string; the tokens that touch the response are its tokens. Rows that bring their
tokens are not tokenised.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raykd.data.chat import render_prompt
from raykd.data.conversation import RowError, read_conversation
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import BuiltExamples, build_examples, example_from_row
from raykd.data.extractors import token_mask
from raykd.data.halt_targets import halt_targets
from raykd.data.offline_fields import (
    gather_fields,
    kind,
    read_floats,
    read_ids,
    read_mask,
    read_number,
    read_spans,
    read_text,
)
from raykd.data.offline_scores import Scores, read_scores
from raykd.data.process_targets import TOOL_NAME_WEIGHTS, TurnSpans, marks_of_spans
from raykd.data.uids import hash_uid
from raykd.loss_config import HaltConfig
from raykd.types import ARGUMENT_MARKS, Example, Mark, Source, Span
from teacher_serving.identity import vocabulary_size

Build = Callable[[pa.Table, Any], BuiltExamples]

GIVEN_MARKS = Mark.CODE_MODE | Mark.DIRECT_TOOL
SPAN_MARKS = Mark.TOOL_NAME | ARGUMENT_MARKS | Mark.INTEGRATION


@dataclass(frozen=True)
class RowReader:
    """What decides how an offline row becomes an example."""

    tokenizer: Any
    top_k: int = 50  # stored logits are reduced to so many
    max_tokens: int | None = None  # of prompt and response; longer rows are rejected, never cut
    build: Build = build_examples
    halt: HaltConfig = field(default_factory=HaltConfig)  # the rule for rows that are a loop of a refinement

    @functools.cached_property
    def num_ids(self) -> int:
        """Ids that the tokenizer knows."""
        return vocabulary_size(self.tokenizer)

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[Example | str]:
        """Per row an example, or the reason why there is none."""
        read: list[_OfflineRow | str] = []
        for row in rows:
            try:
                read.append(self._read(row))
            except RowError as error:
                read.append(str(error))
        usable = [(index, row) for index, row in enumerate(read) if isinstance(row, _OfflineRow)]
        if not usable:
            return [row for row in read if isinstance(row, str)]
        built, rejected = self.build(_teacher_table(usable), self.tokenizer)
        results: dict[int, Example | str] = {i: row for i, row in enumerate(read) if isinstance(row, str)}
        results |= dict(zip(rejected["uid"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
        for position in range(built.num_rows):
            example = example_from_row(built, position)
            row = read[example.uid]
            assert isinstance(row, _OfflineRow), "a rejected row was built"
            results[example.uid] = _complete(example, row)
        return [results[index] for index in range(len(rows))]

    def _read(self, row: Mapping[str, Any]) -> _OfflineRow:
        fields = gather_fields(row)
        given = "output_ids" in fields
        tokens = _read_given_tokens(fields, self.tokenizer, self.num_ids) if given else _tokenize(fields, self.tokenizer)
        num_prompt, num_output = len(tokens.prompt_ids), len(tokens.output_ids)
        if self.max_tokens is not None and num_prompt + num_output > self.max_tokens:
            raise RowError(
                f"prompt and response have {num_prompt} + {num_output} tokens, expected at most {self.max_tokens}; shorten "
                "the row or raise the context"
            )
        _compare_pieces(fields, tokens, self.tokenizer, self.num_ids)
        messages, tools = read_context(fields)
        return _OfflineRow(
            uid=_uid(fields),
            tokens=tokens,
            messages_json=json.dumps(messages, ensure_ascii=False),
            tools_json=json.dumps(tools, ensure_ascii=False),
            scores=read_scores(fields, num_prompt, num_output, self.num_ids, self.top_k),
            teacher_id=_string(fields, "teacher_id"),
            source=_source(fields),
            output_marks=_extra_marks(fields, tokens),
            spans=_turn_spans(fields, tokens),
            columns=self._columns(fields, num_prompt + num_output),
        )

    def _columns(self, fields: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
        """Fields of `Example` that the stream does not know."""
        columns: dict[str, Any] = {}
        if "teacher_quality_score" in fields:
            columns["quality"] = read_number(fields["teacher_quality_score"], "teacher_quality_score", 0.0, 1.0)
        source = fields.get("tool_name_source")
        if source is not None:
            if source not in TOOL_NAME_WEIGHTS:
                raise RowError(f"`tool_name_source` is {kind(source)}, expected one of {', '.join(TOOL_NAME_WEIGHTS)}")
            columns["tool_name_weight"] = TOOL_NAME_WEIGHTS[source]
        if "teacher_hidden_states" in fields:
            states = read_floats(fields["teacher_hidden_states"], "teacher_hidden_states")
            if states.ndim != 3 or states.shape[1] != num_tokens:
                raise RowError(
                    f"`teacher_hidden_states` has shape {list(states.shape)}, expected [layers, {num_tokens} tokens, hidden]"
                )
            columns["teacher_hidden"] = states.astype(np.float16)
        if "loop_index" in fields:
            columns["halt_targets"] = np.array([_halt_target(fields, self.halt)], np.float32)
        return columns


class _Tokens(NamedTuple):
    """The tokens of a row of R output tokens."""

    prompt_ids: np.ndarray  # int32 [P]
    output_ids: np.ndarray  # int32 [R]
    offsets: np.ndarray  # int64 [R, 2] characters of `text`
    text: str  # the response as the row has it
    finish_reason: str
    response_mask: np.ndarray | None  # bool [R]; None: all


@dataclass(frozen=True)
class _OfflineRow:
    """A checked row."""

    uid: int
    tokens: _Tokens
    messages_json: str
    tools_json: str
    scores: Scores
    teacher_id: str
    source: Source | None  # None: as the tokens say
    output_marks: np.ndarray  # uint16 [R], marks on top of those found in the text
    spans: TurnSpans | None  # in place of those found in the text
    columns: dict[str, Any]


def check_row(row: Mapping[str, Any]) -> int:
    """The uid of a row, and whatever can be seen to be wrong without a tokenizer, as RowError."""
    fields = gather_fields(row)
    if "output_ids" in fields:
        if "prompt_ids" not in fields:
            raise RowError("`output_ids` without `prompt_ids`; expected both, or prompt and teacher_text")
        return _uid(fields)
    if "prompt" not in fields and "messages" not in fields:
        raise RowError(f"row has neither `prompt` nor `messages` nor `prompt_ids`; found {sorted(row)}")
    if "teacher_text" not in fields:
        raise RowError(f"row has no `teacher_text`; found {sorted(row)}")
    read_text(fields["teacher_text"], "teacher_text")
    if "prompt" in fields:
        read_text(fields["prompt"], "prompt")
    return _uid(fields)


def _uid(fields: Mapping[str, Any]) -> int:
    """The row's own `uid`, else a hash of its prompt and response."""
    uid = fields.get("uid")
    if uid is not None:
        if type(uid) is not int or not 0 <= uid < 2**63:
            raise RowError(f"`uid` is {kind(uid)}, expected an integer from 0 to 2**63 - 1")
        return uid
    content = [fields.get(name) for name in ("prompt", "messages", "tools", "prompt_ids", "teacher_text", "output_ids")]
    return hash_uid(json.dumps(content, sort_keys=True))


def _read_given_tokens(fields: Mapping[str, Any], tokenizer: Any, num_ids: int) -> _Tokens:
    prompt_ids = read_ids(fields.get("prompt_ids"), "prompt_ids", num_ids)
    output_ids = read_ids(fields["output_ids"], "output_ids", num_ids)
    text, offsets = decode_tokens(tokenizer, output_ids)
    given = fields.get("teacher_text", text)
    if given != text:
        raise RowError(
            f"`output_ids` spell {text[:40]!r}, `teacher_text` is {kind(given)}: other text, or ids of another tokenizer"
        )
    mask = fields.get("response_mask")
    return _Tokens(
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        offsets=offsets,
        text=text,
        finish_reason=_string(fields, "finish_reason"),
        response_mask=None if mask is None else read_mask(mask, "response_mask", len(output_ids)),
    )


def _tokenize(fields: Mapping[str, Any], tokenizer: Any) -> _Tokens:
    if "response_mask" in fields:
        raise RowError("`response_mask` without `output_ids`: expected the tokens that it speaks of")
    response = read_text(fields.get("teacher_text"), "teacher_text")
    if "prompt" in fields:
        prompt = read_text(fields["prompt"], "prompt")
    else:
        conversation = read_conversation({"messages": fields.get("messages"), "tools": fields.get("tools")}, "teacher")
        prompt = render_prompt(tokenizer, conversation.messages, conversation.tools)
    finish_reason = _string(fields, "finish_reason") or "stop"
    end = tokenizer.eos_token or ""
    text = prompt + response
    if finish_reason != "length" and not response.endswith(end):
        text += end
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    is_response = token_mask(offsets, [Span(len(prompt), len(text))])
    first = int(np.argmax(is_response)) if is_response.any() else len(ids)
    return _Tokens(
        prompt_ids=ids[:first],
        output_ids=ids[first:],
        offsets=np.maximum(offsets[first:] - len(prompt), 0),
        text=response,
        finish_reason=finish_reason,
        response_mask=None,
    )


def read_context(fields: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages before the response (the tool results among them are looked for in it) and offered tools."""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    if "messages" in fields or "tools" in fields:
        placeholder = [{"role": "user", "content": ""}]
        row = {"messages": fields.get("messages", placeholder), "tools": fields.get("tools")}
        conversation = read_conversation(row, "recorded" if "response_mask" in fields else "teacher")
        messages, tools = conversation.messages, conversation.tools
    names = fields.get("tool_names")
    if names is not None and not tools:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RowError(f"`tool_names` is {kind(names)}, expected a list of names")
        tools = [{"type": "function", "function": {"name": name}} for name in names]
    if "tool_results" in fields:
        messages = [*messages, {"role": "tool", "content": json.dumps(fields["tool_results"], ensure_ascii=False)}]
    return messages, tools


def _compare_pieces(fields: Mapping[str, Any], tokens: _Tokens, tokenizer: Any, num_ids: int) -> None:
    """Fields that hold ids of pieces tokenised on their own: they must be whole, and spell text of the response.

    What is supervised is found in the text, for a piece has other tokens on its own than within it.
    """
    for name, mask in (("tool_name_ids", "tool_name_mask"), ("gold_json_text_ids", "mask_valid_json_tokens")):
        if name not in fields:
            if mask in fields:
                raise RowError(f"`{mask}` without `{name}`")
            continue
        ids = read_ids(fields[name], name, num_ids)
        if mask in fields:
            ids = ids[read_mask(fields[mask], mask, len(ids))]
        piece = tokenizer.decode(ids.tolist()).strip(' "\n')
        letters = iter(tokens.text)
        if not all(letter in letters for letter in piece if not letter.isspace()):  # several pieces may stand end to end
            raise RowError(f"`{name}` spells {piece[:40]!r}, which is not in the response: ids of another tokenizer or row")
    if "tool_result_fields" in fields:
        read_ids(fields["tool_result_fields"], "tool_result_fields", num_ids)


def _extra_marks(fields: Mapping[str, Any], tokens: _Tokens) -> np.ndarray:
    """uint16 [R]: marks that the row names token by token."""
    num_output = len(tokens.output_ids)
    marks = np.zeros(num_output, np.uint16)
    targets = fields.get("span_targets", {})
    if not isinstance(targets, Mapping):
        raise RowError(f"`span_targets` is {kind(targets)}, expected an object")
    for name, mark in (("ts_mode_spans", Mark.CODE_MODE), ("direct_tool_spans", Mark.DIRECT_TOOL)):
        for start, end in read_spans(targets.get(name) or [], f"span_targets.{name}", num_output):
            marks[start:end] |= np.uint16(mark)
    if "integration_mask" in fields:
        mask, pieces = fields["integration_mask"], fields.get("tool_result_fields")
        num_tokens = len(tokens.prompt_ids) + num_output
        length = len(mask) if isinstance(mask, list) else -1
        if pieces is not None and length == len(pieces):
            read_mask(mask, "integration_mask", length)  # of the pieces' own tokens: the values are found in the text
        else:
            whole = read_mask(mask, "integration_mask", num_tokens if length == num_tokens else num_output)
            marks[whole[-num_output:]] |= np.uint16(Mark.INTEGRATION)
    if tokens.response_mask is not None:
        marks[~tokens.response_mask] = 0
    return marks


def _halt_target(fields: Mapping[str, Any], config: HaltConfig) -> float:
    """Probability of halting after this loop, from its score and that of the loop before; NaN: unknown."""
    index = int(read_number(fields["loop_index"], "loop_index", 0, 999))
    max_loops = int(read_number(fields.get("max_loops", config.max_loops), "max_loops", index + 1, 1000))
    scores = np.full((1, index + 1), np.nan)
    for name, place in (("judge_score", index), ("prev_score", index - 1)):
        if name in fields and place >= 0:
            scores[0, place] = read_number(fields[name], name, 0.0, 1.0)
    stage = None
    if "curriculum_stage" in fields:
        stage = np.array([int(read_number(fields["curriculum_stage"], "curriculum_stage", 0, 2))])
    none = np.zeros(1, np.int64)
    targets = halt_targets(scores, np.array([index + 1]), none, np.array([max_loops]), config, stage=stage)
    return float(targets.halt[0, index])


def _turn_spans(fields: Mapping[str, Any], tokens: _Tokens) -> TurnSpans | None:
    given = fields.get("spans")
    if given is None:
        return None
    if tokens.response_mask is not None:
        raise RowError("`spans` beside `response_mask`: spans are those of one response, not of a conversation")
    if not isinstance(given, Mapping) or set(given) != set(TurnSpans._fields):
        raise RowError(f"`spans` is {kind(given)}, expected an object with {', '.join(TurnSpans._fields)}")
    parts = {name: read_spans(given[name], f"spans.{name}", len(tokens.text)) for name in TurnSpans._fields}
    return TurnSpans(**{name: [Span(*pair) for pair in pairs] for name, pairs in parts.items()})


def _source(fields: Mapping[str, Any]) -> Source | None:
    name = fields.get("response_source")
    if name is None:
        return None
    if name not in ("gold", "teacher", "student"):
        raise RowError(f"`response_source` is {kind(name)}, expected gold, teacher or student")
    return Source[name.upper()]


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, expected a string")
    return value


def _teacher_table(rows: Sequence[tuple[int, _OfflineRow]]) -> pa.Table:
    """Rows in the form that the stream's builder reads; their uid is their place among the rows read."""
    read = [row for _, row in rows]
    masks = [row.tokens.response_mask for row in read]
    return pa.table(
        {
            "uid": pa.array([index for index, _ in rows], pa.int64()),
            "messages_json": [row.messages_json for row in read],
            "tools_json": [row.tools_json for row in read],
            "prompt_ids": pa.array([row.tokens.prompt_ids for row in read], pa.list_(pa.int32())),
            "output_ids": pa.array([row.tokens.output_ids for row in read], pa.list_(pa.int32())),
            "response_mask": pa.array(masks, pa.list_(pa.bool_())),
            "topk_ids": pa.array([row.scores.topk_ids.ravel() for row in read], pa.list_(pa.int32())),
            "topk_logprobs": pa.array([row.scores.topk_logprobs.ravel() for row in read], pa.list_(pa.float16())),
            "log_tail": pa.array([row.scores.log_tail for row in read], pa.list_(pa.float32())),
            "top_k": pa.array([row.scores.topk_ids.shape[1] for row in read], pa.int32()),
            "finish_reason": [row.tokens.finish_reason for row in read],
            "teacher_id": [row.teacher_id for row in read],
        }
    )


def _complete(example: Example, row: _OfflineRow) -> Example:
    """The built example with what only the offline row says."""
    first = len(row.tokens.prompt_ids)
    marks = example.marks.copy()
    columns = dict(row.columns)
    if row.spans is not None:
        marks[first:] = (marks[first:] & ~np.uint16(SPAN_MARKS)) | marks_of_spans(row.spans, row.tokens.offsets)
    if row.output_marks.any():  # given ones count instead of those found in the text
        marks[first:] &= ~np.uint16(GIVEN_MARKS)
    marks[first:] |= row.output_marks
    if "halt_targets" in columns:
        marks[np.flatnonzero(marks & Mark.RESPONSE)[-1]] |= np.uint16(Mark.DECISION)
    if row.spans is not None:
        columns["num_calls"] = len(row.spans.calls)
    return replace(example, uid=row.uid, marks=marks, source=example.source if row.source is None else row.source, **columns)
