"""What the process-step losses supervise: marks, sets of ids and legal ids at the tokens of one assistant turn.

In:  a turn's text and tokens, the tool results that the assistant had seen before it, the tools it was offered.
Out: bits of `Mark` per token, `IdSets`, `GrammarMasks`, how many calls the turn holds, and why a target is missing.

Every token of a call's arguments carries at least one argument mark (white space between the parts counts as structure).
Inside a call only argument values can be integration, so that a tool's name or a key is never taken for a reused value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from raykd.data.extractors import ToolCall, argument_spans, extract_tool_calls, token_mask
from raykd.data.grammar import NO_MASKS, GrammarMasks, ToolGrammars, call_grammar, join_masks
from raykd.data.id_sets import CopyIndex, IdSets, Turn, id_sets
from raykd.data.integration import ResultIndex
from raykd.types import ARGUMENT_MARKS, Mark, SetKind, Span

TOOL_NAME_WEIGHTS = {"schema": 1.0, "mask+schema": 1.0, "original": 1.0, "heuristic": 0.5}
"""Trust in the tool names of a row, by where they came from (its `tool_name_source`)."""

REASONS = {
    "no_call": "the assistant calls no tool",
    "no_tool_result": "no tool result stands before the turn",
    "no_arguments": "no call has arguments",
    "nothing_reused": "the text reuses no value of the tool results",
    "few_tools": "fewer than two tools are offered: there is nothing to choose",
    "unknown_tool": "no call is of an offered tool",
    "no_schema": "the called tools have no JSON Schema",
    "schema_not_supported": "the called tools' JSON Schema cannot be made a grammar",
    "arguments_as_text": "the arguments are a JSON string, whose escapes the grammar does not know",
    "not_legal": "the arguments break their schema at the first token",
    "no_other_number": "no reused number, or no other number in the results that parts from it inside",
    "not_verbatim": "nothing reused is a copy of more than one token, character by character",
    "other_tokens": "the tokenizer would not give the text the tokens that were written",
}
"""Why a sample has none of a target; the further down, the nearer it came."""

_SETS = {
    "tool_choice": SetKind.TOOL_CHOICE,
    "copy_mass": SetKind.COPY,
    "number_contradiction": SetKind.CONTRADICTION,
}
SET_LOSSES = frozenset(_SETS)
PROCESS_LOSSES = frozenset({"tool_name", "json_argument", "integration_copy", "json_grammar", *_SETS})


class TurnMarks(NamedTuple):
    """Targets of one assistant turn of T tokens."""

    marks: np.ndarray  # uint16 [T]; RESPONSE on every token
    num_calls: int  # truncated ones included
    num_truncated_calls: int


class TurnSpans(NamedTuple):
    """Where the parts of the calls of a text stand, and what it reuses: spans in code points of the text."""

    calls: list[Span]
    tool_name: list[Span]
    arguments: list[Span]
    argument_structure: list[Span]
    argument_key: list[Span]
    argument_value: list[Span]
    integration: list[Span]  # values of tool results, in calls and outside


def mark_turn(
    text: str, offsets: np.ndarray, results: Sequence[ResultIndex], tool_names: Collection[str] | None = None
) -> TurnMarks:
    """Marks of an assistant turn from its text and token offsets [T, 2].

    `tool_names`, the sample's own tools, decides about bare JSON only: behind an explicit marker (`<tool_call>` ...) a call
    of an unknown tool is what the author wrote as a call, and is supervised as one.
    """
    calls = extract_tool_calls(text, tool_names or None)
    spans = _spans_of(text, calls, results)
    return TurnMarks(marks_of_spans(spans, offsets), len(calls), sum(call.truncated for call in calls))


def find_turn_spans(text: str, results: Sequence[ResultIndex], tool_names: Collection[str] | None = None) -> TurnSpans:
    """What `mark_turn` marks, as spans of the text: needs no tokenizer."""
    return _spans_of(text, extract_tool_calls(text, tool_names or None), results)


def _spans_of(text: str, calls: Sequence[ToolCall], results: Sequence[ResultIndex]) -> TurnSpans:
    arguments = [argument_spans(text, call) for call in calls]
    return TurnSpans(
        calls=[call.call_span for call in calls],
        tool_name=[call.name_span for call in calls],
        arguments=[call.arguments_span for call in calls],
        argument_structure=[span for part in arguments for span in part.structure],
        argument_key=[span for part in arguments for span in part.key],
        argument_value=[span for part in arguments for span in part.value],
        integration=[span for result in results for span in result.find(text)],
    )


def marks_of_spans(spans: TurnSpans, offsets: np.ndarray) -> np.ndarray:
    """uint16 [T]: RESPONSE and the marks of the spans, for tokens with these character offsets [T, 2]."""
    marks = np.full(len(offsets), Mark.RESPONSE, dtype=np.uint16)
    if spans.calls:
        parts = {
            Mark.TOOL_NAME: spans.tool_name,
            Mark.ARGUMENT_STRUCTURE: spans.argument_structure,
            Mark.ARGUMENT_KEY: spans.argument_key,
            Mark.ARGUMENT_VALUE: spans.argument_value,
        }
        for mark, where in parts.items():
            marks[token_mask(offsets, where)] |= np.uint16(mark)
        blank = token_mask(offsets, spans.arguments) & ((marks & ARGUMENT_MARKS) == 0)
        marks[blank] |= np.uint16(Mark.ARGUMENT_STRUCTURE)
    if spans.integration:
        reused = token_mask(offsets, spans.integration)
        if spans.calls:
            in_call = token_mask(offsets, spans.calls)
            reused &= ~in_call | ((marks & Mark.ARGUMENT_VALUE) != 0)
        marks[reused] |= np.uint16(Mark.INTEGRATION)
    return marks


class SeenResult(NamedTuple):
    """A tool result, read once for all turns after it."""

    values: ResultIndex
    copies: CopyIndex | None  # where the losses ask for sets


class TurnTargets(NamedTuple):
    """All targets of one assistant turn of T tokens, or of a whole sequence (`join_turns`); positions count its tokens."""

    marks: np.ndarray  # uint16 [T]
    num_calls: int
    num_truncated_calls: int
    sets: IdSets
    grammar: GrammarMasks
    num_illegal_calls: int  # calls that leave their schema; masks end there
    missing: dict[str, str]  # loss -> key of REASONS


def process_targets(
    turn: Turn,
    results: Sequence[SeenResult],
    schemas: Mapping[str, str],
    losses: Collection[str],
    grammars: ToolGrammars | None = None,
) -> TurnTargets:
    """All targets of an assistant turn that the active `losses` ask for.

    Args:
        results: tool results seen before the turn; with `copies` where a loss of `SET_LOSSES` is active.
        schemas: JSON Schema (text) of each offered tool by name, from `grammar.offered_schemas`.
        grammars: needed where json_grammar is active.
    """
    calls = extract_tool_calls(turn.text, schemas.keys() or None)
    spans = _spans_of(turn.text, calls, [result.values for result in results])
    marks = marks_of_spans(spans, turn.offsets)
    sets = id_sets(
        turn,
        [kind for loss, kind in _SETS.items() if loss in losses],
        calls=calls,
        tool_names=schemas.keys(),
        reused=spans.integration,
        allowed=(marks & Mark.INTEGRATION) != 0,
        results=[result.copies for result in results if result.copies is not None],
    )
    grammar, num_illegal = NO_MASKS, 0
    missing: dict[str, str] = {}
    if "json_grammar" in losses:
        assert grammars is not None, "json_grammar is active but no ToolGrammars were given"
        grammar, num_illegal, reason = _grammar(turn, calls, schemas, grammars)
        if reason:
            missing["json_grammar"] = reason
    missing |= _missing(losses, marks, calls, sets, schemas, has_results=bool(results))
    num_truncated = sum(call.truncated for call in calls)
    return TurnTargets(marks, len(calls), num_truncated, sets, grammar, num_illegal, missing)


def _grammar(
    turn: Turn, calls: Sequence[ToolCall], schemas: Mapping[str, str], grammars: ToolGrammars
) -> tuple[GrammarMasks, int, str]:
    """Masks of all calls, how many calls leave their schema, and why there is none."""
    parts, reasons, num_illegal = [], ["no_call"], 0
    for call in calls:
        grammar = None
        start, end = call.arguments_span
        if start == end:
            reasons.append("no_arguments")
        elif call.name not in schemas:
            reasons.append("unknown_tool")
        elif not schemas[call.name]:
            reasons.append("no_schema")
        elif turn.text[start] == '"':
            reasons.append("arguments_as_text")
        elif (grammar := grammars.compiled(schemas[call.name])) is None:
            reasons.append("schema_not_supported")
        else:
            legal, breaks = call_grammar(turn.text, turn.offsets, turn.ids, call, grammar, grammars)
            parts.append(legal)
            num_illegal += breaks
            reasons.append("not_legal" if breaks else "no_arguments")
    masks = join_masks(parts)
    return masks, num_illegal, "" if len(masks.position) else max(reasons, key=_rank)


def _missing(
    losses: Collection[str],
    marks: np.ndarray,
    calls: Sequence[ToolCall],
    sets: IdSets,
    schemas: Mapping[str, str],
    *,
    has_results: bool,
) -> dict[str, str]:
    """Why marks and sets that active losses look at are not there."""
    call_reason = "no_call" if not calls else "no_arguments"
    reuse_reason = "no_tool_result" if not has_results else "nothing_reused"
    reused = bool((marks & Mark.INTEGRATION).any())
    known = any(call.name in schemas for call in calls)
    choice = "no_call" if not calls else "few_tools" if len(schemas) < 2 else "other_tokens" if known else "unknown_tool"
    reasons = {
        "tool_name": (marks & Mark.TOOL_NAME, call_reason),
        "json_argument": (marks & ARGUMENT_MARKS, call_reason),
        "integration_copy": (marks & Mark.INTEGRATION, reuse_reason),
        "tool_choice": (sets.kind == SetKind.TOOL_CHOICE, choice),
        "copy_mass": (sets.kind == SetKind.COPY, "not_verbatim" if reused else reuse_reason),
        "number_contradiction": (sets.kind == SetKind.CONTRADICTION, "no_other_number" if reused else reuse_reason),
    }
    return {loss: reason for loss, (present, reason) in reasons.items() if loss in losses and not present.any()}


def _rank(reason: str) -> int:
    return tuple(REASONS).index(reason)


def join_turns(starts: Sequence[int], turns: Sequence[TurnTargets], length: int) -> TurnTargets:
    """The turns of a sequence of `length` tokens as one; turn i begins at token starts[i]. Marks are 0 between turns.

    A loss is missing where it is in every turn, for the reason that came nearest.
    """
    marks = np.zeros(length, dtype=np.uint16)
    for start, turn in zip(starts, turns, strict=True):
        marks[start : start + len(turn.marks)] = turn.marks
    shifted = list(zip(starts, turns, strict=True))
    sets = IdSets(
        np.concatenate([np.empty(0, np.int32), *(turn.sets.position + np.int32(start) for start, turn in shifted)]),
        np.concatenate([np.empty(0, np.int8), *(turn.sets.kind for turn in turns)]),
        np.concatenate([np.empty(0, np.int32), *(turn.sets.sizes for turn in turns)]),
        np.concatenate([np.empty(0, np.int32), *(turn.sets.ids for turn in turns)]),
    )
    grammar = join_masks(
        [turn.grammar._replace(position=turn.grammar.position + np.int32(start)) for start, turn in shifted]
    )
    everywhere = set.intersection(*(set(turn.missing) for turn in turns)) if turns else set()
    return TurnTargets(
        marks,
        sum(turn.num_calls for turn in turns),
        sum(turn.num_truncated_calls for turn in turns),
        sets,
        grammar,
        sum(turn.num_illegal_calls for turn in turns),
        {loss: max((turn.missing[loss] for turn in turns), key=_rank) for loss in sorted(everywhere)},
    )


def describe_missing(counts: Mapping[str, int]) -> dict[str, list[str]]:
    """For each loss why samples have none of its targets, and how many, the most frequent reason first.

    `counts`: number of samples by `Example.missing`.
    """
    by_loss: dict[str, Counter[str]] = {}
    for combination, number in counts.items():
        for entry in combination.split():
            loss, reason = entry.split(":")
            by_loss.setdefault(loss, Counter())[reason] += number
    return {
        loss: [f"{REASONS[reason]} ({number:,})" for reason, number in reasons.most_common()]
        for loss, reasons in sorted(by_loss.items())
    }
