"""Padding, packing and splitting: every token once, in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data.collate import collate_kd_batch, split_micro_batches
from raykd.data.examples import build_examples, example_from_row, examples_to_table
from raykd.types import Example, Mark, SetKind, Source
from teacher_serving.arrow import Answer, answers_table
from teacher_serving.types import TeacherInfo


def make_example(uid, length, k, rng):
    marks = np.where(rng.random(length) < 0.5, Mark.RESPONSE | Mark.TOOL_NAME, 0).astype(np.uint16)
    marks[0], marks[-1] = 0, Mark.RESPONSE
    num_response = int((marks & Mark.RESPONSE > 0).sum())
    return Example(
        uid=uid,
        source=Source(uid % 3),
        input_ids=rng.integers(1, 99, length).astype(np.int32),
        marks=marks,
        topk_ids=rng.integers(0, 99, (num_response, k)).astype(np.int32),
        topk_logprobs=rng.normal(size=(num_response, k)).astype(np.float16),
        log_tail=rng.normal(size=num_response if k else 0).astype(np.float32),
        teacher_id="t" if k else "",
        num_calls=uid,
    )


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 3)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_batch_holds_what_its_examples_hold(shapes, seed):
    rng = np.random.default_rng(seed)
    examples = [make_example(i, length, k, rng) for i, (length, k) in enumerate(shapes)]
    batch = collate_kd_batch(examples, pad_id=7)
    again = collate_kd_batch(examples_to_table(examples), pad_id=7)
    assert all(torch.equal(getattr(batch, name).nan_to_num(), getattr(again, name).nan_to_num()) for name in vars(batch))
    position = 0
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch.input_ids[row, :length].tolist() == example.input_ids.tolist()
        assert (batch.input_ids[row, length:] == 7).all()
        assert batch.attention_mask[row].tolist() == [True] * length + [False] * (batch.input_ids.shape[1] - length)
        assert batch.marks[row, :length].tolist() == example.marks.tolist()
        num, k = example.topk_ids.shape
        mine = slice(position, position + num)
        assert batch.response_ids[mine].tolist() == example.input_ids[(example.marks & Mark.RESPONSE) > 0].tolist()
        assert batch.topk_ids[mine, :k].tolist() == example.topk_ids.tolist()
        assert batch.topk_logprobs[mine, :k].tolist() == example.topk_logprobs.astype(np.float32).tolist()
        assert (batch.topk_logprobs[mine, k:] == -torch.inf).all()
        assert batch.log_tail[mine].tolist() == (example.log_tail.tolist() if k else [0.0] * num)
        assert (batch.response_source[mine] == int(example.source)).all()
        assert (batch.has_teacher[mine] == (k > 0)).all()
        position += num
    assert position == len(batch.response_index)
    assert batch.topk_ids.shape[1] == max(k for _, k in shapes)
    assert (batch.response_marks & Mark.RESPONSE > 0).all()


def test_rows_of_teachers_with_different_k_make_one_batch(demo_tokenizer):
    """One server allows 3 log-probabilities, one 2, one gives text alone; the tail is that of what came."""
    prompts = pa.table({"uid": [0], "prompt_ids": pa.array([[5, 6]], pa.list_(pa.int32()))})
    info = TeacherInfo("t", "f", "v", vocab_size=len(demo_tokenizer), max_model_len=64, eos_token_ids=())
    ids, logprobs = np.array([[20, 20, 21, 22]], np.int32), np.log(np.array([[0.5, 0.5, 0.25, 0.125]], np.float32))
    tables = []
    for k in (3, 2, 0):
        pieces = ((ids[:, : k + 1], logprobs[:, : k + 1]),) if k else ()
        tables.append(answers_table(prompts, [Answer(np.array([20], np.int32), pieces, "stop")], info, k, "0"))
    built = build_examples(pa.concat_tables(tables), demo_tokenizer)
    assert built.rejected.num_rows == 0
    batch = collate_kd_batch(built.examples, pad_id=0)
    assert batch.topk_ids.tolist() == [[20, 21, 22], [20, 21, 0], [0, 0, 0]]
    expected = [[0.5, 0.25, 0.125], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(batch.topk_logprobs.exp(), expected, atol=2e-4)  # of half precision
    assert batch.log_tail.exp().tolist() == pytest.approx([0.125, 0.25, 1.0])
    assert batch.has_teacher.tolist() == [True, True, False]


def test_rows_of_a_sliced_or_chunked_table_collate_alike():
    rng = np.random.default_rng(0)
    examples = [make_example(i, 4 + i, 2, rng) for i in range(5)]
    table = examples_to_table(examples)
    chunked = pa.concat_tables([table.slice(1, 1), table.slice(3, 2)])
    batch, expected = collate_kd_batch(chunked, 0), collate_kd_batch([examples[1], examples[3], examples[4]], 0)
    assert all(torch.equal(getattr(batch, name).nan_to_num(), getattr(expected, name).nan_to_num()) for name in vars(batch))
    back = example_from_row(chunked, 2)
    assert repr(back) == repr(examples[4])


def test_a_response_token_without_a_predecessor_is_an_error():
    example = make_example(0, 4, 0, np.random.default_rng(0))
    example.marks[0] = Mark.RESPONSE
    with pytest.raises(AssertionError, match="column 0"):
        collate_kd_batch(
            [Example(**{**vars(example), "topk_ids": np.empty((int((example.marks > 0).sum()), 0), np.int32)})], 0
        )


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="found 0 rows"):
        collate_kd_batch([], 0)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=40), max_tokens=st.integers(1, 120))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens):
    batches = split_micro_batches(lengths, max_tokens)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert len(batch) > 0
        assert padded <= max_tokens or len(batch) == 1
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), max_tokens=st.integers(1, 120), seed=st.integers(0, 99)
)
def test_a_pair_is_never_split_and_rows_of_none_are_packed_as_ever(lengths, max_tokens, seed):
    rng = np.random.default_rng(seed)
    pair = np.zeros(len(lengths), np.int64)
    members = rng.permutation(len(lengths))[: 2 * int(rng.integers(0, len(lengths) // 2 + 1))]
    pair[members[::2]] = 2**62 + np.arange(len(members) // 2)
    pair[members[1::2]] = -pair[members[::2]]
    batches = split_micro_batches(lengths, max_tokens, pair)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    where = {row: number for number, batch in enumerate(batches) for row in batch.tolist()}
    assert all(where[one] == where[other] for one, other in zip(members[::2], members[1::2], strict=True))
    for batch in batches:
        is_one_pair = len(batch) == 2 and pair[batch[0]] == -pair[batch[1]] != 0
        assert len(batch) * max(lengths[i] for i in batch) <= max_tokens or len(batch) == 1 or is_one_pair
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    nobody = split_micro_batches(lengths, max_tokens, np.zeros_like(pair))
    assert [b.tolist() for b in nobody] == [b.tolist() for b in split_micro_batches(lengths, max_tokens)]


def test_a_pair_is_packed_by_its_longer_half():
    # Rows 1 and 3 count as two of 9 tokens: with row 0 (8) there would be 27.
    assert [b.tolist() for b in split_micro_batches([8, 9, 3, 2], 24, [0, 5, 0, -5])] == [[1, 3], [0, 2]]
    assert [b.tolist() for b in split_micro_batches([8, 9, 3, 2], 27, [0, 5, 0, -5])] == [[1, 3, 0], [2]]


def test_like_lengths_share_a_micro_batch():
    assert [batch.tolist() for batch in split_micro_batches([2, 9, 2, 10, 1, 2], 20)] == [[3, 1], [0, 2, 5, 4]]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        split_micro_batches([1], 0)


def test_what_only_some_losses_look_at_is_packed_beside_the_tokens():
    response = int(Mark.RESPONSE)
    first = Example(
        uid=1,
        source=Source.STUDENT,
        input_ids=np.arange(4, dtype=np.int32),
        marks=np.array([0, response, response | Mark.DECISION, 0], np.uint16),
        topk_ids=np.zeros((2, 1), np.int32),
        topk_logprobs=np.array([[-0.5], [-np.inf]], np.float16),
        log_tail=np.zeros(2, np.float32),
        quality=0.25,
        caws_tier=3,
        advantage=-1.0,
        sampled_logprobs=np.array([-0.5, -1.5], np.float32),
        halt_targets=np.array([0.75], np.float32),
        set_position=np.array([2], np.int32),
        set_kind=np.array([SetKind.COPY], np.int8),
        set_sizes=np.array([1], np.int32),
        set_ids=np.array([9], np.int32),
        grammar_position=np.array([1, 2], np.int32),
        grammar_row=np.array([1, 0], np.int32),
        grammar_masks=np.array([[5], [6]], np.int32),
        teacher_hidden=np.arange(8, dtype=np.float16).reshape(1, 4, 2),
    )
    second = Example(
        uid=2,
        source=Source.GOLD,
        input_ids=np.arange(2, dtype=np.int32),
        marks=np.array([0, response], np.uint16),
        topk_ids=np.zeros((1, 1), np.int32),
        topk_logprobs=np.zeros((1, 1), np.float16),
        log_tail=np.zeros(1, np.float32),
        tool_name_weight=0.5,
        set_position=np.array([1], np.int32),
        set_kind=np.array([SetKind.TOOL_CHOICE], np.int8),
        set_sizes=np.array([2], np.int32),
        set_ids=np.array([3, 4], np.int32),
        grammar_position=np.array([1], np.int32),
        grammar_row=np.array([0], np.int32),
        grammar_masks=np.array([[7]], np.int32),
        teacher_hidden=np.full((1, 2, 2), 100, np.float16),
    )
    batch = collate_kd_batch([first, second], pad_id=0)
    assert batch.response_index.tolist() == [1, 2, 5]
    assert batch.end_index.tolist() == [2, 5]
    assert batch.decision_index.tolist() == [2]
    assert batch.halt_targets.tolist() == [0.75]
    assert batch.has_teacher.tolist() == [True, False, True]
    assert batch.caws_tier.tolist() == [3, 0]
    assert batch.quality[0] == 0.25
    assert batch.quality[1].isnan()
    assert batch.tool_name_weight.tolist() == [1, 1, 0.5]
    assert batch.response_advantage[:2].tolist() == [-1, -1]
    assert batch.response_advantage[2].isnan()
    assert batch.response_old_logprob[:2].tolist() == [-0.5, -1.5]
    assert batch.response_old_logprob[2].isnan()
    assert batch.set_row.tolist() == [1, 2]
    assert batch.set_ids.tolist() == [[9, -1], [3, 4]]
    assert batch.set_kind.tolist() == [SetKind.COPY, SetKind.TOOL_CHOICE]
    assert batch.grammar_row.tolist() == [0, 1, 2]
    assert batch.grammar_mask.tolist() == [1, 0, 2]
    assert batch.grammar_masks.tolist() == [[5], [6], [7]]
    assert batch.state_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.teacher_hidden.shape == (1, 6, 2)
    assert batch.teacher_hidden[0, 3].tolist() == [6, 7]
    assert batch.teacher_hidden[0, 4:].tolist() == [[100, 100], [100, 100]]
    table = examples_to_table([first, second])
    for index, example in enumerate((first, second)):
        again = example_from_row(table, index)
        assert all(np.array_equal(np.asarray(value), np.asarray(vars(again)[name]), equal_nan=isinstance(value, float))
                   for name, value in vars(example).items()), vars(again)  # fmt: skip


def test_rows_and_tokens_without_teacher_states_leave_those_of_the_others():
    rng = np.random.default_rng(0)
    states = np.arange(16, dtype=np.float16).reshape(2, 4, 2)
    states[:, 1] = np.nan  # such as a latent slot
    rows = [make_example(uid, length, 2, rng) for uid, length in ((1, 3), (2, 4), (3, 2))]
    rows[1] = replace(rows[1], teacher_hidden=states)
    batch = collate_kd_batch(rows, pad_id=0)
    assert batch.state_index.tolist() == [4, 6, 7]
    assert torch.equal(batch.teacher_hidden, torch.from_numpy(states[:, [0, 2, 3]]))
    none = collate_kd_batch(rows[:1], pad_id=0)
    assert none.state_index.tolist() == []
    assert none.teacher_hidden.shape == (0, 0, 0)
