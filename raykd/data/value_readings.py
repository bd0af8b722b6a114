"""Numbers, dates and times as people write them, in any locale.

In:  a text.
Out: every place of a number, date or time in it, with all values that its characters may stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

from raykd.types import Span

_MONTH_NAMES = (
    ("january", "jan"),
    ("february", "feb"),
    ("march", "mar"),
    ("april", "apr"),
    ("may",),
    ("june", "jun"),
    ("july", "jul"),
    ("august", "aug"),
    ("september", "sept", "sep"),
    ("october", "oct"),
    ("november", "nov"),
    ("december", "dec"),
)
_MONTHS = {name: number for number, names in enumerate(_MONTH_NAMES, start=1) for name in names}
_MONTH = "(?:" + "|".join(_MONTHS) + r")\b\.?"
_DATE = re.compile(
    r"(?<![\w.])(?:"
    r"(?P<iso>\d{4}(?P<iso_mark>[-/.])\d{1,2}(?P=iso_mark)\d{1,2})(?=\Z|[^\w-]|T\d)"
    r"|(?P<numeric>\d{1,2}(?P<mark>[./-])\d{1,2}(?P=mark)\d{4})(?![\w-])"
    rf"|(?P<month1>{_MONTH})\s+(?P<day1>\d{{1,2}})(?:st|nd|rd|th)?(?!\w)(?:,?\s+(?P<year1>\d{{4}})(?!\w))?"
    rf"|(?P<day2>\d{{1,2}})(?:st|nd|rd|th)?\.?\s+(?:of\s+)?(?P<month2>{_MONTH})(?:,?\s+(?P<year2>\d{{4}})(?!\w))?"
    r")",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?:(?<![\w:.])|(?<=\dT))(?:"
    r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?(?![\d:])(?:\s?(?P<half>[ap])\.?m\b\.?)?"
    r"|(?P<hour_only>\d{1,2})\s?(?P<half_only>[ap])\.?m\b\.?)",
    re.IGNORECASE,
)
_MARK = r"[.,'’ \u00a0\u202f]"
# Digits with group and decimal marks; a space groups exactly three digits. Not inside a word, an id or a version.
_NUMBER = re.compile(
    r"(?<![\w.,])(?<![^\W\d]-)(?P<written>-?[0-9]++(?:[.,'’][0-9]++|[ \u00a0\u202f][0-9]{3}(?![0-9]))*+"
    r"(?:[eE][+-]?[0-9]{1,3}(?!\w))?)(?P<unit>\s?%|[^\W\d_]{0,3})(?!\w)"
)
_UNSPACED = re.compile(r"[^ \u00a0\u202f]+")
_LIST_MARK = re.compile(r"[ \t>]*\d{1,3}[.)][ \t]")


class Reading(NamedTuple):
    """A number, date or time in a text and the values that it may stand for: ("number", "1234.5"), ("date", 2024, 5, 15),
    ("day", 5, 15) for a date without year, ("time", 18, 30, 0)."""

    span: Span
    values: frozenset[tuple[Any, ...]]


def find_readings(text: str) -> list[Reading]:
    """All dates, times, and the numbers that are no part of one, in no particular order."""
    found = [*_dates(text), *_times(text)]
    pieces, position = [], 0
    for span in sorted(reading.span for reading in found):
        if span.start >= position:
            pieces += [text[position : span.start], "_" * (span.end - span.start)]
            position = span.end
    return [*found, *_numbers("".join(pieces) + text[position:])]


def _numbers(text: str) -> Iterator[Reading]:
    """Digits that spaces group are read both ways: 1 234 is one number, or two."""
    for match in _NUMBER.finditer(text):
        start, end = match.span("written")
        if _is_list_mark(text, start):
            continue
        ranges = {(start, end)} | {part.span() for part in _UNSPACED.finditer(text, start, end)}
        for first, last in sorted(ranges):
            percent = last == end and match["unit"].strip() == "%"
            values = _number_values(text[first:last], percent)
            if values:
                span = Span(first, match.end() if percent else last)
                yield Reading(span, frozenset(("number", canonical(value)) for value in values))


def _is_list_mark(text: str, start: int) -> bool:
    """Does the number at `start` only count the items of a list ("1. ", "2) ")?"""
    line = max(text.rfind("\n", max(0, start - 8), start) + 1, 0)
    if line == 0 and start >= 8:
        return False
    return not text[line:start].strip(" \t>") and _LIST_MARK.match(text, line) is not None


def _number_values(written: str, percent: bool) -> list[Decimal]:
    """The numbers that these characters may stand for: 1.234 is one and a bit, or more than a thousand."""
    mantissa, _, exponent = written.lower().partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    parts, marks = re.split(_MARK, mantissa.lstrip("-")), re.findall(_MARK, mantissa)
    plain = []
    if not marks or (len(set(marks)) == 1 and _are_groups(parts)):
        plain.append("".join(parts))
    decimal_mark = bool(marks) and marks[-1] in ".," and marks[-1] not in marks[:-1] and len(set(marks[:-1])) <= 1
    if decimal_mark and (len(marks) == 1 or _are_groups(parts[:-1])):
        plain.append("".join(parts[:-1]) + "." + parts[-1])
    values = [Decimal(sign + digits + (f"e{exponent}" if exponent else "")) for digits in plain if len(digits) <= 40]
    return values + [value.scaleb(-2) for value in values] if percent else values


def _are_groups(parts: list[str]) -> bool:
    return 1 <= len(parts[0]) <= 3 and all(len(part) == 3 for part in parts[1:])


def canonical(value: Decimal) -> str:
    """One spelling per value: 5.00 and 5 are "5"."""
    if not value:
        return "0"
    digits = format(value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _dates(text: str) -> Iterator[Reading]:
    """05/06/2024 has two values."""
    for match in _DATE.finditer(text):
        if match["iso"]:
            year, month, day = map(int, match["iso"].split(match["iso_mark"]))
            candidates = [("date", year, month, day)]
        elif match["numeric"]:
            first, second, year = map(int, match["numeric"].split(match["mark"]))
            candidates = [("date", year, second, first), ("date", year, first, second)]
        else:
            month = _MONTHS[(match["month1"] or match["month2"]).rstrip(".").casefold()]
            day, year = int(match["day1"] or match["day2"]), match["year1"] or match["year2"]
            candidates = [("date", int(year), month, day) if year else ("day", month, day)]
        values = frozenset(value for value in candidates if 1 <= value[-2] <= 12 and 1 <= value[-1] <= 31)
        if values:
            yield Reading(Span(*match.span()), values)


def _times(text: str) -> Iterator[Reading]:
    for match in _TIME.finditer(text):
        hour, half = int(match["hour"] or match["hour_only"]), (match["half"] or match["half_only"] or "").lower()
        if half:
            if not 1 <= hour <= 12:
                continue
            hour = hour % 12 + (12 if half == "p" else 0)
        minute, second = int(match["minute"] or 0), int(match["second"] or 0)
        if hour < 24 and minute < 60 and second < 60:
            yield Reading(Span(*match.span()), frozenset([("time", hour, minute, second)]))
