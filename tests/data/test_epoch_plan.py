"""Which rows come in an epoch, and in which order: the plan of raykd/data/stream.py, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from prompt_helpers import config_for

from raykd.config import LengthStage
from raykd.data.cache import TeacherCache
from raykd.data.prompt_rows import write_table
from raykd.data.sources import PromptSet
from raykd.data.stream import DESCRIPTOR_SCHEMA, plan_epoch, short_first
from raykd.data.uids import epoch_uid

NOTHING = np.empty(0, np.int64)


def fake_prompt_set(folder: Path, num_train: int, num_held_out: int, part_rows: int = 8) -> PromptSet:
    """An index without part files: all that planning reads."""
    folder.mkdir(parents=True, exist_ok=True)
    total = num_train + num_held_out
    held_out = np.arange(total) >= num_train
    names = [f"{'held_out' if held else 'train'}-{i // part_rows}.parquet" for i, held in enumerate(held_out)]
    columns = {"file": names, "row": np.arange(total, dtype=np.int32) % part_rows, "uid": np.arange(total) * 7 + 1}
    write_table(
        folder / "index.parquet", pa.table({**columns, "num_tokens": np.ones(total, np.int32), "held_out": held_out})
    )
    return PromptSet(str(folder), num_train, num_held_out, 0, 0, 0, num_train, 1.0, 1)


def test_uids_of_epochs_are_distinct_stable_and_not_negative():
    uid = np.random.default_rng(0).integers(0, 2**63 - 1, 1000)
    by_epoch = [epoch_uid(uid, epoch) for epoch in range(4)]
    assert (by_epoch[0] == uid).all()
    assert len(np.unique(np.concatenate(by_epoch))) == 4000
    assert min(values.min() for values in by_epoch) >= 0
    assert epoch_uid(np.array([5]), 1)[0] == by_epoch_of_five()


def by_epoch_of_five() -> int:
    """splitmix64(5 + golden ratio) >> 1 in plain integers."""
    x = (5 + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1


def test_an_epoch_has_held_out_rows_first_and_every_training_row_once_in_an_order_of_its_own(tmp_path, tiny_model_path):
    config = config_for(tmp_path, tiny_model_path, max_held_out=3)
    prompts = fake_prompt_set(tmp_path / "p", 100, 5)
    nothing_cached = TeacherCache(str(tmp_path), "f").index()
    plans = [plan_epoch(config, prompts, epoch, NOTHING, nothing_cached) for epoch in (0, 0, 1)]
    uid = prompts.index()["uid"].to_numpy()
    orders = [plan["epoch_uid"].to_numpy() for plan in plans]
    assert plans[0].schema == DESCRIPTOR_SCHEMA
    assert orders[0][:3].tolist() == orders[2][:3].tolist() == uid[100:103].tolist()
    assert np.sort(orders[0][3:]).tolist() == uid[:100].tolist() != orders[0][3:].tolist()
    assert orders[0].tolist() == orders[1].tolist(), "the order follows from seed and epoch"
    assert np.sort(orders[2][3:]).tolist() == np.sort(epoch_uid(uid[:100], 1)).tolist()
    assert np.argsort(orders[2][3:]).tolist() != np.argsort(orders[0][3:]).tolist()
    unshuffled = config_for(tmp_path, tiny_model_path, max_held_out=3, shuffle=False)
    assert (
        plan_epoch(unshuffled, prompts, 0, NOTHING, nothing_cached)["epoch_uid"].to_numpy()[3:].tolist()
        == uid[:100].tolist()
    )


def test_what_is_trained_is_left_out_and_the_rest_keeps_its_order(tmp_path, tiny_model_path):
    config = config_for(tmp_path, tiny_model_path)
    prompts = fake_prompt_set(tmp_path / "p", 50, 2)
    nothing_cached = TeacherCache(str(tmp_path), "f").index()
    whole = plan_epoch(config, prompts, 1, NOTHING, nothing_cached)["epoch_uid"].to_numpy()
    consumed = whole[2:22]
    rest = plan_epoch(config, prompts, 1, consumed, nothing_cached)["epoch_uid"].to_numpy()
    assert rest.tolist() == [*whole[:2].tolist(), *whole[22:].tolist()]
    assert plan_epoch(config, prompts, 0, consumed, nothing_cached).num_rows == 52, (
        "uids of another epoch are not this one's"
    )
    assert plan_epoch(config, prompts, 1, whole, nothing_cached).num_rows == 0, "validation alone is no reason to run"


def test_short_prompts_come_first_while_a_stage_lasts_and_every_prompt_comes_once():
    tokens = np.array([90, 10, 50, 20, 99, 30, 60, 15, 5, 70])
    step = np.arange(10) // 2  # two rows a step
    stages = [LengthStage(until_step=2, max_prompt_tokens=25), LengthStage(until_step=4, max_prompt_tokens=65)]
    order = short_first(tokens, step, stages)
    assert tokens[order].tolist() == [10, 20, 15, 5, 50, 30, 60, 90, 99, 70], "in each stage, and behind all, as drawn"
    assert short_first(tokens, step, []).tolist() == list(range(10))
    dry = short_first(np.array([9, 1, 9, 9]), np.arange(4), [LengthStage(until_step=3, max_prompt_tokens=2)])
    assert dry.tolist() == [1, 0, 2, 3], "a stage without rows ends early"


def test_the_length_curriculum_is_in_the_plan_of_an_epoch_and_goes_on_after_a_restart(tmp_path, tiny_model_path):
    limits = [{"until_step": 1, "max_prompt_tokens": 30}, {"until_step": 2, "max_prompt_tokens": 80}]
    config = config_for(tmp_path, tiny_model_path, length_stages=limits)
    prompts = fake_prompt_set(tmp_path / "p", 120, 0)
    index = prompts.index()
    tokens = np.arange(120, dtype=np.int32) + 1
    write_table(tmp_path / "p" / "index.parquet", index.set_column(3, "num_tokens", pa.array(tokens)))
    nothing_cached = TeacherCache(str(tmp_path), "f").index()
    of_uid = dict(zip(index["uid"].to_pylist(), tokens.tolist(), strict=True))
    plan = plan_epoch(config, prompts, 0, NOTHING, nothing_cached)
    planned = np.array([of_uid[uid] for uid in plan["uid"].to_pylist()])
    assert max(planned[:30]) == 30
    assert max(planned[:64]) <= 80 < max(planned[64:])
    assert len(set(planned.tolist())) == 120
    rest = plan_epoch(config, prompts, 0, plan["epoch_uid"].to_numpy()[:40], nothing_cached)
    assert rest["uid"].to_pylist() == plan["uid"].to_pylist()[40:]


def test_descriptors_are_small_whatever_the_prompts_are(tmp_path, tiny_model_path):
    prompts = fake_prompt_set(tmp_path / "p", 10_000, 0, part_rows=256)
    nothing_cached = TeacherCache(str(tmp_path), "f").index()
    assert plan_epoch(config_for(tmp_path, tiny_model_path), prompts, 0, NOTHING, nothing_cached).nbytes < 100 * 10_000
