"""A completion as HTML with its process steps coloured: tool names, argument structure, keys and values, reused values.

In:  text, the tools offered, the tool results before it. Out: escaped HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from raykd.data.extractors import argument_spans, extract_tool_calls, find_integration_spans

CLASSES = {
    "name": "tool name",
    "structure": "argument structure",
    "key": "argument key",
    "value": "argument value",
    "integration": "value reused from a tool result",
}
"""CSS class of every kind of span, and its words in the legend."""


def highlight(text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """The text as HTML, every span in a `<span class=…>`; everything that comes from data is escaped.

    >>> highlight('{"name": "f", "arguments": {}}', [], [])
    '{&quot;name&quot;: &quot;<span class="name">f</span>&quot;, &quot;arguments&quot;: <span class="structure">{}</span>}'
    """
    marks: list[set[str]] = [set() for _ in text]
    names = {tool.get("function", tool)["name"] for tool in tools}
    for call in extract_tool_calls(text, names or None):
        parts = argument_spans(text, call)
        spans = {"name": [call.name_span], "structure": parts.structure, "key": parts.key, "value": parts.value}
        for kind, found in spans.items():
            _mark(marks, kind, found)
    results = [message["content"] for message in messages if message["role"] == "tool" and message.get("content")]
    _mark(marks, "integration", find_integration_spans(text, results))
    pieces = []
    position = 0
    for kinds, run in groupby(marks):
        length = sum(1 for _ in run)
        piece = escape(text[position : position + length])
        classes = " ".join(kind for kind in CLASSES if kind in kinds)
        pieces.append(f'<span class="{classes}">{piece}</span>' if classes else piece)
        position += length
    return "".join(pieces)


def _mark(marks: list[set[str]], kind: str, spans: Sequence[tuple[int, int]]) -> None:
    for start, end in spans:
        for index in range(start, end):
            marks[index].add(kind)
