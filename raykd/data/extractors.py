"""Find the tool calls of a text: names, arguments, and where every part of them stands.

In:  text written by a model (or a recorded conversation), in any of the usual call formats.
Out: `ToolCall`s with spans in code points of that text; `token_mask` carries spans over to tokens.

Formats: `<tool_call>{...}</tool_call>` (Hermes, Qwen), a bare JSON object or array, fenced or not, Llama-3
(`parameters`, `<|python_tag|>`, `<function=name>{...}`), Mistral (`[TOOL_CALLS] [...]`, `name[ARGS]{...}`), and the OpenAI
message (`tool_calls`, `function`, arguments as a JSON string). The JSON reader is in `json_tree.py`.

What is a call: an object with a string `name` and an object (or the JSON text of one) as `arguments` or `parameters`.
It counts when it stands on its own, in an array, or under `tool_calls`, `function` or `function_call`, but not inside other
JSON: `{"name": "Bob", "age": 3}` is none, nor is a tool's own schema. Behind an explicit marker (`<tool_call>` and the like)
anything that begins as a call is reported, with an `error` when it is not whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raykd.data.integration import find_integration_spans
from raykd.data.json_tree import Node, classify_tokens, closes_string, parse, unescape
from raykd.types import Span

__all__ = ["ArgumentSpans", "ToolCall", "argument_spans", "extract_tool_calls", "find_integration_spans", "token_mask"]


@dataclass(frozen=True)
class ToolCall:
    """One call. Spans are half-open, in code points of the text; a part that is absent has an empty span."""

    name: str
    arguments: dict[str, Any] | None  # as parsed; None when truncated or broken
    name_span: Span  # without quotes; covers the escapes where the name is escaped
    arguments_span: Span  # the value with its braces; with its quotes where it is a JSON string
    call_span: Span  # the object itself (or `name[ARGS]{...}`), without tags around it
    truncated: bool = False  # the text ends inside the call
    error: str | None = None  # duplicate key, unknown tool, invalid JSON ...: what is wrong with the call


@dataclass(frozen=True)
class ArgumentSpans:
    """The parts of a call's arguments by class, each in text order."""

    structure: list[Span]  # braces, brackets, colons, commas, quotes
    key: list[Span]  # without quotes
    value: list[Span]  # contents of strings, numbers, true, false, null


# Where a value may begin. `[ARGS]` and the markers come before the bare bracket so that they win.
_START = re.compile(
    r"(?P<marker><tool_call>|<\|python_tag\|>|\[TOOL_CALLS\])"
    r"|(?P<args>\[ARGS\])"
    r"|<function=(?P<function>[\w.\-/:]{1,128})>"
    r"|[{\[]"
)
_NAME_BEFORE_ARGS = re.compile(r"([\w.\-/:]{1,128})(?:\[CALL_ID\][\w\-]{1,64})?\Z")
_AFTER_CALL = re.compile(r"\s*+(?:\Z|[<{\[,;])")
_GAP = " \t\r\n,;"
_WRAPPER_KEYS = ("tool_calls", "function", "function_call")


def extract_tool_calls(text: str, tool_names: Collection[str] | None = None) -> list[ToolCall]:
    """All tool calls of `text` in order, in time linear in its length.

    With `tool_names`, a bare object that names no such tool is no call; behind an explicit marker it is one, with
    `error = "unknown tool ..."`.
    """
    calls: list[ToolCall] = []
    position, gap_start = 0, -1  # gap_start: where the current marker (or the value after it) ended; -1 without
    tagged = False  # the marker is <tool_call>
    while match := _START.search(text, position):
        if match["marker"]:
            position = gap_start = match.end()
            tagged = match["marker"] == "<tool_call>"
        elif match["args"] or match["function"]:
            found, position = _read_named(text, match)
            calls += found
        else:
            start = match.start()
            explicit = gap_start >= 0 and not text[gap_start:start].strip(_GAP)
            root, position = parse(text, start)
            found = list(_calls_in(root, explicit))
            if explicit and tagged and root.closed and not _AFTER_CALL.match(text, root.end):
                found = [replace(call, error=call.error or "text after the call") for call in found]
            calls += found if tool_names is None else _filter(found, explicit, tool_names)
            gap_start = root.end if explicit and root.closed else -1
    if tool_names is None:
        return calls
    return [_flag_unknown(call, tool_names) for call in calls]


def _filter(calls: list[ToolCall], explicit: bool, tool_names: Collection[str]) -> list[ToolCall]:
    return [call for call in calls if explicit or call.name in tool_names or (call.truncated and not call.name)]


def _flag_unknown(call: ToolCall, tool_names: Collection[str]) -> ToolCall:
    if call.error or call.truncated or call.name in tool_names:
        return call
    return replace(call, error=f"unknown tool {call.name!r}")


def _read_named(text: str, match: re.Match[str]) -> tuple[list[ToolCall], int]:
    """A call whose name stands before its arguments: `name[ARGS]{...}` or `<function=name>{...}`."""
    if match["function"]:
        name_span = Span(*match.span("function"))
        start = match.start()
    else:
        window = max(0, match.start() - 200)
        name = _NAME_BEFORE_ARGS.search(text[window : match.start()])
        if name is None:
            return [], match.end()
        name_span = Span(window + name.start(1), window + name.end(1))
        start = name_span.start
    name = text[name_span.start : name_span.end]
    brace = match.end()
    while text[brace : brace + 1].isspace():
        brace += 1
    if brace == len(text):
        empty = Span(brace, brace)
        return [ToolCall(name, None, name_span, empty, Span(start, brace), truncated=True)], brace
    if text[brace] != "{":
        return [], match.end()
    root, position = parse(text, brace)
    return [
        ToolCall(
            name,
            root.value if root.closed else None,
            name_span,
            Span(root.start, root.end),
            Span(start, root.end),
            root.truncated,
            _json_error(root),
        )
    ], position


def _calls_in(root: Node, explicit: bool) -> Iterator[ToolCall]:
    """Calls of a JSON value, in text order. Walks arrays, the OpenAI keys, and what is left of broken JSON."""
    pending = [(root, root, explicit)]  # a value, the object that wraps it as a call, and whether a marker announced it
    while pending:
        node, outer, explicit = pending.pop()
        if isinstance(node.members, dict):
            call = _as_call(node, outer, explicit)
            if call is not None:
                yield call
                continue
            below = [
                (child, outer if key != "tool_calls" else child, explicit or key == "tool_calls")
                for key, child in node.members.items()
                if key in _WRAPPER_KEYS
            ]
            if node.broken:  # no JSON after all: what stands inside stands on its own
                taken = {id(child) for child, _, _ in below}
                below += [(child, child, False) for child in node.members.values() if id(child) not in taken]
                below.sort(key=lambda entry: entry[0].start)
        else:
            below = [(child, child, explicit) for child in node.members or ()]
        pending += [entry for entry in reversed(below) if entry[0].members is not None]


def _as_call(node: Node, outer: Node, explicit: bool) -> ToolCall | None:
    """The call that an object is, or None. `outer` is its wrapper (`{"type": "function", ...}`), or itself."""
    assert isinstance(node.members, dict)
    name, arguments = node.members.get("name"), node.members.get("arguments", node.members.get("parameters"))
    has_name = name is not None and isinstance(name.value, str) and bool(name.value)
    if _is_definition(node.members) or (not explicit and not (has_name and arguments is not None)):
        return None
    wrapper = not node.truncated or not node.members.keys().isdisjoint(_WRAPPER_KEYS)
    if not has_name and wrapper:
        return None  # neither a call nor the beginning of one
    whole = Span(outer.start, outer.end)
    if name is None or not isinstance(name.value, str):
        nothing = Span(node.end, node.end)
        return ToolCall("", None, nothing, nothing, whole, node.truncated, _json_error(node))
    name_span = _inside_quotes(name)
    if arguments is None:
        error = _json_error(node) or (None if node.truncated else "no arguments")
        return ToolCall(name.value, None, name_span, Span(node.end, node.end), whole, node.truncated, error)
    value, error = _argument_object(arguments)
    if value is None and error and not explicit:
        return None
    if not node.closed:
        value = None
    error = _json_error(node) or error
    return ToolCall(name.value, value, name_span, Span(arguments.start, arguments.end), whole, node.truncated, error)


def _argument_object(arguments: Node) -> tuple[dict[str, Any] | None, str | None]:
    """Arguments as a dict, or None with the reason. Text that the end cut off is no error."""
    if isinstance(arguments.value, dict):
        return arguments.value, None
    if isinstance(arguments.value, str):
        inner = arguments.value.strip()
        if inner.startswith("{"):
            root, end = parse(inner, 0)
            if root.closed and end == len(inner):
                return root.value, f"duplicate key {root.duplicate!r}" if root.duplicate else None
            if not arguments.closed and root.truncated:
                return None, None
        elif not inner and not arguments.closed:
            return None, None
    return None, "arguments are no JSON object"


def _is_definition(members: dict[str, Node]) -> bool:
    """`{"name", "description", "parameters": {"type": "object", "properties"}}` declares a tool; it calls none."""
    if "arguments" in members or "parameters" not in members:
        return False
    schema = members["parameters"].value
    return "description" in members or (
        isinstance(schema, dict) and schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    )


def _json_error(node: Node) -> str | None:
    if node.broken:
        return f"invalid JSON at character {node.end}"
    return f"duplicate key {node.duplicate!r}" if node.duplicate else None


def _inside_quotes(string: Node) -> Span:
    return Span(string.start + 1, string.end - 1 if string.closed else string.end)


def argument_spans(text: str, call: ToolCall) -> ArgumentSpans:
    """Spans of `call.arguments_span` by class; inside a JSON string they are mapped through its escapes."""
    start, end = call.arguments_span
    spans = ArgumentSpans([], [], [])
    classes = {"structure": spans.structure, "key": spans.key, "value": spans.value}
    if start == end:
        return spans
    if text[start] != '"':
        for kind, token_start, token_end in classify_tokens(text, start, end):
            classes[kind].append(Span(token_start, token_end))
        return spans
    closed = closes_string(text, start, end)
    body_end = end - 1 if closed else end
    inner, source = unescape(text, start + 1, body_end)
    spans.structure.append(Span(start, start + 1))
    for kind, token_start, token_end in classify_tokens(inner, 0, len(inner)):
        classes[kind].append(Span(source[token_start], source[token_end]))
    if closed:
        spans.structure.append(Span(body_end, end))
    return spans


def token_mask(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens overlap a span: bool [T] from character offsets [T, 2] (half-open).

    A token of zero length never counts. A token that holds part of a code point has that whole code point as its offsets,
    so it counts for every span that the code point is in.
    """
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ranges = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    if not len(ranges) or not len(offsets):
        return np.zeros(len(offsets), dtype=bool)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])  # spans may nest: how far the first i of them reach
    # The last span that starts before the token ends; some span up to it must reach beyond the token's start.
    last = np.searchsorted(ranges[:, 0], offsets[:, 1], side="left") - 1
    return (offsets[:, 0] < offsets[:, 1]) & (last >= 0) & (reach[np.maximum(last, 0)] > offsets[:, 0])
