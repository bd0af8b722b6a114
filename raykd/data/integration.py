"""Where a text reuses the values of tool results.

In:  a text and the tool results seen before it, as JSON or plain text.
Out: spans (code points) of every reuse.

A value is indexed once, whatever its kind, and the text is read once per kind; cost is the sum of both lengths, not their
product. What counts as a value:

* JSON: every string and number in the result; never keys, true, false or null.
* Other text, and sentences inside JSON (six words or more): its numbers, dates, times, ids, URLs, quoted strings, whole
  lines, and what stands behind `label:` on a line.
* A number equals any locale's way to write it (1234.5 = 1,234.50 = 1.234,50), also as a percentage (0.15 = 15 %).
  A number that only counts the items of a list ("1. ") is none.
* A date equals any way to write it ("2024-05-15", "May 15, 2024", "15.05.2024"; also without its year), a time likewise.
* A string matches as a run of whole words, in any case, with any white space or underscores between; a code of up to four
  capitals ("SEA") only in capitals. Strings of fewer than three letters and digits (two where a digit is among them) and
  the words of `_COMMON` are left out: they would match by chance.
* A URL also matches without its scheme, and by host and first path segment.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from raykd.data.value_readings import canonical, find_readings
from raykd.types import Span

_FREE_TEXT_WORDS = 6
_COMMON_WORDS = """
    true false null none nan yes no ok okay and are but can did does done error fail failed for found from get got had has
    have her him his how into its let may more new not nothing now off one our out per result results see set she some
    status success successful successfully than that the their them then there they this too type unknown use value was
    were what when where which who why will with would you your all any
"""
_COMMON = frozenset(_COMMON_WORDS.split())

_WORD = re.compile(r"[^\W_]+|[^\w\s]")
_ALPHANUMERIC = re.compile(r"[^\W_]")
_IDS = re.compile(
    r"https?://[^\s\"'<>)\]]+"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w.-]{1,255}\w"
    r"|(?<![\w-])(?=[\w-]{0,63}[0-9])(?=[\w-]{0,63}[^\W0-9_])[\w-]{3,64}(?![\w-])"
)
_QUOTED = re.compile(r"\"([^\"\n]{2,200})\"|“([^”\n]{2,200})”|`([^`\n]{2,200})`")
_LABELLED = re.compile(r"^[ \t*-]*+[^:\n]{1,60}:[ \t]++([^\n]+)$", re.MULTILINE)
_URL = re.compile(r"https?://([^/\s?#]++)(/[^/\s?#]++)?+\S*+", re.IGNORECASE)


def find_integration_spans(text: str, tool_results: Sequence[str], max_spans: int | None = None) -> list[Span]:
    """Spans of `text` that reuse a value of the tool results: sorted, disjoint, all of them unless `max_spans` is given."""
    return ResultIndex(tool_results).find(text)[:max_spans]


class ResultIndex:
    """The values of some tool results, ready to be looked for in any number of texts."""

    def __init__(self, tool_results: Iterable[str]):
        self.texts = tuple(tool_results)
        self._readings: set[tuple[Any, ...]] = set()
        phrases: dict[tuple[str, ...], bool] = {}  # words of a string -> must it stand in capitals
        for result in self.texts:
            for value in _values(result):
                if isinstance(value, str):
                    self._add_string(value, phrases)
                elif value.is_finite() and abs(value.adjusted()) < 40:
                    self._readings.add(("number", canonical(value)))
        self._phrases = _PhraseMatcher(phrases)

    def find(self, text: str) -> list[Span]:
        """Sorted, disjoint spans of `text` that reuse an indexed value."""
        spans = [found.span for found in find_readings(text) if not self._readings.isdisjoint(found.values)]
        return _union(spans + self._phrases.find(text))

    def _add_string(self, value: str, phrases: dict[tuple[str, ...], bool]) -> None:
        value = value.strip()
        free_text = len(value.split(maxsplit=_FREE_TEXT_WORDS)) >= _FREE_TEXT_WORDS
        is_number = False
        for found in find_readings(value):
            whole = found.span == (0, len(value))
            for kind, *parts in found.values:
                if kind != "number" or free_text or (whole and not _is_code(value)):
                    self._readings.add((kind, *parts))
                if kind == "date":
                    self._readings.add(("day", *parts[1:]))
                is_number = is_number or (kind == "number" and whole and not _is_code(value))
        if is_number:
            return
        for variant in _url_variants(value):
            words = _words(variant)
            count = sum(len(word) for word in words if _ALPHANUMERIC.match(word))
            has_digit = any(character.isdigit() for character in variant)
            if (count >= 3 or (count == 2 and has_digit)) and " ".join(words) not in _COMMON:
                capitals = len(variant) <= 4 and variant.isalpha() and variant.isupper()
                phrases[words] = phrases.get(words, True) and capitals


def _is_code(digits: str) -> bool:
    """A leading zero makes a code of it: a post code, a telephone number."""
    return len(digits) > 1 and digits.isdigit() and digits.startswith("0")


def _values(result: str) -> Iterator[Decimal | str]:
    """Strings and numbers of a result."""
    try:
        tree = json.loads(result, parse_int=Decimal, parse_float=Decimal, parse_constant=Decimal)
    except (ValueError, RecursionError, InvalidOperation):
        tree = result
    pending: list[Any] = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, Decimal):
            yield value
        elif isinstance(value, str):
            yield value
            if value is tree or len(value.split(maxsplit=_FREE_TEXT_WORDS)) >= _FREE_TEXT_WORDS:
                yield from _parts_of_text(value)


def _parts_of_text(text: str) -> Iterator[str]:
    """Numbers, ids, URLs, quoted strings, lines and labelled values of a text."""
    for found in find_readings(text):
        yield text[found.span.start : found.span.end]
    for match in _IDS.finditer(text):
        yield match[0].rstrip(".,;:")
    for match in _QUOTED.finditer(text):
        yield match[1] or match[2] or match[3]
    for match in _LABELLED.finditer(text):
        yield match[1]
    if "\n" in text:
        yield from (line for line in text.splitlines() if len(line.split()) > 1)


def _url_variants(value: str) -> Iterator[str]:
    yield value
    url = _URL.fullmatch(value)
    if url:
        yield value.split("://", 1)[1].rstrip("/")
        yield url[1] + (url[2] or "")


def _words(text: str) -> tuple[str, ...]:
    """Words and marks of a value, folded, without marks at its ends."""
    words = [match[0].casefold() for match in _WORD.finditer(text)]
    start, end = 0, len(words)
    while start < end and not _ALPHANUMERIC.match(words[start]):
        start += 1
    while end > start and not _ALPHANUMERIC.match(words[end - 1]):
        end -= 1
    return tuple(words[start:end])


def _union(spans: list[Span]) -> list[Span]:
    """Overlapping spans joined, sorted."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start < joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


class _PhraseMatcher:
    """Finds any of many phrases of words in one pass (Aho and Corasick, 1975): linear in text and phrases."""

    def __init__(self, phrases: dict[tuple[str, ...], bool]):
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._phrase: list[tuple[int, bool] | None] = [None]  # by state: (words, capitals) of the phrase that ends here
        self._shorter = [0]  # by state: the next shorter state at which a phrase ends, 0 for none
        for words, capitals in phrases.items():
            state = 0
            for word in words:
                if word not in self._next[state]:
                    self._next[state][word] = len(self._next)
                    self._next.append({})
                    self._fail.append(0)
                    self._phrase.append(None)
                    self._shorter.append(0)
                state = self._next[state][word]
            self._phrase[state] = (len(words), capitals)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fail = self._fail[state]
            self._shorter[state] = fail if self._phrase[fail] else self._shorter[fail]
            for word, child in self._next[state].items():
                self._fail[child] = self._step(fail, word)
                queue.append(child)

    def _step(self, state: int, word: str) -> int:
        while state and word not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(word, 0)

    def find(self, text: str) -> list[Span]:
        """The longest phrase that ends at each word; a phrase stands between word boundaries."""
        if not self._next[0]:
            return []
        words = list(_WORD.finditer(text))
        spans, state = [], 0
        for index, word in enumerate(words):
            state = self._step(state, word[0].casefold())
            candidate = state
            while candidate:
                phrase = self._phrase[candidate]
                if phrase is not None:
                    span = Span(words[index - phrase[0] + 1].start(), word.end())
                    if _stands_alone(text, span) and (not phrase[1] or text[span.start : span.end].isupper()):
                        spans.append(span)
                        break
                candidate = self._shorter[candidate]
        return spans


def _stands_alone(text: str, span: Span) -> bool:
    """No underscore ties the words to a longer id (letters and digits cannot: words are whole)."""
    return text[max(0, span.start - 1) : span.start] != "_" and text[span.end : span.end + 1] != "_"
