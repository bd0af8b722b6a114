"""A run without its models: stand-ins take the place of teacher and student, everything between them is real.

In:  a Config with `simulate`. Out: the Config that runs on any machine; the time that a step would have taken.

The teacher's stand-in is a teacher like any other (teacher_serving/simulated.py). The student's is a student like any other,
of the same vocabulary and as many layers but hardly any width: it is made, saved and loaded; where a step is due, the worker
sleeps. So prompts, stream, extractors, store, collate, ledger, checkpoints, restarts and metrics are those of the real run;
losses and weights are not there, and the exchange of gradients over the network is not either.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from raykd.config import Config
from raykd.types import Batch
from teacher_serving.config import LocalTeacherConfig, SimulatedTeacherConfig

CPUS = 0.01
"""Logical CPUs of a stand-in: it sleeps."""


def with_stand_ins(config: Config) -> Config:
    """The config with what `simulate` names replaced; as it is where nothing is, or where it has been done."""
    values = config.model_dump()
    if config.simulates("teacher"):
        values["teacher"] = stand_in_teacher(config).model_dump()
    if config.simulates("step"):
        values["student"] |= {"stand_in": True, "attention": "sdpa"}
        values["train"] |= {"use_gpu": False, "cpus_per_worker": CPUS, "threads_per_worker": 1}
    return Config.model_validate(values)


def stand_in_teacher(config: Config) -> SimulatedTeacherConfig:
    """The teacher that answers in the place of the config's: its pool and its sampling, the payload and rate of `rates`."""
    teacher, rates = config.teacher, config.rates
    kept = teacher.model_dump(include=set(LocalTeacherConfig.model_fields))
    stand_in = {
        "model": teacher.tokenizer_folder,
        "device": "cpu",
        "num_cpus": CPUS,
        "num_gpus": None,
        "threads": 1,
        "tokens_per_s": rates.teacher_tokens_per_s,
        "response_tokens": rates.response_tokens,
    }
    return SimulatedTeacherConfig.model_validate(kept | stand_in)


def sleep_as_if_trained(batches: Sequence[Batch], tokens_per_s: float) -> None:
    """Take as long as a worker of this rate takes for forward and backward over all tokens but padding."""
    time.sleep(sum(int(batch.attention_mask.sum()) for batch in batches) / tokens_per_s)
