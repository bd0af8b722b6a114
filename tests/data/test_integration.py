"""Reuse of tool results: all values, in the ways people write them, and nothing else."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data import integration
from raykd.data.integration import ResultIndex, find_integration_spans


def reused(text, *results):
    results = [result if isinstance(result, str) else json.dumps(result) for result in results]
    spans = find_integration_spans(text, results)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    return [text[span.start : span.end] for span in spans]


@pytest.mark.parametrize(
    "text", ["I found nothing.", "Based on U.S. rules, v2.0 of 3.14. Found it.", "According to it, True and false."]
)
def test_phrases_about_results_are_no_reuse(text):
    assert reused(text, {"results": [], "status": "found", "ok": True, "error": None, "n": 7}) == []


@pytest.mark.parametrize(
    "written", ["1234.5", "1,234.50", "1.234,50", "1 234,5", "1'234.5", "1234,5", "1\u202f234,50", "$1,234.50", "1234.5 kg"]
)
def test_a_number_is_found_in_any_locale(written):
    assert len(reused(f"The total is {written}.", {"total": 1234.5})) == 1


@pytest.mark.parametrize("text", ["15 and 51", "5.2 or 2.5", "v5 and A5, id_5, HAT-5", "1.5.2", "2,500", "-5", "0.05"])
def test_a_number_inside_another_is_none(text):
    assert reused(text, {"n": 5}) == []


def test_numbers_match_by_value():
    assert reused("5 items, 5.0 in all, 5% and 500%.", {"n": 5}) == ["5", "5.0", "5%", "500%"]
    assert reused("It rose by 15 % to -3.", {"rate": 0.15, "t": -3}) == ["15 %", "-3"]
    assert reused("Price: 51, seats 17", '{"price": "51.00", "seats": "17"}') == ["51", "17"]
    assert reused("1. One\n2. Two: 2", {"n": 2}) == ["2"]  # not the count of the list
    assert reused("10-15", {"a": 10, "b": 15}) == ["10", "15"]


@pytest.mark.parametrize(
    "written",
    ["2024-05-15", "May 15, 2024", "May 15th", "15 May 2024", "15.05.2024", "05/15/2024", "2024/05/15", "15th of may, 2024"],
)
def test_a_date_is_found_however_it_is_written(written):
    assert reused(f"It leaves on {written}, I think", {"date": "2024-05-15"}) == [written]


@pytest.mark.parametrize("written", ["2024-05-16", "May 15, 2023", "June 15", "16.05.2024", "15"])
def test_another_date_is_not(written):
    assert reused(f"It leaves on {written}", {"date": "2024-05-15"}) == []


def test_times_ids_urls_and_strings():
    result = {
        "at": "2024-05-20T18:30:00Z",
        "id": "credit_card_4421",
        "url": "https://example.com/docs/a?x=1",
        "city": "New York",
        "code": "SEA",
        "zip": "02139",
        "name": "Zoë Müller",
    }
    text = "At 6:30 PM: credit_card_4421, card_4421, example.com/docs, NEW\nYork, "
    text += "New Yorkers, sea, SEA, 02139, 2139, zoë müller"
    assert reused(text, result) == [
        "6:30 PM",
        "credit_card_4421",
        "example.com/docs",
        "NEW\nYork",
        "SEA",
        "02139",
        "zoë müller",
    ]


def test_short_and_common_strings_are_left_out():
    assert reused("x to a, ok, success A1 the", {"a": "x", "b": "to", "c": "ok", "d": "success", "e": "A1", "f": "the"}) == [
        "A1"
    ]


def test_keys_and_booleans_are_no_values():
    assert reused("The temperature is True", {"temperature": True}) == []


def test_results_that_are_no_json_give_numbers_ids_quotes_lines_and_labelled_values():
    result = 'Order #W123X shipped.\nCarrier: Blue Dart\nTotal was 12.50 EUR on 2024-05-15 for "two lamps"'
    text = "W123X goes by Blue Dart, two lamps for 12,50 on May 15."
    assert reused(text, result) == ["W123X", "Blue Dart", "two lamps", "12,50", "May 15"]


def test_sentences_inside_json_are_read_too():
    assert reused("2.1 million? No: 2102650.", {"text": "Paris has 2,102,650 inhabitants as of the last census."}) == [
        "2102650"
    ]


def test_there_is_no_cap_unless_asked_for():
    result = json.dumps({"n": list(range(100, 200))})
    text = " ".join(map(str, range(100, 200)))
    assert len(find_integration_spans(text, [result])) == 100
    assert find_integration_spans(text, [result], max_spans=3) == find_integration_spans(text, [result])[:3]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.from_regex(r"[a-zäß0-9]{5,8}", fullmatch=True), min_size=1, max_size=5), before=st.text(max_size=20)
)
def test_any_string_is_found_between_word_boundaries(words, before):
    text = f"{before} {'  '.join(words).upper()}, and so on"
    if " ".join(words).isdigit():
        return
    assert any(
        " ".join(words).casefold() in " ".join(found.casefold().split()) for found in reused(text, {"v": " ".join(words)})
    )


@settings(max_examples=60, deadline=None)
@given(results=st.lists(st.text(max_size=40), max_size=3), text=st.text(max_size=60))
def test_any_text_is_survived(results, text):
    find_integration_spans(text, results)


def test_every_word_is_looked_at_a_bounded_number_of_times(monkeypatch):
    steps = 0

    class Counting(integration._PhraseMatcher):
        def _step(self, state, word):
            nonlocal steps
            while state and word not in self._next[state]:
                steps += 1
                state = self._fail[state]
            steps += 1
            return self._next[state].get(word, 0)

    monkeypatch.setattr(integration, "_PhraseMatcher", Counting)
    index = ResultIndex([json.dumps([" ".join(["a"] * n + ["b"]) for n in range(2, 200, 10)])])
    steps = 0
    index.find("a " * 20_000)
    assert steps <= 2 * 20_000 + 10
