"""Pairs of responses in training: compared with the student as the run began, together wherever a step is cut."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.student.model import load_student
from raykd.training.checkpoint import latest_checkpoint, read_ledger
from raykd.training.feed import Feed
from raykd.training.reference import with_reference
from raykd.training.trainer import make_trainer
from tests.training.tiny_run import make_config, make_feed, make_pairs, make_rows, run, run_on_two_ranks, weights

LOSS = {"kd": 1.0, "ce_teacher": 0.0, "tool_name": 0.0, "ce_truth": 0.5, "code_mode_preference": 1.0}
DATA = {"prompts": None, "offline": [{"path": "pairs.jsonl"}]}


def pair_config(student_path, *, loss: dict | None = None, train: dict | None = None) -> Config:
    return make_config(student_path, loss=LOSS | (loss or {}), data=DATA, train=train or {})


def mixed(num_rows: int = 3, num_pairs: int = 3, seed: int = 1) -> pa.Table:
    """Rows of a teacher, then pairs, then rows again."""
    rows = make_rows(num_rows, seed=seed + 50)
    return pa.concat_tables([rows.slice(0, 1), make_pairs(num_pairs, seed=seed), rows.slice(1)])


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_the_reference_is_the_sum_of_the_responses_log_probabilities_where_there_is_a_pair(student_path):
    config = pair_config(student_path)
    student = load_student(config.student, 0).eval()
    table = mixed()
    batches = [collate_kd_batch(rows, 0) for rows in (table.slice(0, 3), make_rows(2), table.slice(3))]
    filled = with_reference(student, batches, torch.autocast("cpu", enabled=False))
    assert filled[1] is batches[1]
    assert with_reference(student, batches[1:2], torch.autocast("cpu", enabled=False)) == batches[1:2]
    for batch in (filled[0], filled[2]):
        logits = student.model(batch.input_ids).logits[:, :-1].float()
        of_token = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
        expected = (of_token * (batch.marks[:, 1:] != 0)).sum(dim=1).masked_fill(batch.pair == 0, math.nan)
        torch.testing.assert_close(batch.reference_logprob, expected, equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_the_first_step_every_pair_costs_log_2(student_path, tmp_path, precision):
    config = pair_config(student_path, loss={"kd": 0.0, "ce_truth": 0.0}, train={"precision": precision})
    _, logged = run(config, tmp_path, [mixed()])
    metrics = logged[0][1]
    assert metrics["count/code_mode_preference/pair"] == 3
    tolerance = 1e-5 if precision == "float32" else 1e-2
    assert metrics["loss/code_mode_preference/pair"] == pytest.approx(math.log(2), abs=tolerance)
    assert metrics["loss/total"] == pytest.approx(math.log(2), abs=tolerance)
    assert metrics["code_mode_eligible"] == pytest.approx(3 / 6), "of the rows, not of the rejected texts"
    assert metrics["code_mode_logprob"] < 0
    assert metrics["direct_tool_logprob"] < 0


def test_training_prefers_the_preferred_over_what_the_reference_thought(student_path, tmp_path):
    config = pair_config(student_path, loss={"kd": 0.0, "ce_truth": 0.0}, train={"sequences_per_step": 4})
    tables = [make_pairs(4, seed=1, first_uid=4 * number) for number in range(12)]
    _, logged = run(config, tmp_path, tables, num_steps=12)
    losses = [metrics["loss/code_mode_preference/pair"] for _, metrics in logged]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.3


def test_rejected_texts_count_in_no_other_loss_and_no_accuracy(student_path, tmp_path):
    config = pair_config(student_path)
    _, logged = run(config, tmp_path, [table := mixed()])
    metrics = logged[0][1]
    gold = [sum(mark != 0 for mark in row["marks"]) for row in table.to_pylist() if row["pair"] > 0]
    scored = sum(len(row["log_tail"] or ()) for row in table.to_pylist())
    assert metrics["count/ce_truth"] == sum(gold)
    assert metrics["count/kd"] == scored


def test_micro_batches_and_ranks_change_nothing_for_pairs(student_path, tmp_path):
    """Also where a pair alone is over the budget of a micro-batch, and where ranks hold different numbers of pairs."""
    train = {"learning_rate": 1e-4, "sequences_per_step": 6}
    a, b = mixed(seed=1), mixed(num_rows=1, num_pairs=5, seed=2)
    one, logged = run(pair_config(student_path, train=train), tmp_path / "one", [a, b])
    pieces = pair_config(student_path, train=train | {"max_tokens_per_micro_batch": 12})
    assert len(make_feed(one, [a]).next_step().batches) == 1
    many, _ = run(pieces, tmp_path / "many", [a, b])
    assert len(make_feed(many, [a]).next_step().batches) >= 4
    # Rows a[0] to a[4] are a row and two pairs: three of the six that each step takes.
    two, two_logged = run_on_two_ranks(pieces, tmp_path / "two", [[a.slice(0, 5), b.slice(0, 5)], [a.slice(5), b.slice(5)]])
    assert one.progress.step == many.progress.step == 2
    assert largest_difference(weights(one), weights(many)) <= 1e-6
    assert largest_difference(weights(one), two) <= 1e-6
    for (_, metrics), (_, expected) in zip(two_logged, logged, strict=True):
        for name in (
            "loss/total",
            "loss/code_mode_preference/pair",
            "count/code_mode_preference/pair",
            "code_mode_eligible",
        ):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    checkpoint = latest_checkpoint(tmp_path / "two")
    assert np.array_equal(read_ledger(checkpoint), one.consumed)
    assert len(one.consumed) == 12, "a pair counts once"


def test_a_resumed_run_has_the_same_reference_and_ends_with_the_same_bits(student_path, tmp_path):
    config = pair_config(student_path, train={"sequences_per_step": 4})
    tables = [mixed(seed=1), mixed(seed=2)]
    whole, logged = run(config, tmp_path / "whole", tables)
    asked = iter([False, False, True])
    _, first = run(config, tmp_path / "parts", tables, stop=lambda: next(asked))
    rest, second = run(config, tmp_path / "parts", tables)
    assert largest_difference(weights(rest), weights(whole)) == 0
    assert [m["loss/total"] for _, m in first + second] == [m["loss/total"] for _, m in logged]
    assert np.array_equal(rest.consumed, whole.consumed)
    assert rest.reference is not None
    assert not any(parameter.requires_grad for parameter in rest.reference.parameters())


def test_validation_compares_with_the_same_reference(student_path, tmp_path):
    held_out = make_pairs(3, seed=9)
    place = held_out.schema.get_field_index("held_out")
    held_out = held_out.set_column(place, "held_out", pa.array([True] * 6))
    config = pair_config(student_path, train={"validate_every": 1, "learning_rate": 1e-9})
    _, logged = run(config, tmp_path, [held_out, mixed()])
    measured = next(metrics for _, metrics in logged if "validation/count/code_mode_preference/pair" in metrics)
    assert measured["validation/count/code_mode_preference/pair"] == 3
    assert measured["validation/loss/code_mode_preference/pair"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_second_student_is_there_only_where_pairs_may_come(student_path, tmp_path):
    without_loss = pair_config(student_path, loss={"code_mode_preference": 0.0})
    without_offline = make_config(student_path, loss={"code_mode_preference": 1.0})
    for config in (without_loss, without_offline):
        assert make_trainer(config, tmp_path, num_steps=1, teacher={}).reference is None


def test_a_feed_never_parts_a_pair_and_counts_it_once():
    tables = [make_rows(1, seed=50), make_pairs(2, seed=1), make_rows(2, seed=51), make_pairs(2, seed=2)]
    whole = pa.concat_tables(tables)
    pieces = [whole.slice(start, 1) for start in range(len(whole))]  # as if the stream had cut everything
    for rows_per_step in (1, 2, 3, 5, 9):
        feed = Feed(iter(pieces), rows_per_step, 10_000, pad_id=0)
        steps = [feed.next_step() for _ in range(8)]
        assert [len(rows.uid) for rows in steps if len(rows.uid)] == [
            min(rows_per_step, 7 - start) for start in range(0, 7, rows_per_step)
        ]
        assert pa.concat_tables([rows.table for rows in steps])["uid"] == whole["uid"]
        for rows in steps:
            assert sum(rows.table["pair"].to_pylist()) == 0
        assert np.concatenate([rows.uid for rows in steps]).tolist() == [50_000, 1000, 1001, 51_000, 51_001, 2000, 2001]
