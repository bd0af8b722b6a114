"""Offline rows to examples, through the same function as the stream.

In:  rows as read from JSONL (fields: `offline_fields.py`), and the tokenizer.
Out: per row an `Example` (and that of its rejected text), or the reason why there is none.

A row with a `rejected_text` gives two examples or none (`pairs.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.data.conversation import RowError, read_conversation
from raykd.data.examples import BuiltExamples, Wanted, build_examples, example_from_row
from raykd.data.halt_targets import halt_targets
from raykd.data.offline_fields import (
    gather_fields,
    kind,
    optional_string,
    read_floats,
    read_mask,
    read_number,
    read_spans,
    read_text,
)
from raykd.data.offline_scores import Scores, read_scores
from raykd.data.offline_tokens import RowTokens, compare_pieces, is_recorded, read_recorded, read_tokens
from raykd.data.pairs import numbered, rejected_half
from raykd.data.process_targets import TOOL_NAME_WEIGHTS, TurnSpans, marks_of_spans
from raykd.data.uids import hash_uid
from raykd.types import ARGUMENT_MARKS, CAWS_TIERS, Example, Mark, Source, Span
from teacher_serving.arrow import half_states
from teacher_serving.identity import vocabulary_size

GIVEN_MARKS = Mark.CODE_MODE | Mark.DIRECT_TOOL
SPAN_MARKS = Mark.TOOL_NAME | ARGUMENT_MARKS | Mark.INTEGRATION


@dataclass(frozen=True)
class RowReader:
    """What decides how an offline row becomes an example."""

    tokenizer: Any
    top_k: int = 50  # stored logits are reduced to so many
    max_tokens: int | None = None  # of prompt and response; longer rows are rejected, never cut
    wanted: Wanted = Wanted()  # noqa: RUF009 (frozen)
    pairs: bool = True  # make examples of rejected texts: each costs as much as any other, for the preference loss alone

    @functools.cached_property
    def num_ids(self) -> int:
        """Ids that the tokenizer knows."""
        return vocabulary_size(self.tokenizer)

    def build(self, teacher_rows: pa.Table) -> BuiltExamples:
        """Examples of rows in the form of the stream's."""
        return build_examples(teacher_rows, self.tokenizer, self.wanted)

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Example, ...] | str]:
        """Per row its example, behind it that of its rejected text where it has one; or the reason why there is none."""
        read: list[tuple[_OfflineRow, ...] | str] = []
        for row in rows:
            try:
                read.append(self._read(row))
            except RowError as error:
                read.append(str(error))
        built = iter(self._build([half for halves in read if not isinstance(halves, str) for half in halves]))
        results: list[tuple[Example, ...] | str] = []
        for halves in read:
            if isinstance(halves, str):
                results.append(halves)
                continue
            made = [next(built) for _ in halves]
            problems = [half for half in made if isinstance(half, str)]
            examples = tuple(half for half in made if isinstance(half, Example))
            results.append(problems[0] if problems else numbered(examples, halves[0].uid))
        return results

    def _build(self, rows: Sequence[_OfflineRow]) -> list[Example | str]:
        """Per checked row an example, or why there is none."""
        if not rows:
            return []
        built, rejected = self.build(_teacher_table(rows))
        results: dict[int, Example | str] = dict(
            zip(rejected["uid"].to_pylist(), rejected["reason"].to_pylist(), strict=True)
        )
        for position in range(built.num_rows):
            example = example_from_row(built, position)
            results[example.uid] = _complete(example, rows[example.uid])
        return [results[index] for index in range(len(rows))]

    def _read(self, row: Mapping[str, Any]) -> tuple[_OfflineRow, ...]:
        """The row with its response and, where it has one, the same with its rejected text in place of that."""
        fields = gather_fields(row)
        written = self._read_response(fields)
        if "rejected_text" not in fields or not self.pairs:
            return (written,)
        text = _rejected_text(fields)
        tokens = read_tokens(fields | {"teacher_text": text, "finish_reason": "stop"}, self.tokenizer, self.num_ids)
        self._check_length(tokens, "rejected text")
        no_scores = read_scores({}, len(tokens.prompt_ids), len(tokens.output_ids), self.num_ids, self.top_k)
        return written, replace(written, tokens=tokens, scores=no_scores, is_rejected=True)

    def _check_length(self, tokens: RowTokens, name: str) -> None:
        num_prompt, num_output = len(tokens.prompt_ids), len(tokens.output_ids)
        if self.max_tokens is not None and num_prompt + num_output > self.max_tokens:
            raise RowError(
                f"prompt and {name} have {num_prompt} + {num_output} tokens, expected at most {self.max_tokens}; shorten "
                "the row or raise the context"
            )

    def _read_response(self, fields: Mapping[str, Any]) -> _OfflineRow:
        tokens = read_tokens(fields, self.tokenizer, self.num_ids)
        self._check_length(tokens, "response")
        num_prompt, num_output = len(tokens.prompt_ids), len(tokens.output_ids)
        compare_pieces(fields, tokens, self.tokenizer, self.num_ids)
        messages, tools = read_context(fields)
        if "loop_index" in fields and any("loop" in message for message in messages):
            raise RowError("`loop_index` beside `loop` on messages: expected the one (of the last response) or the other")
        return _OfflineRow(
            uid=_uid(fields),
            tokens=tokens,
            messages_json=json.dumps(messages, ensure_ascii=False),
            tools_json=json.dumps(tools, ensure_ascii=False),
            scores=read_scores(fields, num_prompt, num_output, self.num_ids, self.top_k),
            teacher_id=optional_string(fields, "teacher_id"),
            source=_source(fields),
            caws_tier=_caws_tier(fields),
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
            states = read_floats(fields["teacher_hidden_states"], "teacher_hidden_states", missing=np.nan)
            if states.ndim != 3 or states.shape[1] != num_tokens:
                raise RowError(
                    f"`teacher_hidden_states` has shape {list(states.shape)}, expected [layers, {num_tokens} tokens, hidden]"
                )
            none = np.isnan(states)
            if (none.any(axis=(0, 2)) & ~none.all(axis=(0, 2))).any():
                raise RowError(
                    "`teacher_hidden_states` is null in part at a token: expected a whole state, or none in all layers"
                )
            columns["teacher_hidden"] = half_states(states)
        if "cot_steps" in fields:
            steps = fields["cot_steps"]
            if not isinstance(steps, list) or not all(isinstance(step, str) and step.strip() for step in steps):
                raise RowError(f"`cot_steps` is {kind(steps)}, expected a list of texts, word for word as in the response")
            columns["cot_steps"] = np.array(steps, object)
        if "loop_index" in fields:
            columns["halt_targets"] = np.array([_halt_target(fields, self.wanted)], np.float32)
        return columns


@dataclass(frozen=True)
class _OfflineRow:
    """A checked row."""

    uid: int
    tokens: RowTokens
    messages_json: str
    tools_json: str
    scores: Scores
    teacher_id: str
    source: Source | None  # None: as the tokens say
    caws_tier: int  # 0: none is named
    output_marks: np.ndarray  # uint16 [R], marks on top of those found in the text
    spans: TurnSpans | None  # in place of those found in the text
    columns: dict[str, Any]
    is_rejected: bool = False  # half of a pair that only its tokens are wanted of


def check_row(row: Mapping[str, Any]) -> int:
    """The uid of a row, and whatever can be seen to be wrong without a tokenizer, as RowError."""
    fields = gather_fields(row)
    if "rejected_text" in fields:
        _rejected_text(fields)
    if "output_ids" in fields:
        if "prompt_ids" not in fields:
            raise RowError("`output_ids` without `prompt_ids`; expected both, or prompt and teacher_text")
        return _uid(fields)
    if "prompt" not in fields and "messages" not in fields:
        raise RowError(f"row has neither `prompt` nor `messages` nor `prompt_ids`; found {sorted(row)}")
    if is_recorded(fields):
        read_recorded(fields)
        return _uid(fields)
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
    names = ("prompt", "messages", "tools", "prompt_ids", "teacher_text", "output_ids", "rejected_text")
    return hash_uid(json.dumps([fields.get(name) for name in names], sort_keys=True))


def _rejected_text(fields: Mapping[str, Any]) -> str:
    text = read_text(fields["rejected_text"], "rejected_text")
    if "output_ids" in fields:
        raise RowError("`rejected_text` beside `output_ids`: expected both responses as texts, `teacher_text` the other one")
    if text == fields.get("teacher_text"):
        raise RowError("`rejected_text` is the same as `teacher_text`: there is nothing to prefer")
    return text


def read_context(fields: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages before the response (the tool results among them are looked for in it), of a recorded conversation all, and
    offered tools."""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    if "messages" in fields or "tools" in fields:
        placeholder = [{"role": "user", "content": ""}]
        row = {"messages": fields.get("messages", placeholder), "tools": fields.get("tools")}
        conversation = read_conversation(row, "recorded" if is_recorded(fields) else "teacher")
        messages, tools = conversation.messages, conversation.tools
    names = fields.get("tool_names")
    if names is not None and not tools:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RowError(f"`tool_names` is {kind(names)}, expected a list of names")
        tools = [{"type": "function", "function": {"name": name}} for name in names]
    if "tool_results" in fields:
        messages = [*messages, {"role": "tool", "content": json.dumps(fields["tool_results"], ensure_ascii=False)}]
    return messages, tools


def _extra_marks(fields: Mapping[str, Any], tokens: RowTokens) -> np.ndarray:
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


def _caws_tier(fields: Mapping[str, Any]) -> int:
    """The tier that the row names; 0: none."""
    if "caws_tier" not in fields:
        return 0
    return int(read_number(fields["caws_tier"], "caws_tier", min(CAWS_TIERS), max(CAWS_TIERS)))


def _halt_target(fields: Mapping[str, Any], wanted: Wanted) -> float:
    """Probability of halting after this loop, from its score and that of the loop before; NaN: unknown."""
    index = int(read_number(fields["loop_index"], "loop_index", 0, 999))
    max_loops = int(read_number(fields.get("max_loops", wanted.halt.max_loops), "max_loops", index + 1, 1000))
    scores = np.full((1, index + 1), np.nan)
    for name, place in (("judge_score", index), ("prev_score", index - 1)):
        if name in fields and place >= 0:
            scores[0, place] = read_number(fields[name], name, 0.0, 1.0)
    tier = _caws_tier(fields) or wanted.caws_tier
    stage = None
    if "curriculum_stage" in fields:
        stage = np.array([int(read_number(fields["curriculum_stage"], "curriculum_stage", 0, 2))])
    targets = halt_targets(scores, np.array([index + 1]), np.array([tier]), np.array([max_loops]), wanted.halt, stage=stage)
    return float(targets.halt[0, index])


def _turn_spans(fields: Mapping[str, Any], tokens: RowTokens) -> TurnSpans | None:
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


def _teacher_table(read: Sequence[_OfflineRow]) -> pa.Table:
    """Rows in the form that the stream's builder reads; their uid is their place."""
    masks = [row.tokens.response_mask for row in read]
    return pa.table(
        {
            "uid": pa.array(range(len(read)), pa.int64()),
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
            "caws_tier": [row.caws_tier for row in read],
        }
    )


def _complete(example: Example, row: _OfflineRow) -> Example:
    """The built example with what only the offline row says."""
    if row.is_rejected:
        return rejected_half(example)
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
        columns |= {"num_calls": len(row.spans.calls), "missing": ""}  # what was missing in the text may be given
    return replace(example, uid=row.uid, marks=marks, source=example.source if row.source is None else row.source, **columns)
