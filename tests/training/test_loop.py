from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from raykd.data.process_targets import REASONS
from raykd.loss_config import LOSSES, LossConfig
from raykd.training.checkpoint import STUDENT, latest_checkpoint, list_checkpoints, read_ledger
from raykd.training.feed import Feed
from raykd.training.loop import NotFiniteError, count_tokens, step, validate
from raykd.training.loss_needs import NEEDS, tell_idle
from raykd.training.schedules import learning_rate
from raykd.training.trainer import make_trainer
from raykd.types import EXAMPLE_SCHEMA, Mark
from tests.training.tiny_run import VOCAB, make_config, make_feed, make_rows, run, run_on_two_ranks, weights


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def losses(logged: list[tuple[int, dict[str, float]]]) -> list[float]:
    return [metrics["loss/total"] for _, metrics in logged if "loss/total" in metrics]


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index(name), EXAMPLE_SCHEMA.field(name), pa.array(values, EXAMPLE_SCHEMA.field(name).type)
    )


def test_weights_move_after_a_step_and_not_while_gradients_gather(student_path, tmp_path):
    config = make_config(student_path, train={"max_tokens_per_micro_batch": 12})
    trainer = make_trainer(config, tmp_path, num_steps=5, teacher={})
    rows = make_feed(trainer, [make_rows(8)]).next_step()
    assert len(rows.batches) >= 4
    before, during = weights(trainer), []
    trainer.student.register_forward_pre_hook(lambda *_: during.append(weights(trainer)))
    losses = trainer.losses_now()
    counts = trainer.ranks.sum(count_tokens(rows.batches, losses, trainer.context))
    step(trainer, rows.batches, counts, losses)
    assert len(during) == len(rows.batches)
    assert all(largest_difference(before, seen) == 0 for seen in during)
    after = weights(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())


def test_micro_batches_and_ranks_change_nothing(student_path, tmp_path):
    """One batch = four micro-batches = two ranks with two each, also after one of the ranks has run dry."""
    held_out, a, b, c = make_rows(3, seed=9, held_out=True), make_rows(4), make_rows(4, seed=1), make_rows(4, seed=2)
    # Adam turns rounding errors of gradients near zero into steps of up to the learning rate: it is a usual one here.
    train = {"validate_every": 1, "learning_rate": 1e-4}
    whole = make_config(student_path, train=train)
    pieces = make_config(student_path, train=train | {"max_tokens_per_micro_batch": 24})
    tables = [held_out, pa.concat_tables([a, b]), c]
    one, logged = run(whole, tmp_path / "one", tables)
    four, _ = run(pieces, tmp_path / "four", tables)
    assert len(make_feed(four, tables[1:]).next_step().batches) >= 4
    # The second rank has nothing for the second step, and the ranks have different numbers of held-out rows.
    two, two_logged = run_on_two_ranks(pieces, tmp_path / "two", [[held_out.slice(0, 1), a, c], [held_out.slice(1), b]])
    assert one.progress.step == four.progress.step == 2
    assert largest_difference(weights(one), weights(four)) <= 1e-6
    assert largest_difference(weights(one), two) <= 1e-6
    assert [number for number, _ in two_logged] == [number for number, _ in logged]
    for (_, metrics), (_, expected) in zip(two_logged, logged, strict=True):
        assert metrics.keys() == expected.keys()
        for name in expected:
            if not name.startswith(("speed", "wait", "seconds")):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    checkpoint = latest_checkpoint(tmp_path / "two")
    assert checkpoint is not None
    assert np.array_equal(read_ledger(checkpoint), np.concatenate([np.arange(4), 1000 + np.arange(4), 2000 + np.arange(4)]))
    assert len(list(checkpoint.glob("rng-*"))) == 2
    # An elastic run: one worker goes on where two were.
    more = [*tables, make_rows(16, seed=3)]
    (one, logged), (fewer, fewer_logged) = (run(pieces, tmp_path / name, more) for name in ("one", "two"))
    assert (fewer.progress.step, fewer.progress.sequences) == (one.progress.step, one.progress.sequences) == (4, 28)
    assert losses(fewer_logged) == pytest.approx(losses(logged), rel=1e-4)
    assert largest_difference(weights(fewer), weights(one)) <= 2e-6


@pytest.mark.parametrize("loss", ["kd", "ce_teacher", "tool_name"])
def test_the_loss_of_a_step_is_divided_by_its_own_tokens_once(student_path, tmp_path, loss):
    weights_of = {"kd": 0.0, "ce_teacher": 0.0, "tool_name": 0.0} | {loss: 2.0}
    config = make_config(student_path, loss=weights_of, train={"max_tokens_per_micro_batch": 24})
    _, logged = run(config, tmp_path, [make_rows(8)])
    metrics = logged[0][1]
    assert metrics["loss/total"] == pytest.approx(2.0 * metrics[f"loss/{loss}"], rel=1e-5)
    assert metrics[f"share/{loss}"] == pytest.approx(1.0)


def test_padding_rows_of_the_head_are_no_tokens(student_path, tmp_path):
    """A student with more rows than its tokenizer has tokens, and much mass on them, learns as if they were not there."""
    padded = tmp_path / "padded"
    shutil.copytree(student_path, padded)
    model = AutoModelForCausalLM.from_pretrained(student_path)
    model.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
    model.state_dict()["lm_head.weight"][VOCAB:] = 5.0
    model.save_pretrained(padded)
    train = {"weight_decay": 0.0}
    plain, expected = run(make_config(student_path, train=train), tmp_path / "plain", [make_rows(16)])
    trainer, logged = run(make_config(padded, train=train), tmp_path / "run", [make_rows(16)])
    assert trainer.student.head_weight.shape[0] == VOCAB + 16
    assert losses(logged) == pytest.approx(losses(expected), rel=1e-4)
    assert (trainer.student.head_weight[VOCAB:] == 5.0).all(), "no gradient reaches padding"
    learnt = weights(trainer)
    learnt = {name: value[: len(weights(plain)[name])] for name, value in learnt.items()}
    assert largest_difference(learnt, weights(plain)) < 1e-3


def dropout_student(student_path: Path, folder: Path) -> Path:
    shutil.copytree(student_path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return folder


def test_an_interrupted_run_ends_with_the_same_bits_as_an_undisturbed_one(student_path, tmp_path):
    config = make_config(dropout_student(student_path, tmp_path / "student"), train={"warmup_steps": 2})
    rows = [make_rows(48)]
    whole, logged = run(config, tmp_path / "whole", rows)
    asked = iter([False, False, False, True])
    part, first = run(config, tmp_path / "parts", rows, stop=lambda: next(asked))
    assert part.progress.step == 3
    rest, second = run(config, tmp_path / "parts", rows)
    assert rest.progress == whole.progress
    assert losses(first) + losses(second) == losses(logged)
    assert largest_difference(weights(rest), weights(whole)) == 0
    assert np.array_equal(rest.consumed, whole.consumed)


@pytest.mark.parametrize("kind", ["token", "run"])
def test_kd_is_weighted_by_entropy_once_the_range_is_measured_also_across_an_interruption(student_path, tmp_path, kind):
    loss = {"ce_teacher": 0, "tool_name": 0, "kd_entropy": kind, "kd_entropy_calibration_steps": 2, "kd_entropy_floor": 0.25}
    config = make_config(student_path, loss=loss)
    rows = make_rows(48)
    whole, logged = run(config, tmp_path / "whole", [rows], num_steps=6)
    totals = [0, *(metrics["response_tokens"] for _, metrics in logged if "response_tokens" in metrics)]
    tokens = np.diff(totals)  # of each step
    shares = [metrics["count/kd"] / number for (_, metrics), number in zip(logged, tokens, strict=True)]
    assert shares[:2] == [1.0, 1.0], "the range is still being measured"
    if kind == "token":
        assert all(0.25 < share < 0.95 for share in shares[2:])
    else:  # the weight of the loss, and not that of a token
        assert shares == [1.0] * 6
        assert 0.25 <= whole.losses_now().kd < 1.0
    steps: list[int] = []
    run(config, tmp_path / "parts", [rows], num_steps=6, stop=lambda: bool(steps.append(0)) or len(steps) > 3)
    resumed, _ = run(config, tmp_path / "parts", [rows], num_steps=6)
    assert resumed.loss_state == whole.loss_state
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_a_step_that_is_no_number_is_skipped_counted_and_kept(student_path, tmp_path):
    bad = make_rows(8, seed=1)
    bad = replaced(bad, "log_tail", [[math.nan] * len(tail) for tail in bad["log_tail"].to_pylist()])
    config = make_config(student_path, train={"max_tokens_per_micro_batch": 24})
    good, _ = run(config, tmp_path / "good", [make_rows(8)])
    trainer, logged = run(config, tmp_path / "bad", [make_rows(8), bad])
    assert largest_difference(weights(trainer), weights(good)) == 0
    assert (trainer.progress.step, trainer.progress.skipped_steps) == (2, 1)
    assert [number for number, _ in logged if "loss/total" in _] == [1]
    assert len(list((tmp_path / "bad" / "skipped").glob("step-2-rank-0.safetensors"))) == 1
    assert np.array_equal(trainer.consumed, np.concatenate([np.arange(8), 1000 + np.arange(8)]))
    after, _ = run(config, tmp_path / "after", [make_rows(8), bad, make_rows(8, seed=2)])
    assert after.progress.skipped_in_a_row == 0
    assert largest_difference(weights(after), weights(good)) > 0


def test_a_run_stops_after_too_many_skipped_steps_in_a_row(student_path, tmp_path):
    bad = make_rows(32)
    bad = replaced(bad, "log_tail", [[math.nan] * len(tail) for tail in bad["log_tail"].to_pylist()])
    config = make_config(student_path, train={"max_skipped_steps": 2})
    with pytest.raises(NotFiniteError, match=r"2 steps in a row \(the last is step 2\)"):
        run(config, tmp_path, [bad])
    assert list_checkpoints(tmp_path) == []


def test_random_tokens_cannot_be_predicted(student_path, tmp_path):
    """Whatever leaks a token to its own prediction (mask, shift, padding) lets the loss fall below ln V."""
    config = make_config(student_path, loss={"kd": 0.0, "tool_name": 0.0, "ce_teacher": 1.0}, train={"learning_rate": 3e-3})
    rows = [make_rows(8, seed=seed, lengths=(4, 40)) for seed in range(60)]
    _, logged = run(config, tmp_path, rows, num_steps=60)
    last = np.mean(losses(logged)[-20:])
    assert math.log(VOCAB) - 0.02 < last < losses(logged)[0]


def counting_rows(seed: int) -> pa.Table:
    """Sequences that count upwards from a random number."""
    rows = make_rows(8, seed=seed, lengths=(12, 12))
    starts = np.random.default_rng(seed).integers(0, VOCAB, 8)
    return replaced(rows, "input_ids", [(start + np.arange(12)) % VOCAB for start in starts])


def test_the_loss_falls_on_a_task_that_can_be_learnt(student_path, tmp_path):
    config = make_config(student_path, loss={"kd": 0.0, "tool_name": 0.0, "ce_teacher": 1.0})
    _, logged = run(config, tmp_path, [counting_rows(seed) for seed in range(60)], num_steps=60)
    assert losses(logged)[-1] < 0.25 * losses(logged)[0]


def test_gradient_checkpointing_changes_no_bit_and_bfloat16_little(student_path, tmp_path):
    rows = [make_rows(16)]
    plain, logged = run(make_config(student_path), tmp_path / "plain", rows)
    saving, _ = run(make_config(student_path, train={"gradient_checkpointing": True}), tmp_path / "saving", rows)
    assert largest_difference(weights(plain), weights(saving)) == 0
    half, half_logged = run(make_config(student_path, train={"precision": "bfloat16"}), tmp_path / "half", rows)
    assert losses(half_logged) == pytest.approx(losses(logged), rel=0.02)
    assert {parameter.dtype for parameter in half.student.parameters()} == {torch.float32}


def test_matrices_decay_and_vectors_do_not(student_path, tmp_path):
    trainer = make_trainer(make_config(student_path), tmp_path, num_steps=5, teacher={})
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.1 if p.ndim >= 2 else 0.0 for p in trainer.student.parameters()}


def test_every_step_uses_the_learning_rate_of_its_number(student_path, tmp_path):
    config = make_config(student_path, train={"warmup_steps": 2, "schedule": "linear"})
    _, logged = run(config, tmp_path, [make_rows(32)], num_steps=4)
    assert [m["learning_rate"] for _, m in logged if "loss/total" in m] == [
        learning_rate(i, 4, config.train) for i in range(4)
    ]


def test_intervals_and_ends_log_validate_and_save_once(student_path, tmp_path):
    intervals = {"log_every": 2, "validate_every": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "max_steps": 5}
    config = make_config(student_path, train=intervals)
    _, logged = run(config, tmp_path, [make_rows(4, seed=9, held_out=True), make_rows(64)])
    assert [number for number, metrics in logged if "loss/total" in metrics] == [2, 4, 5]
    assert [number for number, metrics in logged if "validation/teacher_kl" in metrics] == [3, 5]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    metrics = logged[0][1]
    assert {
        "epoch",
        "sequences",
        "response_tokens",
        "grad_norm",
        "seconds",
        "skipped_steps",
        "wait/teacher_s",
    } <= metrics.keys()
    assert {"wait/trainer_s", "speed/student_tokens_per_s", "speed/teacher_tokens_per_s"} <= metrics.keys()
    assert {"accuracy/tool_name", "accuracy/response", "count/kd", "share/kd", "loss/kd"} <= metrics.keys()


def test_notice_of_an_early_end_has_a_checkpoint_written_after_the_step_in_hand(student_path, tmp_path):
    config = make_config(student_path, train={"checkpoint_every": 100, "keep_checkpoints": 9})
    noticed = iter([False, True, False, False])
    run(config, tmp_path, [make_rows(32)], save_now=lambda: next(noticed, False))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert np.array_equal(read_ledger(list_checkpoints(tmp_path)[0]), np.arange(16))


def test_validation_trains_nothing_and_does_not_depend_on_the_micro_batches(student_path, tmp_path):
    config = make_config(student_path)
    trainer = make_trainer(config, tmp_path, num_steps=5, teacher={})
    before, measured = weights(trainer), []
    for max_tokens in (16, 10_000):
        feed = Feed(iter([]), 8, max_tokens, pad_id=0)
        feed.held_out = [make_rows(6, held_out=True)]
        measured.append(validate(trainer, feed))
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    assert largest_difference(before, weights(trainer)) == 0
    assert trainer.student.training
    assert validate(trainer, make_feed(trainer, [])) == {}


def test_a_loss_that_has_had_no_token_is_told_at_the_first_log_entry_and_at_the_end(student_path, tmp_path, caplog):
    loss = {"halt": 0.5, "copy_mass": 0.0, "schedules": {"copy_mass": {"kind": "constant", "start": 0.2}}}
    config = make_config(student_path, loss=loss, train={"log_every": 2})
    with caplog.at_level("WARNING", logger="raykd.training.loss_needs"):
        run(config, tmp_path / "long", [make_rows(24)])
        run(config, tmp_path / "short", [make_rows(16)])
        run(make_config(student_path), tmp_path / "all", [make_rows(8)])
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(": it needs")[0] for message in told] == [
        "loss.copy_mass has had no token in the first 2 steps",
        "loss.halt has had no token in the first 2 steps",
        "loss.copy_mass=0 has had no token in all 3 steps, changed nothing",
        "loss.halt=0.5 has had no token in all 3 steps, changed nothing",
        "loss.copy_mass has had no token in the first 2 steps",
        "loss.halt has had no token in the first 2 steps",
        "loss.copy_mass=0 has had no token in all 2 steps, changed nothing",
        "loss.halt=0.5 has had no token in all 2 steps, changed nothing",
    ]
    assert "it needs responses that copy values of tool results" in told[0]


def test_what_had_a_token_is_known_after_a_restart_and_nothing_is_told_before_the_last_epoch(student_path, tmp_path, caplog):
    config = make_config(student_path, loss={"halt": 0.5}, train={"checkpoint_every": 1, "epochs": 2})
    asked = iter([False, True])
    with caplog.at_level("WARNING", logger="raykd.training.loss_needs"):
        run(config, tmp_path, [make_rows(24)], stop=lambda: next(asked))
        trainer, _ = run(config, tmp_path, [make_rows(24)])
    assert trainer.progress.step == 3
    assert {"kd", "ce_teacher", "tool_name"} <= set(trainer.progress.supervised)
    told = [record.getMessage().partition(" has had")[0] for record in caplog.records]
    assert told == ["loss.halt"], "at the first log entry; this was the first of two epochs"


def test_a_loss_of_several_parts_is_idle_only_where_none_has_had_a_token(caplog):
    losses = LossConfig(kd=1.0, length_aware=0.5, code_mode_preference=0.5)
    with caplog.at_level("WARNING", logger="raykd.training.loss_needs"):
        tell_idle(losses, {"kd", "length_aware/excess"}, 7, at_end=True)
    assert [record.getMessage().split("=")[0] for record in caplog.records] == ["loss.code_mode_preference"]
    assert set(NEEDS) == set(LOSSES)


def test_why_samples_had_nothing_for_a_loss_to_look_at_is_told_once_at_the_end(student_path, tmp_path, caplog):
    with caplog.at_level("INFO", logger="raykd.training.loop"):
        run(make_config(student_path), tmp_path, [make_rows(20)], num_steps=3)
    told = [record.getMessage() for record in caplog.records if "no target" in record.getMessage()]
    assert told == [
        "copy_mass found no target in some of 20 samples: no tool result stands before the turn (10)",
        f"tool_choice found no target in some of 20 samples: {REASONS['few_tools']} (10)",
    ]


def test_a_checkpoint_is_a_student_to_start_from(student_path, tmp_path):
    trainer, _ = run(make_config(student_path), tmp_path / "run", [make_rows(8)])
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    again = make_trainer(make_config(checkpoint / STUDENT), tmp_path / "new", num_steps=5, teacher={})
    assert largest_difference(weights(trainer), weights(again)) == 0
    assert again.progress.step == 0


def test_a_feed_hands_out_exactly_its_share_and_keeps_held_out_rows_apart():
    tables = [make_rows(3, seed=1), make_rows(2, seed=9, held_out=True), make_rows(0), make_rows(7, seed=2)]
    feed = Feed(iter(tables), 4, 10_000, pad_id=0)
    steps = [feed.next_step() for _ in range(5)]
    assert [len(rows.uid) for rows in steps] == [4, 4, 2, 0, 0]
    assert np.concatenate([rows.uid for rows in steps]).tolist() == [1000, 1001, 1002, *range(2000, 2007)]
    assert sum(len(table) for table in feed.held_out) == 2
    assert steps[4].batches == []
    marks = [mark for row in pa.concat_tables([tables[0], tables[3].slice(0, 1)])["marks"].to_pylist() for mark in row]
    assert steps[0].numbers["tokens"] == len(marks)
    assert steps[0].numbers["response_tokens"] == sum(mark & Mark.RESPONSE for mark in marks)
