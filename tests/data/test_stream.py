"""The stream of an epoch: every prompt once, in order where asked, through crashes; answers kept; a lead that is bounded."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prompt_helpers import answers, conversation, prepare, write_lines

from raykd.config import Config, LengthStage
from raykd.data.cache import TeacherCache
from raykd.data.examples import example_from_row
from raykd.data.prompt_rows import PROMPT_ROW_SCHEMA, write_table
from raykd.data.readers import DataError
from raykd.data.sources import PromptSet, prepare_prompts
from raykd.data.stream import (
    DESCRIPTOR_SCHEMA,
    Extractor,
    Prompts,
    Rejects,
    build_dataset,
    bytes_per_token,
    example_stream,
    plan_epoch,
    short_first,
    teacher_cache,
)
from raykd.data.uids import epoch_uid
from raykd.training.distributed import users_mistake
from raykd.types import EXAMPLE_SCHEMA
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA
from tests.moved_ids import save_moved

NOTHING = np.empty(0, np.int64)


def config_for(tmp_path: Path, model: Path, *, teacher: dict[str, Any] | None = None, **data: Any) -> Config:
    own = {"kind": "hf", "model": str(model), "device": "cpu", "top_k": 4, "batch_size": 4, "sampling": {"max_tokens": 6}}
    return Config.model_validate(
        {
            "run": {"name": "run", "dir": str(tmp_path), "seed": 3},
            "teacher": own | (teacher or {}),
            "student": {"model": str(model)},
            "data": {"prompts": str(tmp_path / "train.jsonl"), **data},
        }
    )


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


# --- planning: pure ---


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


# --- stages, called as Ray would ---


def prompt_blocks(tmp_path: Path, model: Path, count: int) -> tuple[PromptSet, pa.Table]:
    """Prepared prompts and their descriptors in source order, nothing cached."""
    result = prepare(tmp_path, [conversation(f"q{i}", id=f"r{i}") for i in range(count)], model)
    descriptors = pa.table(
        {
            "uid": result.uid,
            "epoch_uid": epoch_uid(result.uid, 1),
            "step": np.zeros(count, np.int32),
            "file": ["train-0-00000.parquet"] * count,
            "row": np.arange(count, dtype=np.int32),
            "cache_file": pa.nulls(count, pa.string()),
            "cache_row": np.full(count, -1, np.int32),
        },
        schema=DESCRIPTOR_SCHEMA,
    )
    return PromptSet(str(tmp_path), count, 0, 0, 0, 0, 0, 0.0, 0), descriptors


def test_cached_rows_get_their_answers_and_the_others_null(tmp_path, tiny_model_path):
    prompt_set, block = prompt_blocks(tmp_path, tiny_model_path, 5)
    cache = TeacherCache(str(tmp_path / "cache"), "f")
    uid = Prompts(prompt_set.folder, cache)(block)["uid"].to_pylist()
    kept = answers([uid[3], uid[0]])
    cache.write(kept)
    index = cache.index()
    file, row = index.lookup(np.array(uid))
    names = pa.array([index.files[i] if i >= 0 else None for i in file], pa.string())
    for name, values in {"cache_file": names, "cache_row": pa.array(row)}.items():
        block = block.set_column(block.column_names.index(name), name, values)
    rows = Prompts(prompt_set.folder, cache)(block)
    assert rows["cached"].to_pylist() == [True, False, False, True, False]
    assert rows["topk_ids"].is_valid().to_pylist() == rows["cached"].to_pylist()
    assert rows["output_ids"].to_pylist()[0] == kept["output_ids"].to_pylist()[1]
    assert rows["output_ids"].to_pylist()[3] == kept["output_ids"].to_pylist()[0]
    assert rows["uid"].to_pylist() == uid


def answer_rows(rows: pa.Table, *, failing: tuple[int, ...] = (), fingerprint: str = "f") -> pa.Table:
    """A block as it leaves the teacher; the rows of these numbers have no answer."""
    made = answers(rows["uid"].to_pylist(), fingerprint).to_pylist()
    for number in failing:
        made[number] |= {"finish_reason": "error: nothing", "output_ids": [], "topk_ids": [], "topk_logprobs": []}
        made[number] |= {"log_tail": [], "sampled_logprob": []}
    table = pa.Table.from_pylist(made, schema=TEACHER_OUTPUT_SCHEMA)
    for name in set(TEACHER_OUTPUT_SCHEMA.names) - set(PROMPT_ROW_SCHEMA.names):
        rows = rows.set_column(rows.column_names.index(name), name, table[name])
    seconds = pa.array(np.arange(1, rows.num_rows + 1, dtype=np.float32))
    return rows.append_column("teacher_seconds", seconds).append_column("teacher_wait_seconds", seconds)


def test_an_extractor_keeps_answers_books_rows_without_one_and_gives_the_uids_of_the_epoch(tmp_path, tiny_model_path):
    prompt_set, block = prompt_blocks(tmp_path, tiny_model_path, 5)
    cache = TeacherCache(str(tmp_path / "cache"), "f")
    rejects = Rejects(str(tmp_path / "rejected.jsonl"), num_rows=10, num_rejected=0, limit=0.1)
    rows = answer_rows(Prompts(prompt_set.folder, cache)(block), failing=(2,))
    extractor = Extractor(config_for(tmp_path, tiny_model_path), cache, rejects)
    examples = extractor(rows)
    assert examples.schema == EXAMPLE_SCHEMA
    assert examples["uid"].to_pylist() == [uid for i, uid in enumerate(block["epoch_uid"].to_pylist()) if i != 2]
    assert examples["teacher_seconds"].to_pylist() == examples["teacher_wait_seconds"].to_pylist() == [1, 2, 4, 5]
    uid = rows["uid"].to_pylist()
    assert cache.index().uid.tolist() == sorted(uid[:2] + uid[3:])
    entry = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert (entry["key"], entry["uid"]) == ("r2", uid[2])
    assert "nothing" in entry["reason"]
    (tmp_path / "rejected.jsonl").write_text('{"file": "a", "line": 1, "reason": "left out"}\n' + json.dumps(entry) + "\n")
    extractor(rows)  # tried again after a crash: the same row is not counted twice
    with pytest.raises(DataError, match=r"2 of 10 rows are unusable.*max_rejected_fraction=0.1"):
        extractor(answer_rows(Prompts(prompt_set.folder, cache)(block), failing=(2, 3)))


def test_a_student_of_other_ids_and_more_tokens_gets_the_examples_in_its_own_ids(tmp_path, tiny_model_path):
    places = save_moved(tmp_path / "moved", tiny_model_path)
    num_ids = len(places)  # of the teacher; its head may have more rows
    prompt_set, block = prompt_blocks(tmp_path, tiny_model_path, 5)
    cache = TeacherCache(str(tmp_path / "cache"), "f")
    rows = answer_rows(Prompts(prompt_set.folder, cache)(block))
    column = rows["topk_ids"].combine_chunks()
    ids = column.flatten().to_numpy().copy()
    ids[::3] = num_ids + np.arange(len(ids[::3])) % 3  # padding: the very ids that a student's new tokens have
    place = rows.column_names.index("topk_ids")
    rows = rows.set_column(place, "topk_ids", pa.ListArray.from_arrays(column.offsets, pa.array(ids, pa.int32())))

    def extract(**student: Any) -> pa.Table:
        config = config_for(tmp_path, tiny_model_path)
        config = Config.model_validate(config.model_dump() | {"student": {"model": str(tiny_model_path), **student}})
        rejects = Rejects(str(tmp_path / "rejected.jsonl"), num_rows=10, num_rejected=0, limit=0.0)
        return Extractor(config, cache, rejects)(rows)

    plain = extract()
    assert plain["topk_ids"].combine_chunks().flatten().to_numpy().max() < num_ids
    assert plain["log_tail"].combine_chunks().flatten().to_numpy().min() > -1.5, "padding has gone to the tail"
    grown = extract(new_tokens={"<x>": "", "<y>": "", "<z>": ""})
    moved = extract(model=str(tmp_path / "moved"))
    for index in range(plain.num_rows):
        expected = example_from_row(plain, index)
        assert repr(example_from_row(grown, index)) == repr(expected)
        ids = {name: places[getattr(expected, name)].astype(np.int32) for name in ("input_ids", "topk_ids")}
        assert repr(example_from_row(moved, index)) == repr(replace(expected, **ids))
    lacking = json.loads((tiny_model_path / "tokenizer.json").read_text())
    lacking["added_tokens"].pop()
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="different vocabularies"):
        extract(model=str(tmp_path / "moved"))


# --- on a cluster ---


def rows_of(dataset) -> pa.Table:
    return pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def no_teacher(dataset):
    raise AssertionError("a teacher was asked for although everything is cached")


@pytest.mark.ray
def test_a_killed_teacher_loses_and_repeats_nothing_and_later_epochs_have_no_teacher(
    tmp_path, tiny_model_path, ray_cluster, monkeypatch
):
    write_lines(tmp_path / "train.jsonl", [conversation(f"what is {i}?", id=f"r{i}") for i in range(40)])
    write_lines(tmp_path / "held.jsonl", [conversation(f"held {i}") for i in range(3)])
    config = config_for(tmp_path, tiny_model_path, held_out=str(tmp_path / "held.jsonl"), fixed_order=True)
    prompt_set = prepare_prompts(config, tmp_path / "run")
    cache = teacher_cache(config, prompt_set)
    order = plan_epoch(config, prompt_set, 0, NOTHING, cache.index())["epoch_uid"].to_numpy()
    consumed = order[3:15]

    monkeypatch.setenv("RAYKD_FAULT", f"teacher:exit@batch=3;once={tmp_path / 'struck'}")
    rows = rows_of(build_dataset(config, prompt_set, 0, consumed))
    assert (tmp_path / "struck").exists(), "the teacher was to be killed"
    assert rows.schema == EXAMPLE_SCHEMA
    assert rows["uid"].to_pylist() == [*order[:3].tolist(), *order[15:].tolist()], "each once, in the planned order"
    assert rows["held_out"].to_pylist() == [True] * 3 + [False] * 28
    assert set(rows["top_k"].to_pylist()) == {4}
    assert min(rows["teacher_seconds"].to_pylist()) > 0
    assert not np.isin(consumed, cache.index().uid).any(), "what is trained is not asked again"
    assert len(cache.index().uid) == 31

    again = rows_of(example_stream(config, prompt_set, 0, consumed, no_teacher))
    from_cache, from_teacher = ([repr(example_from_row(table, i)) for i in range(31)] for table in (again, rows))
    assert from_cache == from_teacher  # by repr: NaN, for unknown, is not equal to itself
    assert set(again["teacher_seconds"].to_pylist()) == {0.0}


@pytest.mark.ray
def test_a_teacher_that_gives_nothing_for_too_many_prompts_ends_the_stream_as_the_users_mistake(
    tmp_path, tiny_model_path, ray_cluster
):
    import ray.cloudpickle

    for name in (__name__, answers.__module__):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # workers cannot import these files
    write_lines(tmp_path / "train.jsonl", [conversation(f"q{i}", id=f"r{i}") for i in range(8)])
    config = config_for(tmp_path, tiny_model_path, max_rejected_fraction=0.2, fixed_order=True)
    prompt_set = prepare_prompts(config, tmp_path / "run")
    fingerprint = teacher_cache(config, prompt_set).fingerprint

    def half(dataset):
        answered = partial(answer_rows, failing=(0, 1), fingerprint=fingerprint)
        return dataset.map_batches(answered, batch_size=4, batch_format="pyarrow")

    (shard,) = example_stream(config, prompt_set, 0, NOTHING, half).streaming_split(1, equal=False)  # as in training
    with pytest.raises(Exception, match="are unusable") as error:
        list(shard.iter_batches(batch_size=4, batch_format="pyarrow"))
    mistake = users_mistake(error.value)
    assert isinstance(mistake, DataError)
    # Two of the rows of each of two blocks, which Ray may hand on as one.
    words = r"[24] of 8 rows are unusable, more than data\.max_rejected_fraction=0\.2 allows; the last: "
    assert re.match(words, str(mistake))
    assert "error: nothing" in (tmp_path / "run" / "rejected.jsonl").read_text()


class FastTeacher:
    """A teacher that never tires: 32 tokens of K=64 a row, counted as they are made."""

    K = 64
    TOKENS = 32

    def __init__(self, counter, fingerprint: str) -> None:
        self._counter, self._fingerprint = counter, fingerprint

    def __call__(self, rows: pa.Table) -> pa.Table:
        import ray

        count, size = rows.num_rows, self.TOKENS * self.K
        ray.get(self._counter.add.remote(count * self.TOKENS))

        def lists(length: int, dtype: Any) -> pa.ListArray:
            return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * length, np.ones(count * length, dtype))

        made = {
            "output_ids": lists(self.TOKENS, np.int32),
            "topk_ids": lists(size, np.int32),
            "topk_logprobs": lists(size, np.float16),
            "log_tail": lists(self.TOKENS, np.float32),
            "sampled_logprob": lists(self.TOKENS, np.float32),
            "top_k": pa.array([self.K] * count, pa.int32()),
            "finish_reason": pa.array(["length"] * count),
            "teacher_id": pa.array(["fast"] * count),
            "teacher_fingerprint": pa.array([self._fingerprint] * count),
            "weight_version": pa.array(["0"] * count),
        }
        for name, column in made.items():
            rows = rows.set_column(rows.column_names.index(name), name, column)
        return rows


@pytest.mark.ray
def test_the_teacher_leads_a_slow_trainer_by_the_bound_and_the_batches_in_flight_at_most(
    tmp_path, tiny_model_path, ray_cluster
):
    import ray
    import ray.cloudpickle
    from ray.data import ActorPoolStrategy

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

    @ray.remote(num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self.made = 0

        def add(self, tokens: int) -> None:
            self.made += tokens

        def get(self) -> int:
            return self.made

    write_lines(tmp_path / "train.jsonl", [conversation(f"q{i}") for i in range(160)])
    batch_tokens = 4 * FastTeacher.TOKENS
    bound = 6 * batch_tokens
    config = config_for(tmp_path, tiny_model_path, teacher={"top_k": 64}, max_lead_tokens=bound)
    prompt_set = prepare_prompts(config, tmp_path / "run")
    counter = Counter.remote()

    def stage(dataset):
        return dataset.map_batches(
            FastTeacher,
            fn_constructor_args=(counter, teacher_cache(config, prompt_set).fingerprint),
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2),
            num_cpus=0.5,
        )

    (shard,) = example_stream(config, prompt_set, 0, NOTHING, stage).streaming_split(1, equal=False)
    taken, leads = 0, []
    blocks = shard.iter_batches(batch_size=4, batch_format="pyarrow", prefetch_batches=1)
    for number, block in enumerate(blocks):
        taken += len(block) * FastTeacher.TOKENS
        if number < 3:
            time.sleep(2.0)  # time in which an unbounded teacher would be through with all prompts
        made: Any = ray.get(counter.get.remote())
        leads.append(made - taken)
    assert taken == 160 * FastTeacher.TOKENS
    assert bytes_per_token(64) * bound < 2**20, "below what Ray Data itself would allow"
    assert max(leads) <= bound + 2 * batch_tokens, f"{max(leads)} tokens ahead, bound {bound}"
    assert max(leads[:3]) >= batch_tokens, "the teacher does run ahead"
