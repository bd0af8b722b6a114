"""What the process-step losses supervise: marks of the tokens of one assistant turn.

In:  a turn's text, the character offsets of its tokens, the tool results that the assistant had seen before it.
Out: bits of `Mark` per token, and how many calls the turn holds.

Every token of a call's arguments carries at least one argument mark (white space between the parts counts as structure).
Inside a call only argument values can be integration, so that a tool's name or a key is never taken for a reused value.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from raykd.data.extractors import argument_spans, extract_tool_calls, token_mask
from raykd.data.integration import ResultIndex
from raykd.types import ARGUMENT_MARKS, Mark


class TurnMarks(NamedTuple):
    """Targets of one assistant turn of T tokens."""

    marks: np.ndarray  # uint16 [T]; RESPONSE on every token
    num_calls: int  # truncated ones included
    num_truncated_calls: int


def mark_turn(
    text: str, offsets: np.ndarray, results: Sequence[ResultIndex], tool_names: Collection[str] | None = None
) -> TurnMarks:
    """Marks of an assistant turn from its text and token offsets [T, 2].

    `tool_names`, the sample's own tools, decides about bare JSON only: behind an explicit marker (`<tool_call>` ...) a call
    of an unknown tool is what the author wrote as a call, and is supervised as one.
    """
    calls = extract_tool_calls(text, tool_names or None)
    arguments = [argument_spans(text, call) for call in calls]
    marks = np.full(len(offsets), Mark.RESPONSE, dtype=np.uint16)
    if calls:
        parts = {
            Mark.TOOL_NAME: [call.name_span for call in calls],
            Mark.ARGUMENT_STRUCTURE: [span for part in arguments for span in part.structure],
            Mark.ARGUMENT_KEY: [span for part in arguments for span in part.key],
            Mark.ARGUMENT_VALUE: [span for part in arguments for span in part.value],
        }
        for mark, spans in parts.items():
            marks[token_mask(offsets, spans)] |= np.uint16(mark)
        blank = token_mask(offsets, [call.arguments_span for call in calls]) & ((marks & ARGUMENT_MARKS) == 0)
        marks[blank] |= np.uint16(Mark.ARGUMENT_STRUCTURE)
    spans = [span for result in results for span in result.find(text)]
    if spans:
        reused = token_mask(offsets, spans)
        if calls:
            in_call = token_mask(offsets, [call.call_span for call in calls])
            reused &= ~in_call | ((marks & Mark.ARGUMENT_VALUE) != 0)
        marks[reused] |= np.uint16(Mark.INTEGRATION)
    return TurnMarks(marks, len(calls), sum(call.truncated for call in calls))
