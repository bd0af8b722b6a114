"""Marks against text: any calls in any envelope, under every kind of tokenizer, cut off at any token, rewritten."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from raykd.data.curriculum import LatentIds, curriculum_rng, rewrite
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import Wanted, build_examples, decode_spans, example_from_row
from raykd.data.extractors import argument_spans, extract_tool_calls
from raykd.data.integration import ResultIndex, find_integration_spans
from raykd.data.process_targets import mark_turn
from raykd.sample_config import LatentStage
from raykd.types import ARGUMENT_MARKS, Mark, Span
from tests.data.test_examples import table, tokenizer_of
from tests.data.test_extractors import ENVELOPES, NAMED_ENVELOPES, PLAIN_NAMES, call_json

KINDS = ["byte level", "byte fallback", "sentencepiece", "unigram", "word piece"]
LOSSLESS = KINDS[:3]  # every text has tokens, and they spell it
ALL_ENVELOPES = ENVELOPES | NAMED_ENVELOPES

CORNERS = ["a", "b", " ", "1", "2.5", "\n", "\t", "{", "}", "[", "]", '"', ":", ",", "\\", "<tool_call>", "</tool_call>"]
CORNERS += [
    "é",
    "e\u0301",
    "ß",
    "İ",
    "東京",
    "🙂",
    "👩\u200d👧",
    "🇩🇪",
    "שלום",
    "مرحبا",
    "\u00a0",
    "\ufffd",
    "\x00",
    "\u2028",
]
CORNER_TEXT = st.lists(st.sampled_from(CORNERS), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | CORNER_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CORNER_TEXT, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(PLAIN_NAMES, st.dictionaries(CORNER_TEXT, VALUES, max_size=3)), min_size=1, max_size=3)


@cache
def made_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Those of test_examples.py, and the unigram model as SentencePiece has it: a space in front, bytes for the unknown."""
    if kind != "sentencepiece":
        return tokenizer_of(kind)
    state = json.loads(tokenizer_of("unigram").backend_tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    state["pre_tokenizer"]["prepend_scheme"] = "first"
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")


def ids_of(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def spans_of(text: str) -> dict[Mark, list[Span]]:
    """Where the parts of the calls stand, straight from the extractor."""
    calls = extract_tool_calls(text)
    parts = [argument_spans(text, call) for call in calls]
    return {
        Mark.TOOL_NAME: [call.name_span for call in calls],
        Mark.ARGUMENT_STRUCTURE: [span for part in parts for span in part.structure],
        Mark.ARGUMENT_KEY: [span for part in parts for span in part.key],
        Mark.ARGUMENT_VALUE: [span for part in parts for span in part.value],
    }


def touching(offsets: np.ndarray, span: Span) -> list[int]:
    """Tokens with a character of the span, one by one."""
    return [i for i, (start, end) in enumerate(offsets.tolist()) if start < end and start < span.end and end > span.start]


def check_tokens_of_span(tokenizer: Any, ids: np.ndarray, text: str, offsets: np.ndarray, span: Span) -> None:
    """The tokens of a span spell it; what they spell besides belongs to the first and the last of them."""
    tokens = touching(offsets, span)
    assert tokens, "a span without tokens"
    written, first, last = text[slice(*span)], offsets[tokens[0]], offsets[tokens[-1]]
    assert first[0] <= span.start < first[1]
    assert last[0] < span.end <= last[1]
    spelled = decode_tokens(tokenizer, ids[tokens[0] : tokens[-1] + 1]).text
    if tokenizer is made_tokenizer("word piece"):  # what it decodes depends on what stands before: a space or not
        assert text[first[0] : last[1]].strip() in (spelled.strip(), spelled.removeprefix("##").strip())
        return
    alone = [decode_tokens(tokenizer, ids[token : token + 1]).text for token in (tokens[0], tokens[-1])]
    place = spelled.find(written)
    assert 0 <= place < len(alone[0])
    assert 0 <= len(spelled) - place - len(written) < len(alone[1])


def check_marks(tokenizer: Any, ids: np.ndarray, result: str = "") -> str:
    """Every mark of a turn against the text that its ids spell; returns that text."""
    text, offsets = decode_tokens(tokenizer, ids)
    marks = mark_turn(text, offsets, [ResultIndex([result])]).marks
    spans = spans_of(text)
    for mark, found in spans.items():
        expected = np.zeros(len(ids), dtype=bool)
        for span in found:
            expected[touching(offsets, span)] = True
            if span.start < span.end:
                check_tokens_of_span(tokenizer, ids, text, offsets, span)
        if mark == Mark.ARGUMENT_STRUCTURE:  # white space between the parts counts as structure, see below
            expected |= (marks & ARGUMENT_MARKS) == Mark.ARGUMENT_STRUCTURE
        assert (((marks & mark) != 0) == expected).all(), mark
    calls = extract_tool_calls(text)
    in_arguments, in_call, reused = (np.zeros(len(ids), dtype=bool) for _ in range(3))
    for call in calls:
        in_arguments[touching(offsets, call.arguments_span)] = True
        in_call[touching(offsets, call.call_span)] = True
    assert (((marks & ARGUMENT_MARKS) != 0) == in_arguments).all()
    for span in find_integration_spans(text, [result]):
        reused[touching(offsets, span)] = True
        check_tokens_of_span(tokenizer, ids, text, offsets, span)
    reused &= ~in_call | ((marks & Mark.ARGUMENT_VALUE) != 0)
    assert (((marks & Mark.INTEGRATION) != 0) == reused).all()
    return text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, envelope=st.sampled_from(sorted(ALL_ENVELOPES)), cut=st.integers(0, 10**6), whole=st.booleans())
def test_tokens_under_a_mark_spell_its_spans_and_at_most_their_own_other_characters(kind, calls, envelope, cut, whole):
    tokenizer = made_tokenizer(kind)
    text = "So 🙂 21.5\n" + "\n".join(ALL_ENVELOPES[envelope](name, arguments) for name, arguments in calls)
    ids = ids_of(tokenizer, text)
    decoded = check_marks(tokenizer, ids if whole else ids[: cut % (len(ids) + 1)], json.dumps({"t": 21.5, "c": calls}))
    if whole and kind in LOSSLESS and "▁" not in text:
        assert decoded.lstrip() == text
        assert [(call.name, call.arguments) for call in extract_tool_calls(decoded)] == calls


WRITTEN = f"""Ja: 21,5 °C 🙂.
<tool_call>
{call_json("get_weather", {"city": "Köln ü", "days": [3, {"a b": -1.5e3, "ok": True}]})}
</tool_call>
[TOOL_CALLS]set_alarm[ARGS]{{"at": "6:30", "who": {{"东": null}}}}
{json.dumps({"tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"x": 'say "é🙂"'})}}]})}"""


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_the_tokens_end_the_marks_are_those_of_what_they_spell(kind):
    tokenizer = made_tokenizer(kind)
    ids = ids_of(tokenizer, WRITTEN)
    for length in range(len(ids) + 1):
        check_marks(tokenizer, ids[:length], '{"temperature": 21.5, "at": "6:30"}')


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_call_that_is_cut_off_is_marked_like_the_whole_one_as_far_as_it_goes(kind):
    tokenizer = made_tokenizer(kind)
    ids = ids_of(tokenizer, WRITTEN[: WRITTEN.index("\n[TOOL_CALLS]")])
    process = int(ARGUMENT_MARKS | Mark.TOOL_NAME)

    def marks(length: int) -> np.ndarray:
        return mark_turn(*decode_tokens(tokenizer, ids[:length]), []).marks & process

    whole = marks(len(ids))
    assert set(whole.tolist()) >= {int(Mark.TOOL_NAME), int(Mark.ARGUMENT_KEY), int(Mark.ARGUMENT_VALUE)}
    for length in range(len(ids)):  # the last token may be half a character or half an escape
        assert marks(length)[:-1].tolist() == whole[: max(0, length - 1)].tolist()


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, escaped=st.booleans())
def test_every_character_of_the_arguments_is_of_one_class(kind, calls, escaped):
    envelope = ALL_ENVELOPES["openai call" if escaped else "hermes"]
    text = "\n".join(envelope(name, arguments) for name, arguments in calls)
    for call in extract_tool_calls(text):
        parts = argument_spans(text, call)
        spans = sorted([*parts.structure, *parts.key, *parts.value])
        assert all(one.end <= other.start for one, other in itertools.pairwise(spans))
        between = [text[one.end : other.start] for one, other in itertools.pairwise(spans)]
        assert (spans[0].start, spans[-1].end) == call.arguments_span
        assert "".join(between).strip() == ""


@cache
def with_sentinels(kind: str) -> tuple[PreTrainedTokenizerFast, LatentIds]:
    tokenizer = copy.deepcopy(made_tokenizer(kind))
    tokenizer.add_tokens(["<bot>", "<slot>", "<eot>"])
    return tokenizer, LatentIds(*(tokenizer.get_vocab()[token] for token in ("<bot>", "<slot>", "<eot>")))


LINES = st.lists(st.sampled_from([*CORNERS, "21.5", "Paris is big. ", "It cost 7 euros. "]), max_size=5).map(
    lambda parts: "".join(parts).replace("\n", " ")
)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(LINES, min_size=2, max_size=4), calls=CALLS, stage=st.tuples(st.integers(1, 2), st.integers(1, 3)))
@example(steps=["Paris is 21.5 degrees.", "so"], calls=[("f", {"t": [21.5, "é🙂"]})], stage=(2, 2))
def test_after_the_latent_rewrite_every_mark_still_spells_what_it_did(kind, steps, calls, stage):
    tokenizer, ids = with_sentinels(kind)
    text = "It is 21.5.\n" + "".join(f"Step {number}: {step}\n" for number, step in enumerate(steps, start=1)) + "\n"
    text += "\n".join(ENVELOPES["hermes"](name, arguments) for name, arguments in calls) + "\nParis costs 21.5 euros."
    rows = table([(ids_of(tokenizer, text), [{"role": "tool", "content": '{"t": 21.5, "c": "Paris"}'}], None)])
    before = example_from_row(build_examples(rows, tokenizer, Wanted(frozenset({"claim_extraction"}))).examples, 0)
    wanted = LatentStage(steps=stage[0], slots=stage[1], probability=1.0)
    after = rewrite(before, wanted, ids, curriculum_rng(0, 1, 0), tokenizer)
    if steps[0].startswith("Paris is 21.5"):
        assert after is not before, "the steps of the named example end with their tokens"
    if after is before:
        return
    start = int(np.flatnonzero(after.input_ids == ids.begin)[0])
    inserted = 2 + stage[0] * stage[1]
    stop = start + len(before.input_ids) - (len(after.input_ids) - inserted)
    old, new = decode_spans(before, tokenizer), decode_spans(after, tokenizer)
    for mark in (Mark.TOOL_NAME, Mark.ARGUMENT_STRUCTURE, Mark.ARGUMENT_KEY, Mark.ARGUMENT_VALUE):
        assert new[mark] == old[mark]  # steps with calls in them stay
    for mark in (Mark.INTEGRATION, Mark.CLAIM):
        kept = before.marks & mark
        kept[start:stop] = 0
        outside = np.delete(kept, np.s_[start:stop])
        inside = np.delete(after.marks & mark, np.s_[start : start + inserted])
        assert (after.marks[start : start + inserted] & mark == 0).all()
        assert inside.tolist() == outside.tolist()
        assert "".join(new[mark]) == "".join(
            decode_tokens(tokenizer, before.input_ids[i : i + n]).text for i, n in runs(kept != 0)
        )
    assert "".join(new[Mark.LATENT]) == "<slot>" * (inserted - 2)
    whole = decode_tokens(tokenizer, before.input_ids[2:])
    removed = whole.offsets[start - 2][0], whole.offsets[stop - 3][1]
    assert "".join(new[Mark.RESPONSE]) == whole.text[: removed[0]] + "<bot><eot>" + whole.text[removed[1] :]


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
