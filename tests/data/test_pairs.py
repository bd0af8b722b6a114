"""Pairs of responses from offline rows: both halves or none, the rejected one a target of nothing, counted once."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prompt_helpers import write_lines

from raykd.data.collate import collate_kd_batch
from raykd.data.dataset import KDDataset
from raykd.data.examples import (
    REJECTED_SCHEMA,
    BuiltExamples,
    decode_spans,
    examples_to_table,
)
from raykd.data.offline_rows import RowReader
from raykd.data.pairs import begins_row
from raykd.types import Example, Mark, Source

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
PROMPT = "<|im_start|>user\nWetter?<|im_end|>\n<|im_start|>assistant\n"
ROW = {"prompt": PROMPT, "teacher_text": CALL}
FIRST = {"prompt": PROMPT, "teacher_text": "first"}


def read(tmp_path, rows, tokenizer):
    return list(KDDataset([write_lines(tmp_path / "a.jsonl", rows)], tokenizer, strict=True))


def same(one: Example, other: Example):
    for field in dataclasses.fields(Example):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_a_rejected_text_stands_behind_the_preferred_one_and_is_no_target(tmp_path, demo_tokenizer):
    """Whatever the row says of its response holds for the preferred half alone."""
    plain = read(tmp_path, [ROW], demo_tokenizer)[0]
    num_response = int(np.count_nonzero(plain.marks & Mark.RESPONSE))
    row = ROW | {
        "rejected_text": f"No: {CALL}",
        "topk_ids": [[1, 2]] * num_response,
        "topk_logprobs": [[-0.5, -2.0]] * num_response,
        "teacher_quality_score": 0.75,
        "response_source": "teacher",
        "teacher_hidden_states": np.ones((1, len(plain.input_ids), 3)).tolist(),
        "metadata": {"span_targets": {"direct_tool_spans": [[0, 2]]}, "loop_index": 0, "judge_score": 0.2},
    }
    alone = {name: value for name, value in row.items() if name != "rejected_text"}
    alone_example = read(tmp_path, [alone], demo_tokenizer)[0]
    preferred, rejected = read(tmp_path, [row], demo_tokenizer)
    assert (preferred.pair, rejected.pair, rejected.uid) == (rejected.uid, -preferred.pair, preferred.pair)
    assert preferred.pair > 0
    assert preferred.uid not in (rejected.uid, alone_example.uid)
    same(dataclasses.replace(preferred, uid=alone_example.uid, pair=0), alone_example)
    assert decode_spans(rejected, demo_tokenizer)[Mark.RESPONSE] == [f"No: {CALL}<|im_end|>"]
    assert set(rejected.marks.tolist()) == {0, Mark.RESPONSE}
    bare = Example(
        uid=rejected.uid,
        source=Source.STUDENT,
        input_ids=rejected.input_ids,
        marks=rejected.marks,
        topk_ids=np.empty((np.count_nonzero(rejected.marks), 0), np.int32),
        topk_logprobs=np.empty((np.count_nonzero(rejected.marks), 0), np.float16),
        log_tail=np.empty(0, np.float32),
        pair=rejected.pair,
    )
    same(rejected, bare)
    batch = collate_kd_batch([preferred, rejected], 0)
    assert batch.has_teacher.tolist() == [True] * num_response + [False] * int(np.count_nonzero(rejected.marks))


def test_a_cut_preferred_text_says_nothing_about_the_end_of_the_rejected_one(tmp_path, demo_tokenizer):
    row = ROW | {"finish_reason": "length", "rejected_text": "No."}
    texts = [decode_spans(half, demo_tokenizer)[Mark.RESPONSE] for half in read(tmp_path, [row], demo_tokenizer)]
    assert texts == [[CALL], ["No.<|im_end|>"]]


def test_a_row_of_which_one_half_cannot_be_built_gives_nothing(demo_tokenizer):
    class Refusing(RowReader):
        def build(self, teacher_rows: pa.Table) -> BuiltExamples:
            refused = pa.Table.from_pylist([{"uid": 1, "reason": "no example"}], schema=REJECTED_SCHEMA)
            kept = teacher_rows.filter(pa.array([uid != 1 for uid in teacher_rows["uid"].to_pylist()]))
            return BuiltExamples(super().build(kept).examples, refused)

    whole, other = Refusing(demo_tokenizer).examples([ROW | {"rejected_text": "No."}, FIRST])
    assert whole == "no example"
    assert [type(half) for half in other] == [Example]


def test_rejected_texts_are_left_out_where_nothing_compares_them(demo_tokenizer):
    [halves] = RowReader(demo_tokenizer, pairs=False).examples([ROW | {"rejected_text": "No."}])
    assert [half.pair for half in halves if isinstance(half, Example)] == [0]


def test_a_row_with_a_pair_counts_by_its_own_uid(tmp_path, demo_tokenizer):
    rows = [{"prompt": PROMPT, "teacher_text": f"yes {i}", "rejected_text": f"no {i}", "uid": i} for i in range(3)]
    rows.append({"prompt": PROMPT, "teacher_text": "alone", "uid": 3})
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    make = partial(KDDataset, {path: 2.0}, demo_tokenizer, seed=1)
    examples = list(make())
    assert len(examples) == 2 * (3 * 2 + 1)
    assert len({example.uid for example in examples}) == len(examples)
    preferred = [example.pair for example in examples if example.pair > 0]
    assert len(set(preferred)) == 6, "a row that comes twice makes two pairs"
    places = [place for place, example in enumerate(examples) if example.pair > 0]
    assert [examples[place + 1].pair for place in places] == [-pair for pair in preferred]
    begins = begins_row(examples_to_table(examples)).tolist()
    assert begins == [example.pair >= 0 for example in examples]

    dataset = make()
    dataset.set_epoch(0, consumed_uids=[examples[places[0]].uid])
    left = [example.uid for example in dataset]
    assert left == [example.uid for place, example in enumerate(examples) if place not in (places[0], places[0] + 1)]


def test_stored_examples_are_no_pairs_any_more(tmp_path, demo_tokenizer):
    """They come one by one: halves that met by chance in a micro-batch would be compared there and not elsewhere."""
    pair = read(tmp_path, [ROW | {"rejected_text": "No."}], demo_tokenizer)
    pq.write_table(examples_to_table(pair), tmp_path / "a.parquet")
    stored = list(KDDataset([tmp_path / "a.parquet"], demo_tokenizer, shuffle=False))
    assert [(example.uid, example.pair) for example in stored] == [(example.uid, 0) for example in pair]
