"""A JSON reader that knows where everything stands and survives text that is not JSON.

In:  a text and the position of a `{` or `[` in it.
Out: a tree of `Node`s with spans in code points, and where to go on reading.

`json.loads` gives no positions, recurses, and from every bracket of a long broken text would start again. This reader keeps
its own stack, and a caller that goes on where it says reads every character a bounded number of times.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 1000  # beyond that `json.loads` fails too; bounds memory on a text of brackets

_TOKEN = re.compile(
    r'[ \t\n\r]*+(?:([{}\[\],:"])|(-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null))'
)
_STRING_BODY = re.compile(r'[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+')
_PARTIAL_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_PARTIAL_SCALAR = re.compile(
    r"[ \t\n\r]*+(?:-|t|tr|tru|f|fa|fal|fals|n|nu|nul)?\Z|(?<=[0-9])(?:\.|[eE][+-]?)\Z"  # the latter behind what is a number
)
_LITERALS: dict[str, Any] = {"true": True, "false": False, "null": None}
# What may come next, by (inside an object, state); s stands for a number or literal.
_FIRST, _KEY, _COLON, _VALUE, _NEXT = range(5)
_ALLOWED = {
    (True, _FIRST): '"}',
    (True, _KEY): '"',
    (True, _COLON): ":",
    (True, _VALUE): '{["s',
    (True, _NEXT): ",}",
    (False, _FIRST): '{["s]',
    (False, _VALUE): '{["s',
    (False, _NEXT): ",]",
}


class Node:
    """A JSON value in a text: [start, end), brackets and quotes included.

    `members` holds the nodes of an object's values by key, or those of an array's containers; None for a scalar.
    `closed` is False for what the end of the text (`truncated`) or a syntax error (`broken`) cut off; `end` is then where
    reading stopped. `duplicate` is a key that occurs twice in here.
    """

    __slots__ = ("broken", "closed", "duplicate", "end", "key", "members", "start", "state", "value")

    def __init__(self, start: int, end: int, value: Any, members: dict[str, Node] | list[Node] | None = None):
        self.start, self.end, self.value, self.members = start, end, value, members
        self.closed = members is None
        self.broken = False
        self.duplicate: str | None = None
        self.key: str | None = None
        self.state = _FIRST

    @property
    def truncated(self) -> bool:
        return not self.closed and not self.broken

    def add(self, child: Node) -> None:
        """Take a value in: after the key read last, or at the end of the array."""
        if isinstance(self.members, dict):
            assert self.key is not None, "a value of an object comes after its key"
            if self.key in self.members:
                self.duplicate = self.duplicate or self.key
            self.members[self.key] = child
            self.value[self.key] = child.value
        else:
            assert self.members is not None, "a scalar has no members"
            if child.members is not None:
                self.members.append(child)
            self.value.append(child.value)
        self.state = _NEXT


def parse(text: str, start: int) -> tuple[Node, int]:
    """Read the object or array at `start`; return its tree and the position from which to look for further values.

    After a syntax error that position is before the error where a stray quote may have swallowed text: the contents of the
    last string are then looked at again, which happens once per quote.
    """
    root = _container(text, start)
    stack, position, string_start = [root], start + 1, -1
    while stack:
        top = stack[-1]
        match = _TOKEN.match(text, position)
        if match is None:
            truncated = _PARTIAL_SCALAR.match(text, position) is not None
            return _give_up(stack, len(text) if truncated else position, truncated, string_start)
        token = match[1] or "s"
        if token not in _ALLOWED[isinstance(top.members, dict), top.state]:
            return _give_up(stack, match.end() - len(match[1] or match[2]), False, string_start)
        position, string_start = match.end(), -1
        if token == '"':
            string_start = position - 1
            string = _string(text, string_start)
            position = string.end
            if isinstance(top.members, dict) and top.state in (_FIRST, _KEY):
                top.key, top.state = string.value, _COLON
            elif not string.broken:
                top.add(string)
            if not string.closed:
                return _give_up(stack, position, string.truncated, string_start)
        elif token == "s":
            top.add(Node(match.start(2), position, _scalar(match[2])))
        elif token in "{[":
            if len(stack) == MAX_DEPTH:
                return _give_up(stack, position - 1, False, -1)
            child = _container(text, position - 1)
            top.add(child)
            stack.append(child)
        elif token in "}]":
            top.closed, top.end = True, position
            stack.pop()
            if stack:
                stack[-1].duplicate = stack[-1].duplicate or top.duplicate
        else:
            top.state = _VALUE if token == ":" or isinstance(top.members, list) else _KEY
    return root, root.end


def _container(text: str, start: int) -> Node:
    return Node(start, start + 1, {}, {}) if text[start] == "{" else Node(start, start + 1, [], [])


def _give_up(stack: list[Node], end: int, truncated: bool, string_start: int) -> tuple[Node, int]:
    """Mark what is still open, and say where to go on."""
    for node in stack:
        node.end, node.broken = end, not truncated
    if truncated:
        return stack[0], end
    return stack[0], string_start + 1 if string_start >= 0 else end


def _string(text: str, start: int) -> Node:
    """The string whose opening quote is at `start`: closed, truncated by the end of the text, or broken."""
    end = _STRING_BODY.match(text, start + 1).end()  # pyright: ignore[reportOptionalMemberAccess]  (matches "" too)
    if text[end : end + 1] == '"':
        body = text[start : end + 1]
        return Node(start, end + 1, json.loads(body) if "\\" in body else body[1:-1])
    whole = end
    if end < len(text) and len(text) - end <= 6 and _PARTIAL_ESCAPE.match(text, end):
        end = len(text)
    node = Node(start, end, json.loads(text[start:whole] + '"'))
    node.closed, node.broken = False, end < len(text)
    return node


def _scalar(token: str) -> Any:
    if token in _LITERALS:
        return _LITERALS[token]
    if token.lstrip("-").isdigit() and len(token) <= 4000:  # Python refuses to read longer integers
        return int(token)
    return float(token)


def classify_tokens(text: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(class, start, end) of every token of the JSON in text[start:end], in order; it may break off anywhere.

    Classes: structure (brackets, colons, commas, quotes), key, value. Quotes are apart from what they enclose.
    """
    stack: list[bool] = []  # True for an object
    key_next = False
    position = start
    while position < end and (match := _TOKEN.match(text, position, end)):
        token, position = match[1], match.end()
        if token == '"':
            yield "structure", position - 1, position
            body_start = position
            position = min(_string(text, body_start - 1).end, end)
            closed = closes_string(text, body_start - 1, position)
            body_end = position - 1 if closed else position
            if body_start < body_end:
                yield ("key" if key_next else "value"), body_start, body_end
            if closed:
                yield "structure", body_end, position
            key_next = False
        elif token is None:
            yield "value", match.start(2), position
        else:
            yield "structure", position - 1, position
            if token in "{[":
                stack.append(token == "{")
            elif token in "}]" and stack:
                stack.pop()
            key_next = token == "{" or (token == "," and bool(stack) and stack[-1])
    if _PARTIAL_SCALAR.match(text, position, end) and (rest := text[position:end].lstrip()):
        yield "value", end - len(rest), end


def closes_string(text: str, start: int, end: int) -> bool:
    """Does the string that opens with the quote at `start` close with a quote at `end - 1`?"""
    body = _STRING_BODY.match(text, start + 1)
    assert body is not None, "the pattern matches the empty string too"
    return body.end() == end - 1 and text[end - 1] == '"'


_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^u]")


def unescape(text: str, start: int, end: int) -> tuple[str, _SourceMap]:
    """The string body text[start:end] decoded, and the map from its positions to those of `text`."""
    parts, decoded, source = [], [0], [start]  # breakpoints: decoded[i] stands at source[i], one to one from there
    position, length = start, 0
    for match in _ESCAPE.finditer(text, start, end):
        plain = text[position : match.start()]
        character = json.loads(f'"{match[0]}"')
        parts += [plain, character]
        decoded += [length + len(plain), length + len(plain) + len(character)]
        source += [match.start(), match.end()]
        length += len(plain) + len(character)
        position = match.end()
    parts.append(text[position:end])
    return "".join(parts), _SourceMap(decoded, source)


class _SourceMap:
    """Positions of a decoded string -> positions of its escaped source."""

    def __init__(self, decoded: list[int], source: list[int]):
        self._decoded, self._source = decoded, source

    def __getitem__(self, position: int) -> int:
        index = bisect_right(self._decoded, position) - 1
        return self._source[index] + position - self._decoded[index]
