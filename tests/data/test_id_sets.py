"""Sets of ids: they spell what they say, in place, whatever the tokenizer."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raykd.data import id_sets as module
from raykd.data.detokenize import decode_tokens
from raykd.data.extractors import extract_tool_calls, find_integration_spans
from raykd.data.id_sets import CopyIndex, Turn, id_sets
from raykd.types import SetKind, Span
from tests.data.test_examples import FAST, tokenizer_of


def make_turn(kind, text):
    tokenizer = tokenizer_of(kind) if isinstance(kind, str) else kind
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return Turn(*decode_tokens(tokenizer, ids), ids, tokenizer)


def unpacked(sets):
    """(position, kind) -> ids."""
    bounds = np.cumsum(sets.sizes)[:-1]
    return {
        (int(position), SetKind(kind)): part.tolist()
        for position, kind, part in zip(sets.position, sets.kind, np.split(sets.ids, bounds), strict=False)
    }


def spelled(turn, ids):
    return sorted(turn.tokenizer.decode([i]) for i in ids)


def call_text(name, prose="Let me see.\n"):
    return f'{prose}<tool_call>\n{{"name": "{name}", "arguments": {{"city": "Paris"}}}}\n</tool_call>'


def choice_sets(turn, names):
    return unpacked(id_sets(turn, [SetKind.TOOL_CHOICE], calls=extract_tool_calls(turn.text), tool_names=names))


NAMES = st.text("aceghnortw", min_size=1, max_size=8)


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=2, max_size=5, unique=True), prose=st.sampled_from(["", "Grüße 🙂\n", "a " * 9]))
def test_the_branches_of_the_offered_names_are_told_apart_in_place(kind, names, prose):
    turn = make_turn(kind, call_text(names[0], prose))
    sets = choice_sets(turn, names)
    whole = {name: turn.tokenizer(call_text(name, prose), add_special_tokens=False)["input_ids"] for name in names}
    assume(not any(turn.tokenizer.unk_token_id in ids for ids in whole.values()))
    # Following the written branch at every set, each other name is left exactly once.
    left = set()
    for (position, _), ids in sets.items():
        written = int(turn.ids[position])
        assert written in ids
        assert len(ids) == len(set(ids)) > 1
        going = {name for name in names if whole[name][:position] == turn.ids[:position].tolist()}
        assert {whole[name][position] for name in going} == set(ids)
        left |= {name for name in going if whole[name][position] != written}
    assert left == set(names[1:])


def test_one_name_may_begin_another_and_a_common_beginning_has_no_set():
    turn = make_turn("byte level", call_text("get_w"))
    sets = choice_sets(turn, ["get_w", "get_we", "get_t"])
    calls = extract_tool_calls(turn.text)
    assert all(turn.offsets[position, 1] > calls[0].name_span.start for position, _ in sets)
    last = max(position for position, _ in sets)
    assert turn.offsets[last, 0] >= calls[0].name_span.end  # the quote, or "e"


@pytest.mark.parametrize("names", [["get_w"], [], ["a", "b"]])
def test_without_a_choice_or_with_an_unknown_tool_there_are_no_sets(names):
    assert choice_sets(make_turn("byte level", call_text("get_w")), names) == {}


def test_tokens_that_the_tokenizer_would_not_write_get_no_sets():
    name = "get_wind"
    turn = make_turn("byte level", call_text(name))
    at = turn.text.index(name)
    start, stop = (int(np.flatnonzero(turn.offsets[:, side] == at + side * len(name))[0]) for side in (0, 1))
    canonical = turn.ids[start : stop + 1].tolist()
    vocabulary = turn.tokenizer.get_vocab()
    # As many tokens, but others: "g" and the rest where "ge" was, say.
    cuts = itertools.combinations(range(1, len(name)), len(canonical) - 1)
    splits = [[name[a:b] for a, b in itertools.pairwise((0, *cut, len(name)))] for cut in cuts]
    others = [[vocabulary[piece] for piece in split] for split in splits if all(piece in vocabulary for piece in split)]
    other = next(ids for ids in others if ids != canonical)
    ids = np.concatenate([turn.ids[:start], other, turn.ids[stop + 1 :]]).astype(np.int32)
    written = Turn(*decode_tokens(turn.tokenizer, ids), ids, turn.tokenizer)
    assert written.text == turn.text
    assert choice_sets(turn, [name, "send"]) != {}
    assert choice_sets(written, [name, "send"]) == {}


def reuse_sets(turn, result, kind):
    spans = find_integration_spans(turn.text, [result])
    return unpacked(id_sets(turn, [kind], reused=spans, results=[CopyIndex(result, turn.tokenizer)])), spans


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.text("abcé東1 ", min_size=3, max_size=12), min_size=1, max_size=4), which=st.integers(0, 3))
def test_ids_of_a_copy_continue_some_place_that_reads_the_same_so_far(kind, values, which):
    result = json.dumps({"v": values}, ensure_ascii=False)
    turn = make_turn(kind, f"So: {values[which % len(values)]}, I think")
    result = decode_tokens(turn.tokenizer, np.array(turn.tokenizer(result, add_special_tokens=False)["input_ids"])).text
    sets, spans = reuse_sets(turn, result, SetKind.COPY)
    for (position, _), ids in sets.items():
        assert int(turn.ids[position]) in ids
        begin = turn.offsets[position, 0]
        (span,) = [span for span in spans if span.start < begin < span.end]
        prefix = turn.text[span.start : begin]
        for token in set(ids) - {int(turn.ids[position])}:
            piece = decode_tokens(turn.tokenizer, np.array([token])).text
            assert prefix + piece in result or "\ufffd" in piece


def test_a_copy_may_go_on_wherever_its_beginning_stands():
    turn = make_turn("byte level", "Flight: ABX12.")
    result = '{"first": "ABX12", "second": "ABY9", "third": "CABZ"}'
    sets, _ = reuse_sets(turn, result, SetKind.COPY)
    by_prefix = {turn.text[8 : turn.offsets[p, 0]].strip(): spelled(turn, ids) for (p, _), ids in sets.items()}
    assert by_prefix["AB"] == ["X", "Y"]  # not the Z in the middle of a word
    assert by_prefix["ABX"] == ["1"]


def test_what_is_no_verbatim_copy_gets_no_sets():
    turn = make_turn("byte level", "The total is 1,234.50 then.")
    sets, spans = reuse_sets(turn, '{"total": 1234.5}', SetKind.COPY)
    assert len(spans) == 1
    assert sets == {}


def test_other_numbers_of_the_results_are_contradictions():
    turn = make_turn("byte level", "It is 125 of 99, then.")
    result = '{"a": 125, "b": 130.5, "c": 12, "d": "125.0", "e": 99, "f": 840}'
    sets, _ = reuse_sets(turn, result, SetKind.CONTRADICTION)
    at = turn.text.index("125")
    by_place = {int(turn.offsets[p, 0]): spelled(turn, ids) for (p, _), ids in sets.items()}
    for (position, _), ids in sets.items():
        assert int(turn.ids[position]) not in ids
        assert turn.offsets[position, 1] > at
    assert "3" in by_place[at + 1]  # 1|30.5 instead of 125
    assert by_place[at + 2] == [" "]  # 12 instead of 125


@pytest.mark.parametrize("kind", FAST)
def test_equal_numbers_and_single_numbers_contradict_nothing(kind):
    turn = make_turn(kind, "It is 21.5 now.")
    assert reuse_sets(turn, '{"t": 21.5, "same": "21,50", "w": "sun"}', SetKind.CONTRADICTION)[0] == {}


def test_a_tokenizer_of_words_gives_sets_or_none_but_never_fails():
    turn = make_turn("word piece", "The weather in Paris is 21.5 degrees")
    index = CopyIndex("Paris is 21.5 and 19 degrees in May", turn.tokenizer)
    sets = id_sets(turn, list(SetKind), reused=[Span(0, len(turn.text))], results=[index], tool_names=["a", "b"])
    assert sets.sizes.sum() == len(sets.ids)


def test_only_allowed_tokens_get_sets_and_large_sets_are_dropped(monkeypatch):
    turn = make_turn("byte level", "Flight: ABX12.")
    spans, index = [Span(8, 13)], CopyIndex("ABX12 ABY ABZ", turn.tokenizer)
    everywhere = id_sets(turn, [SetKind.COPY], reused=spans, results=[index])
    assert len(everywhere.position) > 0
    nowhere = id_sets(turn, [SetKind.COPY], reused=spans, results=[index], allowed=np.zeros(len(turn.ids), bool))
    assert len(nowhere.position) == 0
    monkeypatch.setattr(module, "_MAX_SET", 2)
    assert max(id_sets(turn, [SetKind.COPY], reused=spans, results=[index]).sizes, default=0) <= 2


def test_a_long_copy_out_of_a_repetitive_result_is_read_once(monkeypatch):
    turn = make_turn("byte level", "ab" * 2000)
    index = CopyIndex("ab " * 2000 + "ab" * 2000, turn.tokenizer)
    compared = 0

    class Counting(str):
        __slots__ = ()

        def startswith(self, part, *where):
            nonlocal compared
            compared += len(part)
            return super().startswith(part, *where)

    index.text = Counting(index.text)
    sets = id_sets(turn, [SetKind.COPY], reused=[Span(0, 4000)], results=[index])
    assert len(sets.position) > 10
    assert compared < 5 * len(turn.text)
