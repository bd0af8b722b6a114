"""Offline data: the stream's examples from files, every bad row named, mixtures that a restart goes on with."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_helpers import write_lines
from torch.utils.data import DataLoader

from raykd.data.chat import Completions, tokenize_row
from raykd.data.collate import collate_kd_batch
from raykd.data.dataset import KDDataset, epoch_order
from raykd.data.examples import Wanted, build_examples, decode_spans, example_from_row, examples_to_table
from raykd.data.import_logits import import_packed_logits
from raykd.data.offline_fields import warn_once
from raykd.data.offline_rows import RowReader
from raykd.data.offline_scores import scores_of_logits
from raykd.data.offline_write import JsonlWriter, add_process_targets, offline_rows
from raykd.data.readers import DataError
from raykd.types import Example, Mark, Source

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
PROMPT = "<|im_start|>user\nWetter?<|im_end|>\n<|im_start|>assistant\n"
ROW = {"prompt": PROMPT, "teacher_text": CALL}
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CHAT = [
    {"role": "user", "content": "Wetter in Köln?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Köln"}}}]},
    {"role": "tool", "content": '{"temperature": 21.5}'},
    {"role": "assistant", "content": "Es sind 21,5 Grad."},
]


def read(tmp_path, rows, tokenizer, **options):
    return KDDataset([write_lines(tmp_path / "a.jsonl", rows)], tokenizer, **options)


def only(tmp_path, row, tokenizer, **options):
    (example,) = read(tmp_path, [row], tokenizer, strict=True, **options)
    return example


def same(one: Example, other: Example):
    assert repr(one) == repr(other)
    for name in ("input_ids", "marks", "topk_ids", "topk_logprobs", "log_tail"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def teacher_rows(tokenizer, k=3):
    """Rows as the stream makes them before they become examples: two that the teacher wrote, one recorded conversation."""
    rng = np.random.default_rng(0)
    rows = []
    kinds: list[tuple[list, Completions]] = [(CHAT[:1], "teacher"), (CHAT[:3], "teacher"), (CHAT, "recorded")]
    for uid, (messages, completions) in enumerate(kinds):
        row = {"messages": messages, "tools": TOOLS}
        prompt = tokenize_row(tokenizer, row, uid=uid, key=str(uid), completions=completions, max_tokens=999).prompt
        written = tokenizer([CALL, "Es sind 21,5 Grad."][uid % 2] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        output = written if prompt.recorded_ids is None else prompt.recorded_ids
        logprobs = np.log(rng.dirichlet(np.ones(k + 1), len(output)))
        logprobs[0, 1] = -np.inf
        rows.append(
            {
                "uid": uid + 70,
                "key": f"k{uid}",
                "messages_json": prompt.messages_json,
                "tools_json": prompt.tools_json,
                "prompt_ids": prompt.prompt_ids,
                "output_ids": output,
                "response_mask": prompt.response_mask,
                "topk_ids": rng.integers(0, 999, len(output) * k).astype(np.int32),
                "topk_logprobs": logprobs[:, :k].astype(np.float16).ravel(),
                "log_tail": logprobs[:, k].astype(np.float32),
                "top_k": k,
                "finish_reason": "stop",
                "teacher_id": "t",
            }
        )
    half = pa.list_(pa.float16())
    table = pa.Table.from_pylist(rows)
    for name, kind in (
        ("topk_logprobs", half),
        ("log_tail", pa.list_(pa.float32())),
        ("response_mask", pa.list_(pa.bool_())),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([row[name] for row in rows], kind))
    return table


@pytest.mark.parametrize("form", ["jsonl", "teacher output", "examples"])
def test_files_of_every_form_give_the_streams_examples(form, tmp_path, demo_tokenizer):
    rows = teacher_rows(demo_tokenizer)
    built = build_examples(rows, demo_tokenizer).examples
    path = tmp_path / ("a.jsonl" if form == "jsonl" else "a.parquet")
    if form == "jsonl":
        with JsonlWriter(path, {}) as writer:
            for row in offline_rows(rows, demo_tokenizer):
                writer.write(row)
    else:
        pq.write_table(rows if form == "teacher output" else built, path, row_group_size=2)
    examples = list(KDDataset([path], demo_tokenizer, shuffle=False, strict=True))
    assert len(examples) == 3
    for index, example in enumerate(examples):
        same(example, example_from_row(built, index))
    assert examples[1].source is Source.TEACHER
    assert examples[2].source is Source.GOLD
    assert decode_spans(examples[1], demo_tokenizer)[Mark.INTEGRATION] == ["21,5"]


def test_a_text_row_is_one_string_with_its_end_and_supervises_the_response_alone(tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    whole = demo_tokenizer(PROMPT + CALL + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == whole
    spans = decode_spans(example, demo_tokenizer)
    assert spans[Mark.RESPONSE] == [CALL + "<|im_end|>"]
    assert spans[Mark.TOOL_NAME] == ["get_weather"]
    assert spans[Mark.ARGUMENT_VALUE] == ["Köln", "2"]
    cut = only(tmp_path, ROW | {"finish_reason": "length"}, demo_tokenizer)
    assert decode_spans(cut, demo_tokenizer)[Mark.RESPONSE] == [CALL]
    twice = only(tmp_path, ROW | {"teacher_text": CALL + "<|im_end|>"}, demo_tokenizer)
    assert twice.input_ids.tolist() == whole


def test_messages_render_as_the_stream_renders_them(tmp_path, demo_tokenizer):
    row = {"messages": CHAT[:3], "tools": TOOLS, "teacher_text": "Es sind 21,5 Grad."}
    table = teacher_rows(demo_tokenizer).slice(1, 1)
    example, streamed = (
        only(tmp_path, row, demo_tokenizer),
        example_from_row(build_examples(table, demo_tokenizer).examples, 0),
    )
    assert example.input_ids.tolist() == streamed.input_ids.tolist()
    assert example.marks.tolist() == streamed.marks.tolist()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "JSON text in Parquet"])
def test_a_recorded_conversation_is_read_as_the_stream_reads_recorded_prompts(form, tmp_path, demo_tokenizer):
    refined = [*CHAT[:3], {**CHAT[3], "loop": 0, "judge_score": 0.4}, {"role": "user", "content": "Genauer?"}]
    refined += [{"role": "assistant", "content": "21,5 Grad, heiter.", "loop": 1, "judge_score": 0.9}]
    conversations = [CHAT, refined]
    if form == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", [{"messages": messages, "tools": TOOLS} for messages in conversations])
    else:
        as_text = json.dumps if form.startswith("JSON") else lambda value: value
        rows = [{"messages": as_text(messages), "tools": as_text(TOOLS), "teacher_text": None} for messages in conversations]
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    examples = list(KDDataset([path], demo_tokenizer, shuffle=False, strict=True))
    for example, messages in zip(examples, conversations, strict=True):
        row = {"messages": messages, "tools": TOOLS}
        prompt = tokenize_row(demo_tokenizer, row, uid=0, key="", completions="recorded", max_tokens=999).prompt
        columns = {name: [getattr(prompt, name)] for name in ("uid", "messages_json", "tools_json", "prompt_ids")}
        columns |= {"output_ids": [prompt.recorded_ids], "response_mask": [prompt.response_mask]}
        built = build_examples(pa.table(columns), demo_tokenizer).examples
        same(example, replace(example_from_row(built, 0), uid=example.uid))
        assert example.source is Source.GOLD
    plain, refinement = (decode_spans(example, demo_tokenizer) for example in examples)
    assert [text.removesuffix("<|im_end|>") for text in plain[Mark.RESPONSE]][1:] == ["Es sind 21,5 Grad."]
    assert plain[Mark.TOOL_NAME] == ["get_weather"]
    assert plain[Mark.INTEGRATION] == ["21,5"]
    assert not any("Wetter in" in text or "temperature" in text for text in plain[Mark.RESPONSE])
    assert refinement[Mark.DECISION] == ["<|im_end|>"] * 2
    assert examples[1].halt_targets.tolist() == [0, 1]
    assert examples[1].quality == pytest.approx(0.9)


def test_each_field_lands_where_it_is_documented_to(tmp_path, demo_tokenizer):
    plain = only(tmp_path, ROW, demo_tokenizer)
    num_prompt = int(np.argmax(plain.marks > 0))
    length = len(plain.input_ids)
    row = ROW | {
        "teacher_quality_score": "0.75",
        "tool_name_source": "heuristic",
        "teacher_hidden_states": np.arange(2 * length * 3).reshape(2, length, 3).tolist(),
        "response_source": "student",
        "teacher_id": "t9",
        "uid": 77,
        "metadata": {
            "span_targets": {"ts_mode_spans": [[1, 3]], "direct_tool_spans": [[4, 5]]},
            "loop_index": 0,
            "max_loops": 3,
            "judge_score": 0.2,
            "tool_result_fields": {"place": "Köln"},
        },
    }
    example = only(tmp_path, row, demo_tokenizer)
    assert (example.quality, example.tool_name_weight, example.uid, example.teacher_id) == (0.75, 0.5, 77, "t9")
    assert example.source is Source.STUDENT
    assert example.teacher_hidden.shape == (2, length, 3)
    assert np.flatnonzero(example.marks & Mark.CODE_MODE).tolist() == [num_prompt + 1, num_prompt + 2]
    assert np.flatnonzero(example.marks & Mark.DIRECT_TOOL).tolist() == [num_prompt + 4]
    assert np.flatnonzero(example.marks & Mark.DECISION).tolist() == [length - 1]
    assert example.halt_targets.tolist() == [0.0]
    assert decode_spans(example, demo_tokenizer)[Mark.INTEGRATION] == ["Köln"]


def test_states_out_of_the_range_of_halves_are_at_its_end_and_missing_ones_stay_missing(tmp_path, demo_tokenizer):
    length = len(only(tmp_path, ROW, demo_tokenizer).input_ids)
    states = [*[[1e6, -1e6, 0.5]] * (length - 1), [None] * 3]
    example = only(tmp_path, ROW | {"teacher_hidden_states": [states]}, demo_tokenizer)
    assert example.teacher_hidden[0, 0].tolist() == [65504.0, -65504.0, 0.5]
    assert np.isnan(example.teacher_hidden[0, -1]).all()


@pytest.mark.parametrize("own", [None, 1, 2, 3])
@pytest.mark.parametrize("default", [0, 1, 3])
def test_a_row_that_is_a_loop_has_the_target_of_the_same_loop_given_as_messages(own, default, demo_tokenizer):
    tier = {} if own is None else {"caws_tier": own}
    ask = {"role": "user", "content": "A city?"}
    drafts = [{"role": "assistant", "content": f"Draft {loop}", "loop": loop, "judge_score": 0.2} for loop in range(2)]
    refinement = {"messages": [ask, drafts[0] | tier, ask, drafts[1]]}
    loops = [ROW | {"metadata": {"loop_index": loop, "judge_score": 0.2, "prev_score": 0.2} | tier} for loop in range(2)]
    build = partial(build_examples, wanted=Wanted(caws_tier=default))
    read = RowReader(demo_tokenizer, build=build, caws_tier=default).examples([refinement, *loops])
    whole, *parts = [example for (example,) in read if isinstance(example, Example)]
    assert [part.halt_targets.tolist() for part in parts] == [[target] for target in whole.halt_targets.tolist()]
    cap = own or default or 9
    assert whole.halt_targets.tolist() == [float(loop >= cap) for loop in (1, 2)]


@pytest.mark.parametrize("rows_of", ["response", "response without its end", "sequence", "sequence without its end"])
@pytest.mark.parametrize("flat", [False, True])
def test_stored_logits_become_the_top_k_of_the_token_that_they_predict(rows_of, flat, tmp_path, demo_tokenizer):
    plain = only(tmp_path, ROW, demo_tokenizer)
    num_prompt, length = int(np.argmax(plain.marks > 0)), len(plain.input_ids)
    vocab_size = len(demo_tokenizer)
    logits = np.full((length - 1, vocab_size), -20.0)
    logits[np.arange(length - 1), plain.input_ids[1:]] = 5.0  # row t predicts token t + 1
    first = num_prompt - 1 if rows_of.startswith("response") else 0
    stored = logits[first : length - 1 - rows_of.endswith("end")]
    example = only(
        tmp_path, ROW | {"teacher_logits": (stored.ravel() if flat else stored).tolist()}, demo_tokenizer, top_k=2
    )
    scored = slice(None, -1 if rows_of.endswith("end") else None)
    np.testing.assert_array_equal(example.topk_ids[scored, 0], plain.input_ids[num_prompt:][scored])
    assert example.topk_ids.shape == (length - num_prompt, 2)
    exact = 5 - math.log(math.exp(5) + (vocab_size - 1) * math.exp(-20))
    np.testing.assert_allclose(example.topk_logprobs[scored, 0], exact, atol=1e-3)
    np.testing.assert_allclose(example.log_tail[scored], math.log((vocab_size - 2) * math.exp(exact - 25)), atol=1e-3)
    batch = collate_kd_batch([example], 0)
    assert batch.has_teacher.tolist() == [True] * (length - num_prompt - 1) + [not rows_of.endswith("end")]


def test_mass_outside_the_vocabulary_is_in_the_tail():
    scores = scores_of_logits(np.log(np.array([[0.5, 0.1, 0.1, 0.3]])), top_k=1, vocab_size=3)
    assert scores.topk_ids.tolist() == [[0]]
    np.testing.assert_allclose(np.exp(scores.log_tail), [0.5], rtol=1e-6)
    everything = scores_of_logits(np.zeros((1, 3)), top_k=3, vocab_size=3)
    assert everything.log_tail.tolist() == [-np.inf]


TOPK = {"topk_ids": [[1]] * 30, "topk_logprobs": [[-0.5]] * 30}
FIRST = {"prompt": PROMPT, "teacher_text": "first"}
BAD_ROWS = [
    (b'{"prompt": "x", ', "malformed JSON"),
    (b'["prompt"]', "found a JSON list"),
    (b'{"prompt": "\xff"}', "invalid UTF-8"),
    ({"__header__": True}, "only as the first line"),
    ({"teacher_text": "x"}, "neither `prompt` nor `messages`"),
    ({"prompt": PROMPT}, "no `teacher_text`"),
    ({"prompt": PROMPT, "messages": CHAT}, "no `teacher_text`"),
    ({"messages": CHAT[:1]}, "no assistant turn"),
    (ROW | {"cot_steps": ["first", 2]}, "`cot_steps` is list \"['first', 2]\""),
    ({"messages": CHAT[:3]}, "the last assistant turn is messages[1] of 3; expected `teacher_text`, or messages that end"),
    ({"messages": CHAT, "rejected_text": "no"}, "`rejected_text` beside a recorded conversation"),
    ({"messages": CHAT, "response_mask": [1]}, "`response_mask` without `output_ids`"),
    ({"messages": [*CHAT[:3], {**CHAT[3], "loop": 1}]}, "messages[3].loop is 1, expected 0"),
    (
        {"messages": [*CHAT[:3], {**CHAT[3], "loop": 0}], "metadata": {"loop_index": 0}},
        "`loop_index` beside `loop` on messages",
    ),
    ({"prompt": 5, "teacher_text": "x"}, "`prompt` is int '5', expected a string"),
    ({"prompt": " ", "teacher_text": "x"}, "`prompt` is blank"),
    (ROW | {"teacher_text": " \n"}, "`teacher_text` is blank"),
    (ROW | {"teacher_text": "\ud800"}, "unpaired surrogate"),
    ({"messages": [{"role": "king"}], "teacher_text": "x"}, "role is 'king'"),
    (ROW | {"teacher_reasoning_content": "hm"}, "`teacher_reasoning_content` is not empty"),
    (ROW | {"teacher_reasoning": "hm"}, "`teacher_reasoning` is not empty"),
    (ROW | {"metadata": {"teacher_reasoning": "hm"}}, "`teacher_reasoning` is not empty"),
    (ROW | {"training_text": "<bot>"}, "curriculum has rewritten"),
    (ROW | {"loss_mask": [True, False]}, "`loss_mask` hides tokens"),
    (ROW | {"metadata": "x"}, "`metadata` is str"),
    (ROW | {"teacher_quality_score": "good"}, "`teacher_quality_score` is str 'good'"),
    (ROW | {"teacher_quality_score": 7}, "a number from 0 to 1"),
    (ROW | {"teacher_quality_score": 0.5, "metadata": {"teacher_quality_score": 0.6}}, "twice with different values"),
    (ROW | {"tool_name_source": "rumour"}, "expected one of schema"),
    (ROW | {"tool_name_ids": [1, 2], "tool_name_mask": [1]}, "`tool_name_mask` has 1 entries, expected 2"),
    (ROW | {"tool_name_mask": [1]}, "without `tool_name_ids`"),
    (ROW | {"tool_name_ids": [99_999]}, "ids from 99999"),
    (ROW | {"tool_name_ids": [-1]}, "ids from -1"),
    (ROW | {"tool_name_ids": [0.5]}, "expected integer token ids"),
    (ROW | {"tool_name_ids": [700, 701]}, "which is not in the response"),
    (ROW | {"gold_json_text_ids": [1], "mask_valid_json_tokens": [2]}, "other than 0 and 1"),
    (ROW | {"integration_mask": [1, 0]}, "`integration_mask` has 2 entries"),
    (ROW | {"tool_result_fields": [99_999]}, "`tool_result_fields` holds ids"),
    (ROW | {"metadata": {"span_targets": {"ts_mode_spans": [[5, 999]]}}}, r"[start, end) within 0 and"),
    (ROW | {"metadata": {"span_targets": {"ts_mode_spans": [[5]]}}}, r"[start, end) within 0 and"),
    (ROW | {"spans": {"calls": []}}, "`spans` is dict"),
    (ROW | {"teacher_logits": [0.5, 1.5]}, "`teacher_logits` has shape [2]"),
    (ROW | {"teacher_logits": [[0.5], [1.5, 2.0]]}, "rows of different lengths"),
    (ROW | {"teacher_logits": [[0.0] * 1200] * 3}, "`teacher_logits` has 3 rows"),
    (ROW | {"teacher_hidden_states": [[[1.0]]]}, "`teacher_hidden_states` has shape [1, 1, 1]"),
    (ROW | TOPK, "topk_ids has 30 rows, expected one for each of"),
    (ROW | TOPK | {"topk_logprobs": [[-0.5]]}, "expected the same"),
    (ROW | {"topk_ids": [1, 2, 3], "topk_logprobs": [0.0] * 3, "top_k": 2}, "a multiple of top_k=2"),
    (ROW | {"prompt_ids": [1]} | {"output_ids": [99_999]}, "`output_ids` holds ids"),
    (ROW | {"prompt_ids": [1], "output_ids": [1]}, "`output_ids` spell"),
    ({"output_ids": [1]}, "`output_ids` without `prompt_ids`"),
    ({"prompt_ids": [1], "output_ids": [5, 6], "response_mask": [1]}, "`response_mask` has 1 entries, expected 2"),
    ({"prompt_ids": [], "output_ids": [5, 6]}, "the prompt has no tokens"),
    (ROW | {"response_mask": [1]}, "`response_mask` without `output_ids`"),
    (ROW | {"rejected_text": " "}, "`rejected_text` is blank"),
    (ROW | {"rejected_text": 5}, "`rejected_text` is int '5', expected a string"),
    (ROW | {"rejected_text": CALL}, "there is nothing to prefer"),
    (ROW | {"rejected_text": "long " * 500}, "prompt and rejected text have 12 + 1502 tokens"),
    ({"prompt_ids": [1], "output_ids": [5], "rejected_text": "no"}, "`rejected_text` beside `output_ids`"),
    (ROW | {"response_source": "me"}, "expected gold, teacher or student"),
    (ROW | {"uid": "7"}, "`uid` is str"),
    (ROW | {"metadata": {"loop_index": 3, "max_loops": 2}}, "`max_loops`"),
    (ROW | {"metadata": {"loop_index": 0, "caws_tier": 4}}, "`caws_tier` is int '4', expected a number from 1 to 3"),
    (FIRST, "duplicate: an earlier row"),
    ({"prompt": PROMPT, "teacher_text": "long " * 500}, "tokens, expected at most 300"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_is_rejected_with_its_line_and_reason_and_no_other_row_is(bad, reason, tmp_path, demo_tokenizer):
    rows = [FIRST, bad, {"prompt": PROMPT, "teacher_text": "good"}]
    rejected_file = tmp_path / "rejected.jsonl"
    dataset = read(tmp_path, rows, demo_tokenizer, max_rejected_fraction=0.5, max_tokens=300, rejected_file=rejected_file)
    assert len(list(dataset)) == 2
    (reject,) = dataset.rejected
    assert reject.line == 2
    assert reason in reject.reason
    assert [json.loads(line)["line"] for line in rejected_file.read_text().splitlines()] == [2]
    with pytest.raises(DataError, match="unusable"):
        list(read(tmp_path, rows, demo_tokenizer, max_tokens=300, strict=True))


@pytest.mark.parametrize(
    ("column", "value", "times", "reason"),
    [
        ("marks", 1, 1, "`marks` has 1 entries"),
        ("marks", 0, 33, "no token is marked"),
        ("marks", 1, 33, "the first token is a response"),
        ("input_ids", 99_999, 33, "`input_ids` holds ids"),
        ("topk_ids", 1, 1, "1 top-k ids"),
    ],
)
def test_a_bad_stored_example_is_rejected(column, value, times, reason, tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    assert len(example.input_ids) == 33
    table = examples_to_table([example])
    place = table.schema.get_field_index(column)
    bad = pa.array([[value] * times], table.schema.field(column).type)
    pq.write_table(table.set_column(place, column, bad), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=reason):
        list(KDDataset([tmp_path / "a.parquet"], demo_tokenizer, strict=True))


def test_stored_examples_of_an_older_form_get_the_defaults_of_new_columns(tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    table = examples_to_table([example]).drop_columns(["quality", "set_ids", "pair", "grammar_masks", "tool_name_weight"])
    pq.write_table(table, tmp_path / "a.parquet")
    (again,) = KDDataset([tmp_path / "a.parquet"], demo_tokenizer)
    same(again, example)


def test_fields_in_their_old_places_are_read_with_one_warning_each(tmp_path, demo_tokenizer, caplog):
    warn_once.cache_clear()
    name = demo_tokenizer("get_weather", add_special_tokens=False)["input_ids"]
    old = {"process_supervision": {"tool_name_ids": name}, "metadata": {"teacher_quality_score": 0.5}}
    old |= {"span_targets": {"ts_mode_spans": [[0, 1]]}, "riddle": 1}
    with caplog.at_level(logging.WARNING):
        examples = list(read(tmp_path, [ROW | old, ROW | old | {"uid": 3}], demo_tokenizer, strict=True))
    assert [example.quality for example in examples] == [0.5, 0.5]
    assert all((example.marks & Mark.CODE_MODE).any() for example in examples)
    about = [record.message for record in caplog.records]
    for field in ("tool_name_ids", "teacher_quality_score", "span_targets", "riddle"):
        assert sum(field in message for message in about) == 1


def test_the_header_is_optional_and_its_fingerprint_is_checked(tmp_path, demo_tokenizer):
    path = tmp_path / "a.jsonl"
    with JsonlWriter(path, {"seed": 3, "vocabulary_fingerprint": "v1"}) as writer:
        writer.write(ROW)
        writer.write({"prompt": PROMPT, "teacher_text": "good"})
    lines = path.read_bytes().splitlines(keepends=True)
    dataset = KDDataset([path], demo_tokenizer, strict=True, vocabulary_fingerprint="v1")
    assert dataset.index.files[0].header["seed"] == 3
    assert len(list(dataset)) == 2
    with pytest.raises(DataError, match=r"vocabulary v1, expected v2"):
        KDDataset([path], demo_tokenizer, vocabulary_fingerprint="v2")
    path.write_bytes(b"\n" + b"".join(lines))  # a blank line before it is none
    assert KDDataset([path], demo_tokenizer, strict=True).fingerprint == dataset.fingerprint
    path.write_bytes(b"".join(lines).replace(b"good", b"evil"))
    with pytest.raises(DataError, match="the file was changed after it was written"):
        KDDataset([path], demo_tokenizer)
    path.write_bytes(b"".join(lines[1:]))
    assert len(list(KDDataset([path], demo_tokenizer, strict=True))) == 2
    flat = {"__header__": True, "dataset_sha256": dataset.index.files[0].fingerprint}
    path.write_bytes(json.dumps(flat).encode() + b"\n" + b"".join(lines[1:]))
    assert KDDataset([path], demo_tokenizer, strict=True).fingerprint == dataset.fingerprint


def test_an_aborted_file_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), JsonlWriter(tmp_path / "a.jsonl", {}) as writer:
        writer.write({"x": 1 // 0})
    assert list(tmp_path.iterdir()) == []


def numbered(tmp_path, name, count):
    rows = [{"prompt": PROMPT, "teacher_text": f"{name} {i}"} for i in range(count)]
    return str(write_lines(tmp_path / f"{name}.jsonl", rows))


def test_a_mixture_gives_every_file_its_weight_and_every_row_its_turn(tmp_path, demo_tokenizer):
    weights = {numbered(tmp_path, "a", 40): 1.0, numbered(tmp_path, "b", 8): 2.5, numbered(tmp_path, "c", 40): 0.25}
    index = KDDataset(weights, demo_tokenizer, seed=3).index
    uids, times = [], np.zeros(88, int)
    for epoch in range(4):
        rows, uid = epoch_order(index, 3, epoch)
        assert np.bincount(index.file[rows]).tolist() == [40, 20, 10]
        assert not np.array_equal(rows, np.sort(rows))
        uids += uid.tolist()
        times += np.bincount(rows, minlength=88)
    assert len(set(uids)) == len(uids)  # what a ledger needs: every time it comes, a row has a uid of its own
    assert times.tolist() == [4] * 40 + [10] * 8 + [1] * 40
    again, _ = epoch_order(index, 3, 3)
    np.testing.assert_array_equal(again, rows)
    other, _ = epoch_order(index, 4, 3)
    assert not np.array_equal(other, rows)


def text_of(example, tokenizer):
    return decode_spans(example, tokenizer)[Mark.RESPONSE][0]


def test_ranks_and_workers_share_the_rows_and_a_restart_reads_the_rest(tmp_path, demo_tokenizer):
    files = {numbered(tmp_path, "a", 70): 1.0, numbered(tmp_path, "b", 10): 2.0}
    make = partial(KDDataset, files, demo_tokenizer, seed=1)
    whole = [example.uid for example in make()]
    assert len(whole) == 90
    assert whole != [example.uid for example in make(shuffle=False)]
    halves = [[example.uid for example in make(rank=rank, world_size=2)] for rank in (0, 1)]
    assert [halves[i % 2][i // 2] for i in range(90)] == whole

    dataset = make()
    iterator = iter(dataset)
    first = [next(iterator).uid for _ in range(41)]
    rest = make()
    rest.set_epoch(0, start=dataset.position)
    assert first + [example.uid for example in rest] == whole
    rest.set_epoch(0, consumed_uids=first)
    assert first + [example.uid for example in rest] == whole
    rest.set_epoch(1)
    second = list(rest)
    assert {example.uid for example in second}.isdisjoint(whole)
    assert {text_of(e, demo_tokenizer) for e in second} == {text_of(e, demo_tokenizer) for e in make()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_data_loader_gives_batches(num_workers, tmp_path, demo_tokenizer):
    dataset = KDDataset([numbered(tmp_path, "a", 21)], demo_tokenizer, seed=1)
    collate = partial(collate_kd_batch, pad_id=0)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collate)
    batches = list(loader)
    uids = [uid for batch in batches for uid in batch.uid.tolist()]
    assert sorted(uids) == sorted(example.uid for example in dataset)
    assert all(batch.input_ids.shape[0] <= 4 and len(batch.response_index) for batch in batches)


def test_added_targets_are_what_reading_without_them_finds(tmp_path, demo_tokenizer):
    rows = [ROW, {"messages": CHAT[:3], "tools": TOOLS, "teacher_text": "Es sind  21,5 Grad."}, b"{", ROW | {"tools": TOOLS}]
    rows[-1] = rows[-1] | {"teacher_text": f"Also: {CALL}", "spans": None}
    path = write_lines(tmp_path / "a.jsonl", [{"__header__": {"seed": 5}}, *rows])
    added = add_process_targets(path)
    assert (added.num_rows, added.num_added, [line for line, _ in added.reasons]) == (4, 3, [4])
    lines = [json.loads(line) for line in Path(added.file).read_text().splitlines() if line != "{"]
    assert lines[0]["__header__"]["seed"] == 5
    assert lines[1]["teacher_text"][slice(*lines[1]["spans"]["tool_name"][0])] == "get_weather"
    read_all = partial(KDDataset, tokenizer=demo_tokenizer, shuffle=False, max_rejected_fraction=0.5)
    for one, other in zip(read_all([added.file]), read_all([path]), strict=True):
        same(one, other)

    lines[1]["spans"]["tool_name"] = [[0, 3]]  # what somebody corrects counts
    example = only(tmp_path, lines[1], demo_tokenizer)
    assert decode_spans(example, demo_tokenizer)[Mark.TOOL_NAME] == ["<tool_call>"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_packed_logits_of_others_become_examples(suffix, tmp_path, demo_tokenizer):
    ids = [np.array(demo_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("one two", PROMPT + CALL)]
    lengths, prompts = np.array([len(part) for part in ids]), np.array([1, 6])
    flat = np.concatenate(ids)
    topk = np.stack([np.roll(flat, -1), np.roll(flat, -2)], axis=1).astype(np.int32)  # row t is of token t + 1
    logprobs = np.log(np.tile(np.array([0.6, 0.3], np.float32), (len(flat), 1)))
    arrays = {"input_ids": flat.astype(np.int32), "topk_ids": topk, "topk_logprobs": logprobs}
    arrays |= {"sequence_lengths": lengths, "prompt_lengths": prompts}
    path = tmp_path / f"a{suffix}"
    save(path, arrays)
    reader = RowReader(demo_tokenizer)
    examples = import_packed_logits(path, reader, "t")
    for example, part, prompt in zip(examples, ids, prompts, strict=True):
        assert example.input_ids.tolist() == part.tolist()
        assert np.flatnonzero(example.marks & Mark.RESPONSE).tolist() == list(range(prompt, len(part)))
        assert example.topk_ids[:, 0].tolist() == part[prompt:].tolist()
        np.testing.assert_allclose(np.exp(example.log_tail), 0.1, rtol=1e-3)
    assert decode_spans(examples[1], demo_tokenizer)[Mark.TOOL_NAME] == ["get_weather"]
    for change, match in (
        ({"topk_ids": topk[:-1]}, "topk_ids has shape"),
        ({"topk_ids": topk + 99_999}, "expected 0 to"),
        ({"topk_logprobs": -logprobs}, "no log-probabilities"),
        ({"sequence_lengths": lengths - 1}, "add up to"),
    ):
        save(path, arrays | change)
        with pytest.raises(DataError, match=match):
            import_packed_logits(path, reader)


def save(path, arrays):
    from safetensors.numpy import save_file

    contiguous: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    np.savez(path, **contiguous) if path.suffix == ".npz" else save_file(contiguous, path)
