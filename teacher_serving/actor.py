"""The Ray Data stage that hosts a teacher: blocks of prompts in, the same rows with the teacher's answers out.

In:  blocks with `uid` and `prompt_ids`; optionally `recorded_ids` (list<int32>: text to score, null where the teacher
     shall write), the columns of TEACHER_OUTPUT_SCHEMA (rows whose `topk_ids` are not null have their answer already),
     and any other columns.
Out: the other columns, those of TEACHER_OUTPUT_SCHEMA, and two times of the row's actor: `teacher_seconds` that it took,
     `teacher_wait_seconds` that the actor had stood idle before (nothing was given to it: what comes behind is slower).
     Summed over rows: the time the teachers were busy, the time they waited. 0 for rows that came answered.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pydantic import SecretStr
from ray.data import ActorPoolStrategy, Dataset

from teacher_serving.config import LocalTeacherConfig, TeacherConfig
from teacher_serving.connect import connect, cpu_environment, resolve_device
from teacher_serving.faults import VARIABLE as FAULT_VARIABLE
from teacher_serving.faults import planned_delay, planned_fault
from teacher_serving.lives import Life, record_of_lives
from teacher_serving.types import FOR_TEACHER, TEACHER_OUTPUT_SCHEMA, Teacher, TeacherDeadError

TIME_SCHEMA = pa.schema([("teacher_seconds", pa.float32()), ("teacher_wait_seconds", pa.float32())])


def teacher_environment(config: TeacherConfig | None = None) -> dict[str, str]:
    """What this process's environment says to teachers, whose processes have another: vLLM's settings, planned faults, and
    the API keys where `config` names any."""
    wanted = {FAULT_VARIABLE, *(config.api_key_names if config is not None else ())}
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_") or name in wanted}


def take_keys(config: TeacherConfig, environment: Mapping[str, str]) -> None:
    """Put the API keys that the user's `teacher_environment` holds into this process's own, where `describe` looks for
    them."""
    os.environ.update({name: environment[name] for name in config.api_key_names if name in environment})


def teacher_stage(
    dataset: Dataset, config: TeacherConfig, environment: Mapping[str, str] | None = None, ledger: Path | None = None
) -> Dataset:
    """The dataset with every row answered by a pool of teacher actors.

    A block is what one call answers, and what flows on when it is done: give blocks of `batch_size` rows. `environment`:
    the `teacher_environment` of the user's process; None: of this one. `ledger`: see `connect`.
    """
    config = resolve_device(config, has_gpu=ray.cluster_resources().get("GPU", 0) > 0)
    variables = cpu_environment(config) if isinstance(config, LocalTeacherConfig) and config.device == "cpu" else {}
    variables |= teacher_environment(config) if environment is None else environment
    keys = {name: SecretStr(variables.pop(name)) for name in config.api_key_names if name in variables}
    may_grow = (config.max_replicas or config.num_replicas) > config.num_replicas
    # Ray adds an actor only where calls queue; without that, none wait and the teacher's lead stays short.
    calls_at_once = (2 if may_grow else 1) * config.concurrent_batches
    return dataset.map_batches(
        TeacherActor,
        fn_constructor_args=(config, calls_at_once, record_of_lives()),
        # Keys go this way because Ray shows the environment of its actors.
        fn_constructor_kwargs={"ledger": ledger, "keys": keys},
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=config.num_replicas,
            max_size=config.max_replicas or config.num_replicas,
            max_concurrent_calls_per_actor=config.concurrent_batches,
            max_tasks_in_flight_per_actor=calls_at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.gpus_per_actor,
        label_selector=config.node_labels,
        runtime_env={"env_vars": variables},
    )


class TeacherActor:
    """Hosts one teacher for Ray Data. Called from several threads at once; dies with its engine."""

    def __init__(
        self,
        config: TeacherConfig,
        calls_at_once: int,
        record: Any,
        *,
        ledger: Path | None = None,
        keys: Mapping[str, SecretStr] = MappingProxyType({}),
    ) -> None:
        """`record` (lives.py): how often the actors of this pool ended before they had answered. `ledger`: see `connect`.
        `keys`: what the environment variables hold that the config names."""
        self._life = Life(record, config.max_restarts, calls_at_once)
        if self._life.is_hopeless:
            return  # an error here would have Ray start the next actor; the first call tells
        os.environ.update({name: key.get_secret_value() for name, key in keys.items()})
        self._teacher = connect(config, ledger=ledger)
        self._teacher.probe()
        self._busy = BusyClock()
        self._calls = itertools.count(1)  # counts right on several threads
        self._faults = [planned_fault("teacher", action) for action in ("exit", "engine_kill")]
        self._delay_s = planned_delay("teacher")

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block's rows in their order, each with its answer. Errors: TeacherLostError when it ended too often."""
        if self._life.is_hopeless:
            raise self._life.refuse()
        self._fail_on_purpose()
        try:
            answers = answer_block(self._teacher, block, self._busy)
        except TeacherDeadError as error:
            # Only the death of the process makes Ray start another and give it this block again: an exception would
            # fail the job, and a clean exit would leave a hole in the pool.
            print(f"teacher actor {os.getpid()} ends, its engine is dead: {error}", file=sys.stderr, flush=True)
            self._life.ends(f"its engine is dead: {error}")
            os._exit(1)
        self._life.answered()
        return answers

    def _fail_on_purpose(self) -> None:
        number = next(self._calls)
        time.sleep(self._delay_s)
        for fault in self._faults:
            if fault is None or not fault.strikes(batch=number):
                continue
            if fault.action == "exit":
                os._exit(1)
            children = multiprocessing.active_children()
            assert children, "teacher:engine_kill needs an engine in a process of its own"
            for child in children:
                os.kill(child.pid or 0, signal.SIGKILL)


def answer_block(teacher: Teacher, block: pa.Table, busy: BusyClock) -> pa.Table:
    """The block's rows in their order, with the teacher's columns; rows that have their answer keep it."""
    others = [name for name in block.column_names if name not in (*TEACHER_OUTPUT_SCHEMA.names, *TIME_SCHEMA.names)]
    answered = np.zeros(block.num_rows, bool)
    if "topk_ids" in block.column_names:
        answered = block.column("topk_ids").is_valid().to_numpy(zero_copy_only=False)
    open_rows = block.filter(pa.array(~answered))
    old = block.filter(pa.array(answered))
    with_answers = open_rows.select(others)
    waited = busy.start()
    try:
        answers = ask(teacher, open_rows)
    finally:
        seconds = busy.stop()
    for field in TEACHER_OUTPUT_SCHEMA:
        with_answers = with_answers.append_column(field, answers.column(field.name))
    for field, total in zip(TIME_SCHEMA, (seconds, waited), strict=True):
        share = np.full(open_rows.num_rows, total / max(1, open_rows.num_rows), np.float32)
        with_answers = with_answers.append_column(field, pa.array(share))
    if not old.num_rows:
        return with_answers
    kept = old.select([*others, *TEACHER_OUTPUT_SCHEMA.names])
    for field in TIME_SCHEMA:
        kept = kept.append_column(field, pa.array(np.zeros(old.num_rows, np.float32)))
    return _in_order(with_answers, kept.cast(with_answers.schema), second=answered)


def ask(teacher: Teacher, rows: pa.Table) -> pa.Table:
    """The teacher's answers to rows of `uid`, `prompt_ids` and maybe `recorded_ids` and `for_teacher`, as
    TEACHER_OUTPUT_SCHEMA in the order of the rows: recorded text is scored, the others are written."""
    asked = [name for name in ("uid", "prompt_ids", FOR_TEACHER) if name in rows.column_names]
    if "recorded_ids" not in rows.column_names:
        return teacher.generate(rows.select(asked))
    recorded = rows.column("recorded_ids").is_valid().to_numpy(zero_copy_only=False)
    prompts = rows.filter(pa.array(~recorded)).select(asked)
    sequences = rows.filter(pa.array(recorded)).select([*asked, "recorded_ids"])
    written = teacher.generate(prompts)
    scored = teacher.score(sequences.rename_columns([*asked, "output_ids"]))
    return _in_order(written, scored, second=recorded)


def _in_order(first: pa.Table, second_rows: pa.Table, *, second: np.ndarray) -> pa.Table:
    """One table of both, in the order that `second` ([rows] bool: this row is the next of the second) tells."""
    together = pa.concat_tables([first, second_rows])
    place = np.concatenate((np.flatnonzero(~second), np.flatnonzero(second)))  # of each row of `together`
    return together.take(pa.array(np.argsort(place))) if second.any() and not second.all() else together


class BusyClock:
    """Wall time during which at least one call ran, dealt out to the calls as they end. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._num_running = 0
        self._dealt_until: float | None = None

    def start(self) -> float:
        """A call begins: seconds since the last one ended; 0 for the first, and while others run."""
        with self._lock:
            now = self._now()
            idle = 0.0
            if self._num_running == 0:
                idle = 0.0 if self._dealt_until is None else now - self._dealt_until
                self._dealt_until = now
            self._num_running += 1
            return idle

    def stop(self) -> float:
        """A call ends: seconds of busy time since the last one did, or since the clock began to run."""
        with self._lock:
            now = self._now()
            assert self._dealt_until is not None, "no call has started"
            seconds, self._dealt_until = now - self._dealt_until, now
            self._num_running -= 1
            return seconds
