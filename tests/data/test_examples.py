"""Marks stand where the text stands: over tokenizers, envelopes, Unicode, cut-off calls, and real conversations."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raykd.data.chat import tokenize_row
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import Wanted, build_examples, decode_spans, example_from_row, examples_to_table
from raykd.data.extractors import argument_spans, extract_tool_calls, find_integration_spans
from raykd.sample_config import CodeModeConfig
from raykd.types import EXAMPLE_SCHEMA, Mark, Source
from tests.conftest import SHARED_DATA

CORPUS = ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'] * 4
CORPUS += ["The weather in Paris is 21.5 degrees, flight HAT069 leaves May 20.", "Grüße aus Köln und 東京 🙂🎉"] * 4


@cache
def tokenizer_of(kind):
    """A byte-level BPE, a byte-fallback BPE (as Llama), a Unigram and a WordPiece tokenizer, trained here."""
    specials = ["<unk>", "<|im_end|>", "<tool_call>"]
    if kind == "byte level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte fallback":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        specials = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, limit_alphabet=60, show_progress=False)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "byte fallback":  # the byte tokens are pieces of the model, not special tokens of the text
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")


def table(rows, k=0):
    """Teacher output for rows of (output_ids, messages, mask or None)."""
    columns = {
        "uid": pa.array([i for i, _ in enumerate(rows)], pa.int64()),
        "held_out": pa.array([False] * len(rows)),
        "messages_json": pa.array([json.dumps(messages) for _, messages, _ in rows]),
        "tools_json": pa.array(["[]"] * len(rows)),
        "prompt_ids": pa.array([[1, 1]] * len(rows), pa.list_(pa.int32())),
        "output_ids": pa.array([list(ids) for ids, _, _ in rows], pa.list_(pa.int32())),
        "response_mask": pa.array([mask for _, _, mask in rows], pa.list_(pa.bool_())),
        "topk_ids": pa.array([list(range(len(ids) * k)) for ids, _, _ in rows], pa.list_(pa.int32())),
        "topk_logprobs": pa.array([np.full(len(ids) * k, -1, np.float16) for ids, _, _ in rows], pa.list_(pa.float16())),
        "log_tail": pa.array([np.arange(len(ids) if k else 0) for ids, _, _ in rows], pa.list_(pa.float32())),
        "top_k": pa.array([k] * len(rows), pa.int32()),
        "finish_reason": pa.array(["stop"] * len(rows)),
        "teacher_id": pa.array(["t"] * len(rows)),
    }
    return pa.table(columns)


FAST = ["byte level", "byte fallback", "unigram"]


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=30))
def test_tokens_spell_the_text_that_they_came_from(kind, text):
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    decoded = decode_tokens(tokenizer, np.array(encoded["input_ids"], dtype=np.int32))
    if tokenizer.unk_token_id not in encoded["input_ids"] and "▁" not in text:
        assert decoded.text == text
        assert decoded.offsets.shape == (len(encoded["input_ids"]), 2)
        if kind == "byte level":  # a token that is part of a code point covers all of it, as the tokenizer has it
            assert decoded.offsets.tolist() == [list(pair) for pair in encoded["offset_mapping"]]


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_any_bytes_have_a_text_and_offsets_in_order(ids):
    tokenizer = tokenizer_of("byte level")
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = np.array(tokenizer.convert_tokens_to_ids([vocabulary[i] for i in ids]), dtype=np.int32)
    text, offsets = decode_tokens(tokenizer, tokens)
    text.encode()  # no surrogates
    assert (offsets[:, 0] < offsets[:, 1]).all()
    assert (np.diff(offsets, axis=0) >= 0).all()
    assert len(text) == (offsets[-1, 1] if ids else 0)


def test_a_decoder_of_another_kind_is_read_prefix_by_prefix():
    tokenizer = tokenizer_of("word piece")
    ids = tokenizer("The weather in Paris", add_special_tokens=False)["input_ids"]
    text, offsets = decode_tokens(tokenizer, np.array(ids))
    assert text == "The weather in Paris"
    assert "".join(text[start:end] for start, end in offsets) == text


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="token id 99999 found"):
        decode_tokens(tokenizer_of("byte level"), np.array([1, 99999]))


STRINGS = st.text(st.sampled_from('aé東🙂 "\\{}:,1') | st.characters(codec="utf-8", exclude_characters="▁"), max_size=8)
CALLS = st.lists(st.tuples(STRINGS.filter(bool), st.dictionaries(STRINGS, STRINGS | st.integers(), max_size=3)), max_size=3)


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=25, deadline=None)
@given(calls=CALLS, ascii_only=st.booleans(), cut=st.integers(0, 12), data=st.data())
def test_marked_tokens_cover_the_spans_of_their_text_and_no_other_token(kind, calls, ascii_only, cut, data):
    text = "So 🙂 21.5\n"
    for name, arguments in calls:
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
        text += f"<tool_call>\n{body}\n</tool_call>\n"
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = np.array(ids[: len(ids) - cut], dtype=np.int32)
    result = json.dumps({"t": 21.5, "s": [value for _, arguments in calls for value in arguments.values()]})
    examples, rejected = build_examples(table([(ids, [{"role": "tool", "content": result}], None)]), tokenizer)
    if not len(ids):
        assert rejected.num_rows == 1
        return
    assert examples.schema == EXAMPLE_SCHEMA
    example = example_from_row(examples, 0)
    assert example.source is Source.TEACHER
    text, offsets = decode_tokens(tokenizer, ids)  # unknown characters read as <unk>
    found = extract_tool_calls(text)
    assert example.num_calls == len(found)
    parts = [argument_spans(text, call) for call in found]
    expected = {
        Mark.RESPONSE: [(0, len(text))],
        Mark.TOOL_NAME: [call.name_span for call in found],
        Mark.ARGUMENT_KEY: [span for part in parts for span in part.key],
        Mark.ARGUMENT_VALUE: [span for part in parts for span in part.value],
    }
    marks = example.marks[2:]
    assert (example.marks[:2] == 0).all()
    for mark, spans in expected.items():
        touched = [any(s < end and e > start for start, end in spans) for s, e in offsets]
        assert ((marks & mark) != 0).tolist() == touched
        for start, end in spans:
            covering = offsets[((marks & mark) != 0) & (offsets[:, 0] < end) & (offsets[:, 1] > start)]
            assert start == end or (covering[0, 0] <= start and covering[-1, 1] >= end)
    inside = [any(s < c.arguments_span.end and e > c.arguments_span.start for c in found) for s, e in offsets]
    any_argument = Mark.ARGUMENT_KEY | Mark.ARGUMENT_VALUE | Mark.ARGUMENT_STRUCTURE
    assert ((marks & any_argument) != 0).tolist() == inside
    reused = find_integration_spans(text, [result])
    allowed = [any(s < end and e > start for start, end in reused) for s, e in offsets]
    assert not (((marks & Mark.INTEGRATION) != 0) & ~np.array(allowed)).any()


def test_only_response_tokens_keep_their_teacher_scores():
    tokenizer = tokenizer_of("byte level")
    ids = np.arange(5, 11, dtype=np.int32)
    mask = [True, True, False, False, True, False]
    example = example_from_row(build_examples(table([(ids, [], mask)], k=3), tokenizer).examples, 0)
    assert example.source is Source.GOLD
    assert example.topk_ids.tolist() == [[0, 1, 2], [3, 4, 5], [12, 13, 14]]
    assert example.log_tail.tolist() == [0.0, 1.0, 4.0]
    assert ((example.marks & Mark.RESPONSE) != 0).tolist() == [False, False, *mask]
    assert example.input_ids.tolist() == [1, 1, *ids]


def test_rows_without_usable_output_come_back_with_the_reason():
    rows = table([([5], [], None)] * 6, k=2).to_pylist()
    rows[1]["finish_reason"] = "error: engine died"
    rows[2]["output_ids"] = []
    rows[3]["prompt_ids"] = []
    rows[4]["topk_ids"] = [1]
    rows[5]["response_mask"] = [True, False]
    examples, rejected = build_examples(
        pa.Table.from_pylist(rows, schema=table([([5], [], None)]).schema), tokenizer_of("byte level")
    )
    assert examples["uid"].to_pylist() == [0]
    assert rejected["uid"].to_pylist() == [1, 2, 3, 4, 5]
    for reason, part in zip(
        rejected["reason"].to_pylist(), ["engine died", "empty", "no tokens", "1 top-k entries", "2 entries"], strict=True
    ):
        assert part in reason


def test_each_turn_reuses_only_the_results_that_came_before_it():
    tokenizer = tokenizer_of("byte level")
    first, between, last = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("It may be 77.", "tool: 77\n", "It is 77.")
    )
    messages = [{"role": "assistant", "content": "It may be 77."}, {"role": "tool", "content": "77"}]
    messages += [{"role": "assistant", "content": "It is 77."}]
    mask = [True] * len(first) + [False] * len(between) + [True] * len(last)
    example = example_from_row(build_examples(table([(first + between + last, messages, mask)]), tokenizer).examples, 0)
    assert decode_spans(example, tokenizer)[Mark.RESPONSE] == ["It may be 77.", "It is 77."]
    reused = np.flatnonzero(example.marks & Mark.INTEGRATION)
    assert len(reused) > 0
    assert (reused >= 2 + len(first) + len(between)).all()


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def conversation_with_calls(num_turns, result, tokenizer, code_mode):
    """The example of a recorded conversation: that many turns of one direct call, each with its result behind it, an end."""
    texts = [part for _ in range(num_turns) for part in (CALL, f"tool: {result}\n")] + ["Done."]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    mask = [turn % 2 == 0 for turn, part in enumerate(ids) for _ in part]
    messages = [{"role": "assistant", "content": CALL}, {"role": "tool", "content": result}] * num_turns
    rows = table([(np.concatenate(ids), [*messages, {"role": "assistant", "content": "Done."}], mask)])
    wanted = Wanted(losses=frozenset({"code_mode_preference"}), code_mode=code_mode)
    return example_from_row(build_examples(rows, tokenizer, wanted).examples, 0)


@pytest.mark.parametrize(
    ("rule", "num_turns", "result", "pays"),
    [
        ("min_tools", 3, "1", True),
        ("min_tools", 1, "1", False),
        ("min_intermediate_chars", 1, "x" * 30, True),
        ("min_intermediate_chars", 3, "x" * 29, False),
        ("pii_patterns", 1, "a@example.com", True),
    ],
)
def test_code_mode_pays_for_all_turns_of_a_sample_or_for_none(rule, num_turns, result, pays):
    rules = {"min_tools": 99, "min_intermediate_chars": 99, "pii_patterns": ()}
    rules[rule] = {"min_tools": 2, "min_intermediate_chars": 30, "pii_patterns": ("@example",)}[rule]
    tokenizer = tokenizer_of("byte level")
    example = conversation_with_calls(num_turns, result, tokenizer, CodeModeConfig(**rules))
    assert len(decode_spans(example, tokenizer)[Mark.DIRECT_TOOL]) == num_turns * pays


def test_more_values_than_the_offsets_of_a_table_can_count_are_refused():
    ids = tokenizer_of("byte level")("one", add_special_tokens=False)["input_ids"]
    example = example_from_row(build_examples(table([(ids, [], None)]), tokenizer_of("byte level")).examples, 0)
    states = np.broadcast_to(np.float16(0), (1, 1, 2**30))  # of no memory
    large = replace(example, teacher_hidden=states)
    with pytest.raises(AssertionError, match=f"{2**31} values of a column do not fit one table"):
        examples_to_table([large, large])


def test_a_tool_name_is_no_integration_but_an_argument_may_be():
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer('<tool_call>\n{"name": "Paris", "arguments": {"Paris": "Paris"}}', add_special_tokens=False)["input_ids"]
    rows = table([(ids, [{"role": "tool", "content": '{"city": "Paris"}'}], None)])
    example = example_from_row(build_examples(rows, tokenizer).examples, 0)
    (only,) = decode_spans(example, tokenizer)[Mark.INTEGRATION]
    assert "Paris" in only
    assert np.flatnonzero(example.marks & Mark.INTEGRATION).min() > np.flatnonzero(example.marks & Mark.ARGUMENT_KEY).max()


FIXTURE = [
    {
        "messages": [
            {"role": "user", "content": "Wetter in Köln?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}]},
            {"role": "tool", "content": '{"temperature": 21.5}'},
            {"role": "assistant", "content": "Es sind 21,5 Grad."},
        ]
    }
]


def recorded_rows(name):
    """Rows of a shared data file; of the fixture where the folder is not there."""
    path = SHARED_DATA / name
    if not SHARED_DATA.exists():
        return FIXTURE
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["tau_airline_trajectories.jsonl", "bfcl_tool_calls.jsonl"])
def test_every_call_of_real_conversations_is_found_and_decodes_to_itself(name, demo_tokenizer):
    rows = recorded_rows(name)[:100]
    num_calls = num_found = 0
    for index, row in enumerate(rows):
        prompt = tokenize_row(
            demo_tokenizer, row, uid=index, key=str(index), completions="recorded", max_tokens=100_000
        ).prompt
        assert prompt.recorded_ids is not None
        assert prompt.response_mask is not None
        rendered = table([(prompt.recorded_ids, json.loads(prompt.messages_json), prompt.response_mask.tolist())])
        example = example_from_row(build_examples(rendered, demo_tokenizer).examples, 0)
        messages = json.loads(prompt.messages_json)
        recorded = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        spans = decode_spans(example, demo_tokenizer)
        found = [call for text in spans[Mark.RESPONSE] for call in extract_tool_calls(text)]
        assert [(call.name, call.arguments) for call in found] == [(c["name"], c["arguments"]) for c in recorded]
        assert example.num_calls == len(recorded)
        assert example.num_truncated_calls == 0
        num_calls += len(recorded)
        num_found += sum(wanted["name"] in text for wanted, text in zip(recorded, spans[Mark.TOOL_NAME], strict=True))
        values = "\n".join(spans[Mark.ARGUMENT_VALUE])
        for call in recorded:
            for value in call["arguments"].values():
                if isinstance(value, str):
                    assert json.dumps(value, ensure_ascii=False)[1:-1] in values
    assert num_calls > 0
    assert num_found == num_calls


def test_an_id_between_the_tokens_is_padding_like_those_behind_them():
    words = {f"w{i}": i + (i > 5) for i in range(12)}  # 6 is no token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="w1"
    )
    rows = table([([5, 7], [], None), ([6], [], None)], k=2)
    ids = pa.array([[3, 6, 4, 12], [8, 9]], pa.list_(pa.int32()))
    rows = rows.set_column(rows.column_names.index("topk_ids"), "topk_ids", ids)
    examples, rejected = build_examples(rows, tokenizer)
    assert example_from_row(examples, 0).topk_logprobs.tolist() == [[-1, -np.inf], [-1, -1]]
    assert rejected["reason"].to_pylist() == [
        "the teacher's output holds id 6, which is padding of its head: the tokenizer has 13 ids"
    ]


def test_the_teachers_mass_on_padding_of_its_head_goes_to_the_tail():
    """A head may have more rows than there are tokens, and the student's fewer than the teacher's."""
    tokenizer = tokenizer_of("byte level")
    size = len(tokenizer)
    rows = table([([5, 6], [], None), ([7], [], None), ([size], [], None)], k=2)
    ids = pa.array([[3, size + 9, 4, 5], [8, 9], [1, 2]], pa.list_(pa.int32()))
    rows = rows.set_column(rows.column_names.index("topk_ids"), "topk_ids", ids)
    examples, rejected = build_examples(rows, tokenizer)
    first, second = (example_from_row(examples, index) for index in range(2))
    assert first.topk_ids.max() < size
    assert first.topk_logprobs.tolist() == [[-1, -np.inf], [-1, -1]]
    assert first.log_tail.tolist() == pytest.approx([np.log(np.exp(0) + np.exp(-1)), 1])
    assert first.topk_ids.tolist()[1] == [4, 5]
    assert (second.topk_ids.tolist(), second.log_tail.tolist()) == ([[8, 9]], [0])
    assert rejected.to_pylist() == [
        {
            "uid": 2,
            "reason": f"the teacher's output holds id {size}, which is padding of its head: the tokenizer has {size} ids",
        }
    ]
