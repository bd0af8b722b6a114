"""The stream of an epoch: every prompt once, in order where asked, through crashes; answers kept; a lead that is bounded."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prompt_helpers import answers, config_for, conversation, prepare, write_lines

from raykd.config import Config
from raykd.data.cache import TeacherCache
from raykd.data.examples import example_from_row
from raykd.data.prompt_rows import PROMPT_ROW_SCHEMA
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
    teacher_cache,
)
from raykd.data.uids import epoch_uid
from raykd.training.mishaps import users_mistake
from raykd.types import EXAMPLE_SCHEMA
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA
from tests.moved_ids import save_moved

NOTHING = np.empty(0, np.int64)


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


@contextlib.contextmanager
def no_cpu_left() -> Iterator[None]:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": ray.available_resources()["CPU"]}])
    assert group.wait(60)
    yield
    remove_placement_group(group)


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
    with no_cpu_left():  # as where the train workers, which begin first, have the last of a smaller cluster
        dataset = build_dataset(config, prompt_set, 0, consumed)
    rows = rows_of(dataset)
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
