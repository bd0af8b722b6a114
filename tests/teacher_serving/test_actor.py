"""The Ray Data stage: rows keep their columns, a dead actor's rows are answered by its successor."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.actor import BusyClock, TeacherActor, answer_block, teacher_stage
from teacher_serving.config import HfTeacherConfig, SamplingConfig
from teacher_serving.connect import connect
from teacher_serving.faults import VARIABLE, Fault
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, Teacher


@pytest.fixture(scope="module")
def config(tiny_model_path: Path) -> HfTeacherConfig:
    sampling = SamplingConfig(max_tokens=6, stop_token_ids=())
    return HfTeacherConfig(
        model=str(tiny_model_path), dtype="float32", device="cpu", top_k=5, sampling=sampling, max_model_len=64, batch_size=4
    )


@pytest.fixture(scope="module")
def teacher(config: HfTeacherConfig) -> Teacher:
    return connect(config)


def block_of(num_rows: int) -> pa.Table:
    """Prompts, every second one with recorded text, and a column that is none of the teacher's business."""
    ids = [[row % 50 + 1, 2, 3] for row in range(num_rows)]
    recorded = [[7, 8] if row % 2 else None for row in range(num_rows)]
    columns = {
        "uid": pa.array(range(num_rows), pa.int64()),
        "prompt_ids": pa.array(ids, pa.list_(pa.int32())),
        "recorded_ids": pa.array(recorded, pa.list_(pa.int32())),
        "messages_json": [f"conversation {row}" for row in range(num_rows)],
    }
    return pa.table(columns)


def test_recorded_text_is_scored_the_rest_is_written_and_other_columns_pass(teacher: Teacher):
    block = block_of(5)
    table = answer_block(teacher, block, BusyClock())
    assert table["uid"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["messages_json"].to_pylist() == block["messages_json"].to_pylist()
    assert table["finish_reason"].to_pylist() == ["length", "given"] * 2 + ["length"]
    assert table["output_ids"][1].as_py() == [7, 8]
    assert table.select(TEACHER_OUTPUT_SCHEMA.names).schema.equals(TEACHER_OUTPUT_SCHEMA)
    alone = teacher.generate(block.slice(4, 1).select(["uid", "prompt_ids"]))
    assert table["output_ids"][4] == alone["output_ids"][0]
    all_recorded = answer_block(teacher, block.filter(pa.array([False, True, False, True, False])), BusyClock())
    assert all_recorded["uid"].to_pylist() == [1, 3]


def test_rows_that_have_their_answer_are_left_alone(teacher: Teacher):
    answered = answer_block(teacher, block_of(6), BusyClock())
    nothing_asked = answer_block(cast(Teacher, _Refuses()), answered, BusyClock())
    assert nothing_asked.drop_columns("teacher_seconds").equals(answered.drop_columns("teacher_seconds"))
    assert nothing_asked["teacher_seconds"].to_pylist() == [0.0] * 6
    known = pa.array([row % 3 == 0 for row in range(6)])
    columns = {
        field.name: pa.array(
            [
                value if keep else None
                for value, keep in zip(answered[field.name].to_pylist(), known.to_pylist(), strict=True)
            ],
            field.type,
        )
        for field in TEACHER_OUTPUT_SCHEMA
        if field.name not in ("uid", "prompt_ids")
    }
    half_known = block_of(6)
    for name, column in columns.items():
        half_known = half_known.append_column(name, column)
    table = answer_block(teacher, half_known, BusyClock())
    assert table["uid"].to_pylist() == list(range(6))
    assert table["output_ids"].to_pylist() == answered["output_ids"].to_pylist()
    assert (np.array(table["teacher_seconds"].to_pylist()) == 0.0).tolist() == known.to_pylist()


def test_busy_and_idle_time_are_dealt_out_once_however_calls_overlap():
    clock = BusyClock(now=iter([0.0, 0.5, 1.0, 3.0, 4.0, 10.0]).__next__)
    idle = [clock.start(), clock.start()]
    busy = [clock.stop(), clock.stop()]
    idle.append(clock.start())
    busy.append(clock.stop())
    assert idle == [0.0, 0.0, 1.0]
    assert busy == [1.0, 2.0, 6.0]


def test_an_actor_whose_engine_is_dead_ends_its_process_at_once():
    program = """
import itertools
from types import SimpleNamespace
import pyarrow as pa
from teacher_serving.actor import BusyClock, TeacherActor
from teacher_serving.types import TeacherDeadError

class Dead:
    def generate(self, prompts):
        raise TeacherDeadError("killed")

actor = TeacherActor.__new__(TeacherActor)
actor._teacher, actor._busy, actor._calls, actor._faults, actor._delay_s = Dead(), BusyClock(), itertools.count(1), [], 0.0
actor._life = SimpleNamespace(is_hopeless=False, ends=print)
try:
    actor(pa.table({"uid": [1], "prompt_ids": [[1]]}))
finally:
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "its engine is dead: killed" in ended.stderr
    assert "still here" not in ended.stdout


def test_every_call_has_its_number_for_planned_faults_though_calls_overlap():
    numbers = []

    class Noted:
        action = "exit"

        def strikes(self, batch: int) -> bool:
            numbers.append(batch)
            return False

    actor = TeacherActor.__new__(TeacherActor)
    actor._calls, actor._delay_s = itertools.count(1), 0.05
    actor._faults = cast("list[Fault | None]", [Noted()])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: actor._fail_on_purpose(), range(8)))
    assert sorted(numbers) == list(range(1, 9))


@pytest.mark.ray
def test_the_rows_of_a_dead_actor_are_answered_by_the_next(ray_cluster, config, tmp_path, monkeypatch):
    import ray.data

    monkeypatch.setenv(VARIABLE, f"teacher:exit@batch=3;once={tmp_path / 'struck'}")
    config = config.model_copy(update={"max_restarts": 1})  # a teacher that answers in between may end more often
    rows = teacher_stage(ray.data.from_arrow(block_of(20)), config).take_all()
    assert (tmp_path / "struck").exists()
    assert sorted(row["uid"] for row in rows) == list(range(20))
    assert {row["messages_json"] for row in rows} == {f"conversation {row}" for row in range(20)}
    assert {row["finish_reason"] for row in rows} == {"length", "given"}


@pytest.mark.ray
@pytest.mark.long
def test_a_slow_teacher_does_not_hold_up_the_other(ray_cluster, config, tmp_path, monkeypatch):
    """Of two teachers one takes three seconds longer for each of 20 calls: the other answers nearly all."""
    import ray.data

    monkeypatch.setenv(VARIABLE, f"teacher:slow@ms=3000;once={tmp_path / 'slow'}")
    config = config.model_copy(update={"num_replicas": 2, "concurrent_batches": 1, "num_cpus": 0.5})
    blocks = [block_of(80).slice(start, 4) for start in range(0, 80, 4)]
    rows = teacher_stage(ray.data.from_arrow(blocks), config).take_all()
    assert len({row["uid"] for row in rows}) == 80
    # A slow actor's delay passes as if nothing had been given to it: it shows as waiting, except in its first call.
    slow = sum(4 * row["teacher_wait_seconds"] >= 2.9 for row in rows)
    assert slow <= 20


@pytest.mark.ray
@pytest.mark.long
def test_a_teacher_that_never_lives_to_answer_ends_the_run_with_the_reason(ray_cluster, config, monkeypatch):
    import ray.data

    monkeypatch.setenv(VARIABLE, "teacher:exit@batch=1")
    config = config.model_copy(update={"max_restarts": 1})
    with pytest.raises(Exception, match="a teacher ended 2 times in a row before .*max_restarts=1 allows 1"):
        teacher_stage(ray.data.from_arrow(block_of(4)), config).take_all()


class _Refuses:
    """A teacher that must not be asked anything."""

    def generate(self, prompts: pa.Table) -> pa.Table:
        assert prompts.num_rows == 0
        return TEACHER_OUTPUT_SCHEMA.empty_table()

    score = generate
