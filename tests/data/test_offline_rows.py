"""Offline rows: the stream's examples, each field where it is documented to be, every bad row named."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from offline_helpers import CALL, CHAT, PROMPT, ROW, TOOLS, only, read, same, teacher_rows
from prompt_helpers import write_lines

from raykd.data.chat import tokenize_row
from raykd.data.collate import collate_kd_batch
from raykd.data.dataset import KDDataset
from raykd.data.examples import Wanted, build_examples, decode_spans, example_from_row
from raykd.data.offline_fields import warn_once
from raykd.data.offline_rows import RowReader
from raykd.data.offline_scores import scores_of_logits
from raykd.data.readers import DataError
from raykd.loss_config import LossConfig
from raykd.types import Example, Mark, Source


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
    read = RowReader(demo_tokenizer, wanted=Wanted(caws_tier=default)).examples([refinement, *loops])
    whole, *parts = [example for (example,) in read if isinstance(example, Example)]
    assert [part.halt_targets.tolist() for part in parts] == [[target] for target in whole.halt_targets.tolist()]
    cap = own or default or 9
    assert whole.halt_targets.tolist() == [float(loop >= cap) for loop in (1, 2)]


def test_the_tier_of_a_sample_is_that_of_its_row_or_of_its_refinement(demo_tokenizer):
    draft = {"role": "assistant", "content": "21.", "loop": 0, "judge_score": 0.2}
    refined = {"messages": [*CHAT[:3], draft | {"caws_tier": 1}]}
    rows = [ROW, ROW | {"metadata": {"caws_tier": 3}}, ROW | {"metadata": {"caws_tier": 1}, "rejected_text": "No."}]
    rows += [
        refined,
        refined | {"metadata": {"caws_tier": 2}},
        {"messages": [*CHAT[:3], draft], "metadata": {"caws_tier": 1}},
    ]
    read = RowReader(demo_tokenizer, wanted=Wanted(caws_tier=3)).examples(rows)
    assert [[example.caws_tier for example in row if isinstance(example, Example)] for row in read] == [
        [0], [3], [1, 1], [1], [2], [1]
    ]  # fmt: skip
    loops = [example for row in read[3:] for example in row if isinstance(example, Example)]
    assert [example.halt_targets.tolist() for example in loops] == [[1], [1], [1]], "each refinement is in tier 1"


@pytest.mark.parametrize(("tier", "halts"), [(1, 1.0), (2, 1.0), (3, 0.0)])
def test_a_dataset_caps_loops_of_rows_that_name_no_tier_as_the_stream_does(tier, halts, tmp_path, demo_tokenizer):
    row = ROW | {"metadata": {"loop_index": 1, "max_loops": 3, "judge_score": 0.2}}
    example = only(tmp_path, row, demo_tokenizer, wanted=Wanted(caws_tier=tier))
    assert example.halt_targets.tolist() == [halts]
    if tier == LossConfig().caws_tier:
        same(example, only(tmp_path, row, demo_tokenizer))


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
