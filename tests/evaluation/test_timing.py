"""Speed by a clock of the test's own: what is measured, in which order, and that calls that never come are not dropped."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from raykd.evaluation import timing
from raykd.evaluation.timing import Speed, Timing, speed_facts, time_prompts

NUM_TOKENS = 6


class Clock:
    """An engine that reads a new prompt in 1 s and one it knows in 0.25 s, and writes a token in 0.1 s."""

    def __init__(self):
        self.now = 0.0
        self.read: list[list[int]] = []
        self.info = None

    def generate(self, prompts: pa.Table) -> pa.Table:
        (prompt,) = prompts["prompt_ids"].to_pylist()
        limit = prompts["max_tokens"][0].as_py() if "max_tokens" in prompts.column_names else NUM_TOKENS
        self.now += (0.25 if prompt in self.read else 1.0) + 0.1 * (limit - 1)
        self.read.append(prompt)
        return pa.table({"output_ids": [[7] * limit]})


def test_first_tokens_are_timed_with_prompts_that_the_engine_has_not_seen(monkeypatch):
    engine: Any = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: engine.now)
    prompts = pa.table({"uid": [0, 1], "prompt_ids": pa.array([[1, 2, 3], [4, 5]], pa.list_(pa.int32()))})
    timings = time_prompts(engine, prompts)
    assert [tuple(own) for own in timings] == [pytest.approx((1.0, 0.1))] * 2
    assert engine.read == [[3, 2, 1], *[[1, 2, 3]] * 3, *[[4, 5]] * 3]  # the warm-up is the beginning of none
    assert time_prompts(engine, prompts.slice(0, 0)) == []


def test_the_time_of_a_call_that_never_comes_is_infinite_and_counts():
    timings = [Timing(0.2, 0.01), Timing(0.4, 0.0), Timing(0.3, 0.01)]  # the second wrote a single token
    facts = speed_facts(Speed(timings, seconds=4.0, machine="m"), 1000, [11.0, math.inf, 21.0])
    assert facts == pytest.approx(
        {
            "tokens_per_s": 250.0,
            "first_token_s": 0.3,
            "first_token_s_p95": 0.4,
            "first_call_s": 0.5,  # of 0.3, 0.5 and infinity
            "first_call_s_p95": math.inf,
        }
    )
    without_calls = speed_facts(Speed(timings, seconds=4.0, machine="m"), 1000, [])
    assert set(without_calls) == {"tokens_per_s", "first_token_s", "first_token_s_p95"}
    assert speed_facts(Speed([], seconds=1.0, machine="m"), 10, []) == {"tokens_per_s": 10.0}
