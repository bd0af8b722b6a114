"""Sets of ids at chosen tokens: the branches between offered tools, continuations of a copy, other numbers.

In:  an assistant turn (text, tokens, calls found, reused spans), the offered names, the tool results seen before it.
Out: `IdSets`. Kinds: `SetKind`.

Alternatives are spelled in place and tokenised with the text around them, never alone, so that their tokens are those that
would have been written. Where the tokenizer gives the window around a name or number other tokens than the written ones,
it gets no sets. Linear in text and results; each result is tokenised once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from raykd.data.detokenize import decode_tokens, token_bytes
from raykd.data.extractors import ToolCall
from raykd.data.value_readings import Reading, find_readings
from raykd.types import SetKind, Span

_CONTEXT_TOKENS = 4  # tokens around a name or number that are tokenised with it
_MAX_SET = 64  # larger sets of continuations say nothing
_MAX_OTHERS = 32  # other numbers that one number is told from
_MAX_RESULT_CHARS = 1 << 20  # a tool result is read so far
_KEY_CHARS = 32
_WORD_START = re.compile(r"(?<!\w)\w|[^\w\s]")


class IdSets(NamedTuple):
    """S sets, by rising position."""

    position: np.ndarray  # int32 [S] the token
    kind: np.ndarray  # int8 [S] SetKind
    sizes: np.ndarray  # int32 [S]
    ids: np.ndarray  # int32 [sum of sizes], the sets end to end, each id once in a set


class Turn(NamedTuple):
    """An assistant turn of T tokens."""

    text: str
    offsets: np.ndarray  # [T, 2] characters
    ids: np.ndarray  # [T]
    tokenizer: Any


class CopyIndex:
    """A tool result, ready to say how a copy out of it may go on."""

    def __init__(self, result: str, tokenizer: Any):
        result = result[:_MAX_RESULT_CHARS]
        encoded = tokenizer(result, add_special_tokens=False, return_offsets_mapping=token_bytes(tokenizer) is None)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        if "offset_mapping" in encoded:
            self.text, offsets = result, np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        else:
            self.text, offsets = decode_tokens(tokenizer, ids)
        written = offsets[:, 0] < offsets[:, 1]
        self._id_at = np.full(len(self.text) + 1, -1, dtype=np.int32)  # token that begins at a character
        self._id_at[offsets[written, 0][::-1]] = ids[written][::-1]  # of several in one character, the first
        starts = [match.start() for match in _WORD_START.finditer(self.text)]
        self._starts = sorted(starts, key=lambda start: self.text[start : start + _KEY_CHARS])
        self._keys = [self.text[start : start + _KEY_CHARS] for start in self._starts]
        self.numbers = [(self.text[number.span.start : number.span.end], number.values) for number in _numbers(self.text)]

    def occurrences(self, prefix: str) -> list[int] | None:
        """Where words begin that go on with `prefix`; None where there are too many to tell."""
        key = prefix[:_KEY_CHARS]
        low = bisect_left(self._keys, key)
        high = bisect_left(self._keys, key + "\U0010ffff", lo=low)
        if high - low > _MAX_SET:
            return None
        return [start for start in self._starts[low:high] if self.text.startswith(prefix, start)]

    def next_ids(self, positions: list[int]) -> set[int]:
        """The tokens that begin at these characters."""
        return set(self._id_at[positions].tolist()) - {-1}


def id_sets(
    turn: Turn,
    kinds: Collection[SetKind],
    *,
    calls: Sequence[ToolCall] = (),
    tool_names: Collection[str] = (),
    reused: Sequence[Span] = (),
    allowed: np.ndarray | None = None,
    results: Sequence[CopyIndex] = (),
) -> IdSets:
    """The sets of an assistant turn.

    Args:
        kinds: which kinds are wanted.
        calls: of the turn; each whose name is one of `tool_names` gets sets where the names part.
        reused: spans of the text that reuse a value of the results.
        allowed: bool [T], tokens at which copies and numbers may have sets; None: all.
        results: tool results seen before the turn.
    """
    found: dict[tuple[int, int], set[int]] = {}

    def take(sets: Iterator[tuple[int, set[int]]], kind: SetKind, where: np.ndarray | None) -> None:
        for position, ids in sets:
            if where is None or where[position]:
                found.setdefault((position, kind.value), set()).update(ids)

    if SetKind.TOOL_CHOICE in kinds and len(tool_names) > 1:
        names = tuple(sorted(tool_names))
        for call in calls:
            if call.name in tool_names:
                take(_tool_branches(turn, call, names), SetKind.TOOL_CHOICE, None)
    if SetKind.COPY in kinds:
        for span in sorted(set(reused)):
            take(_continuations(turn, span, results), SetKind.COPY, allowed)
    if SetKind.CONTRADICTION in kinds and results and reused:
        take(_other_numbers(turn, results), SetKind.CONTRADICTION, allowed)
    return _pack(found)


def _pack(found: dict[tuple[int, int], set[int]]) -> IdSets:
    kept = [(position, kind, sorted(ids)) for (position, kind), ids in sorted(found.items()) if 0 < len(ids) <= _MAX_SET]
    return IdSets(
        position=np.array([position for position, _, _ in kept], dtype=np.int32),
        kind=np.array([kind for _, kind, _ in kept], dtype=np.int8),
        sizes=np.array([len(ids) for _, _, ids in kept], dtype=np.int32),
        ids=np.array([i for _, _, ids in kept for i in ids], dtype=np.int32),
    )


def _tool_branches(turn: Turn, call: ToolCall, names: tuple[str, ...]) -> Iterator[tuple[int, set[int]]]:
    """At each token where the names that agree so far part: the ids of all their branches."""
    written = turn.text[call.name_span.start : call.name_span.end]
    if written not in (call.name, json.dumps(call.name)[1:-1]):
        return  # cut off, or escaped in some other way
    if written != call.name:
        names = tuple(json.dumps(name)[1:-1] for name in names)
    for position, written_id, others in _partings(turn, call.name_span, names, tokens_around=1):
        yield position, others | {written_id}


def _other_numbers(turn: Turn, results: Sequence[CopyIndex]) -> Iterator[tuple[int, set[int]]]:
    """Within each number of the results: the ids with which it would become another of their numbers."""
    known = {value for result in results for _, values in result.numbers for value in values}
    spellings: dict[str, frozenset] = {}
    for result in results:
        spellings.update(result.numbers)
    newest = list(spellings.items())[::-1]
    for number in _numbers(turn.text):
        if known.isdisjoint(number.values):
            continue
        others = (spelling for spelling, values in newest if values.isdisjoint(number.values))
        for position, written_id, ids in _partings(turn, number.span, tuple(islice(others, _MAX_OTHERS)), tokens_around=0):
            yield position, ids - {written_id}


def _numbers(text: str) -> list[Reading]:
    """Numbers of a text by position, of overlapping readings the longest."""
    readings = [reading for reading in find_readings(text) if next(iter(reading.values))[0] == "number"]
    readings.sort(key=lambda reading: (reading.span.start, -reading.span.end))
    kept: list[Reading] = []
    for reading in readings:
        if not kept or reading.span.start >= kept[-1].span.end:
            kept.append(reading)
    return kept


def _partings(
    turn: Turn, span: Span, spellings: tuple[str, ...], *, tokens_around: int
) -> Iterator[tuple[int, int, set[int]]]:
    """(token, its id, ids of the alternatives that part from the text there), were another spelling written at `span`.

    Up to `tokens_around` tokens around the span too: names part before it where a token joins the quote and a name's first
    letters, behind it where one name is the beginning of another.
    """
    text, offsets, ids, tokenizer = turn
    first = int(np.searchsorted(offsets[:, 1], span.start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], span.end, side="left"))
    begin, end = max(0, first - _CONTEXT_TOKENS), min(len(ids), last + _CONTEXT_TOKENS)
    if first >= last:
        return
    lowest = max(begin, first - tokens_around)
    before, after = text[offsets[begin, 0] : span.start], text[span.end : offsets[end - 1, 1]]
    written, *others = _encode(tokenizer, before, after, (text[span.start : span.end], *spellings))
    shift = end - len(written)  # aligned at the right end: at the left the tokenizer may have put a space
    if shift > lowest or written[lowest - shift :] != tuple(ids[lowest:end].tolist()):
        return
    parted: dict[int, set[int]] = {}
    for other in others:
        place = next((i for i, (a, b) in enumerate(zip(written, other, strict=False)) if a != b), None)
        if place is not None and lowest <= place + shift < last + tokens_around:
            parted.setdefault(place + shift, set()).add(other[place])
    for position in sorted(parted):
        # Spellings that part later share the written id here.
        yield position, int(ids[position]), parted[position]


@lru_cache(maxsize=1024)
def _encode(tokenizer: Any, before: str, after: str, spellings: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Ids of `before + spelling + after` for each spelling."""
    texts = [before + spelling + after for spelling in spellings]
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _continuations(turn: Turn, span: Span, results: Sequence[CopyIndex]) -> Iterator[tuple[int, set[int]]]:
    """At each token of a verbatim copy but the first: ids with which any place that reads the same so far goes on."""
    text, offsets, ids, _ = turn
    first = int(np.searchsorted(offsets[:, 1], span.start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], span.end, side="left"))
    starts = offsets[first:last, 0].tolist()
    ends = np.minimum(offsets[first:last, 1], span.end).tolist()  # where each token's part of the copy ends
    for result in results:
        places: list[int] | None = None
        for index in range(1, len(ends)):
            copied, until = ends[index - 1], ends[index]
            length = copied - span.start
            if places is None:
                places = result.occurrences(text[span.start : copied])
            if places is None and length >= _KEY_CHARS:
                break
            if places is None:
                continue
            part = text[copied:until]
            ahead = [place for place in places if result.text.startswith(part, place + length)]
            if not ahead:
                break
            if starts[index] == copied < until:
                written = int(ids[first + index])
                yield first + index, result.next_ids([place + length for place in places]) | {written}
            places = ahead
