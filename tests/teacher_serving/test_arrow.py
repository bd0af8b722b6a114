"""Answers of an engine become the table of the contract, exactly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.arrow import (
    Answer,
    ListColumn,
    answers_table,
    find_problems,
    log_tail,
    request_seed,
    shipped_states,
    split_columns,
)
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, TeacherInfo

INFO = TeacherInfo("t", "f", "v", vocab_size=10, max_model_len=8, eos_token_ids=(1,))


def full_softmax(seed: int, num_rows: int, vocab_size: int, scale: float) -> np.ndarray:
    """Float64 log-probabilities over a whole vocabulary."""
    logits = np.random.default_rng(seed).normal(0.0, scale, (num_rows, vocab_size))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def test_the_sampled_tokens_duplicate_is_dropped_and_rank_order_kept():
    ids = np.array([[7, 3, 7, 5], [2, 4, 1, 0]], np.int32)  # row 0: sampled 7 is second; row 1: sampled 2 is outside
    logprobs = np.array([[-1.0, -0.5, -1.0, -2.0], [-9.0, -0.1, -3.0, -4.0]], np.float32)
    topk_ids, topk_logprobs, sampled = split_columns(ids, logprobs, np.array([7, 2]), top_k=3)
    assert topk_ids.tolist() == [[3, 7, 5], [4, 1, 0]]
    assert topk_logprobs.tolist() == [[-0.5, -1.0, -2.0], pytest.approx([-0.1, -3.0, -4.0])]
    assert sampled.tolist() == [-1.0, -9.0]


def test_k_columns_with_the_sampled_token_in_front_are_sorted_back_into_ranks():
    ids = np.array([[7, 3, 5], [3, 7, 5]], np.int32)
    logprobs = np.array([[-1.0, -0.5, -2.0], [-0.5, -1.0, -2.0]], np.float32)
    topk_ids, topk_logprobs, sampled = split_columns(ids, logprobs, np.array([7, 3]), top_k=3)
    assert topk_ids.tolist() == [[3, 7, 5], [3, 7, 5]]
    assert topk_logprobs.tolist() == [[-0.5, -1.0, -2.0]] * 2
    assert sampled.tolist() == [-1.0, -0.5]


def test_log_probabilities_of_another_token_are_refused():
    with pytest.raises(AssertionError, match="not the sampled token"):
        split_columns(np.zeros((1, 3), np.int32), np.zeros((1, 3), np.float32), np.array([7]), top_k=2)


@pytest.mark.parametrize(("scale", "top_k"), [(0.1, 5), (1.0, 64), (3.0, 64), (8.0, 1)])
def test_the_tail_is_the_mass_of_all_other_tokens(scale: float, top_k: int):
    exact = -np.sort(-full_softmax(0, 200, 1000, scale), axis=1)
    expected = np.logaddexp.reduce(exact[:, top_k:], axis=1)
    found = log_tail(exact[:, :top_k].astype(np.float32), 1000)
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=3e-7)
    clear = expected > np.log(1e-3)
    assert clear.any()
    np.testing.assert_allclose(found[clear], expected[clear], atol=3e-4)


def test_a_certain_position_has_a_tail_no_larger_than_its_last_rank_allows():
    topk_logprobs = np.array([[0.0, -40.0], [0.0, -10.0]], np.float32)
    certain, rounded = log_tail(topk_logprobs, 1000)
    assert certain == pytest.approx(np.log(998) - 40.0)
    assert rounded == pytest.approx(np.log(2.0**-24))  # 1 - sum is below zero in float32: the floor


def test_nothing_is_outside_a_top_k_of_the_whole_vocabulary():
    assert log_tail(full_softmax(1, 3, 10, 1.0).astype(np.float32), 10).tolist() == [-np.inf] * 3


def test_every_row_becomes_a_row_and_errors_are_empty_ones():
    rows = pa.table({"uid": [5, 6, 7], "prompt_ids": pa.array([[1, 2], [3], [4]], pa.list_(pa.int32()))})
    ids = np.array([[9, 9, 3], [8, 2, 8]], np.int32)
    logprobs = np.array([[-0.25, -0.25, -2.0], [-1e5, -0.5, -1e5]], np.float32)
    answers = [
        Answer(np.array([9], np.int32), ((ids[:1], logprobs[:1]),), "stop"),
        Answer.error("nothing came"),
        Answer(np.array([8], np.int32), ((ids[1:], logprobs[1:]),), "length"),
    ]
    table = answers_table(rows, answers, INFO, top_k=2, weight_version="3")
    assert table.schema.equals(TEACHER_OUTPUT_SCHEMA)
    assert table["uid"].to_pylist() == [5, 6, 7]
    assert table["output_ids"].to_pylist() == [[9], [], [8]]
    assert table["topk_ids"].to_pylist() == [[9, 3], [], [2, 8]]
    assert table["topk_logprobs"].to_pylist() == [[-0.25, -2.0], [], [-0.5, -np.inf]]  # halves end at -65504
    assert table["sampled_logprob"].to_pylist() == [[-0.25], [], [-1e5]]
    assert table["finish_reason"].to_pylist() == ["stop", "error: nothing came", "length"]
    assert set(table["weight_version"].to_pylist()) == {"3"}
    assert answers_table(rows.slice(0, 0), [], INFO, 2, "0").schema.equals(TEACHER_OUTPUT_SCHEMA)


def test_the_last_token_has_no_state_whether_an_engine_has_one_or_not():
    states = np.arange(12, dtype=np.float16).reshape(1, 4, 3)
    shipped = shipped_states(states, num_tokens=4)
    assert np.isnan(shipped[:, -1]).all()
    assert shipped[:, :-1].tolist() == states[:, :-1].tolist()
    np.testing.assert_array_equal(shipped_states(states[:, :3], num_tokens=4), shipped)
    with pytest.raises(AssertionError, match="states of 3 tokens for a sequence of 5"):
        shipped_states(states[:, :3], num_tokens=5)


def test_rows_the_engine_must_not_see_are_named():
    prompts = pa.table({"uid": [0, 1, 2, 3, 4], "prompt_ids": [[1, 2], [], [1] * 8, [1, 10], [-1]]})
    problems = find_problems(prompts, INFO, context=8)
    assert problems[0] is None
    assert [str(problem).split()[0] for problem in problems[1:]] == ["the", "9", "a", "a"]
    sequences = prompts.slice(0, 2).append_column("output_ids", pa.array([[1] * 6, [1]]))
    assert find_problems(sequences, INFO, context=8) == [None, "the prompt is empty"]
    assert find_problems(sequences, INFO, context=7)[0] is not None


def test_list_columns_survive_slices_chunks_and_nulls():
    array = pa.array([[1], [2, 3], None, [], [4, 5, 6]], pa.list_(pa.int64()))
    table = pa.table({"x": pa.chunked_array([array.slice(1, 2), array.slice(3)])})
    column = ListColumn.of(table, "x")
    assert [column.row(row).tolist() for row in range(4)] == [[2, 3], [], [], [4, 5, 6]]
    assert column.row_any(column.values > 4).tolist() == [False, False, False, True]


def test_seeds_tell_prompts_and_tries_apart():
    seeds = {request_seed(seed, uid, attempt) for seed in range(3) for uid in range(-50, 50) for attempt in range(3)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)
