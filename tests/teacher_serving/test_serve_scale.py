"""How many engines a shared teacher has: as many as there is work for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray import serve

from teacher_serving.config import HfTeacherConfig, SamplingConfig, ServedTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.serve_config import ENGINES
from tests.shared_teacher import shared_teacher

DEADLINE_S = 180.0
NUM_CLIENTS = 6


def wait_for_engines(app: str, number: int) -> None:
    """Until so many run."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := num_engines(app)) != number:
        assert time.monotonic() < deadline, f"{found} engines, {number} expected"
        time.sleep(0.2)


def num_engines(app: str) -> int:
    states = serve.status().applications[app].deployments[ENGINES].replica_states
    return sum(count for state, count in states.items() if getattr(state, "value", state) == "RUNNING")


@pytest.mark.ray
@pytest.mark.long
def test_engines_come_where_there_is_work_and_go_when_it_is_done(ray_cluster: None, tiny_model_path: Path):
    engine = HfTeacherConfig(
        model=str(tiny_model_path), dtype="float32", device="cpu", top_k=8, max_model_len=256, max_replicas=2
    )
    sampling = SamplingConfig(max_tokens=200, stop_token_ids=())
    rows = pa.table({"uid": np.arange(4), "prompt_ids": pa.array([[5, 6, 7]] * 4, pa.list_(pa.int32()))})
    delays = {"upscale_delay_s": 1.0, "downscale_delay_s": 2.0}
    with shared_teacher(teacher=engine, target_ongoing_requests=1.0, **delays) as config:
        client = connect(ServedTeacherConfig(app=config.app, tokenizer=engine.model, top_k=8, sampling=sampling))
        assert num_engines(config.app) == 1
        is_enough = threading.Event()

        def work() -> None:
            while not is_enough.is_set():
                assert set(client.generate(rows)["finish_reason"].to_pylist()) == {"length"}

        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            working = [threads.submit(work) for _ in range(NUM_CLIENTS)]
            try:
                wait_for_engines(config.app, 2)
            finally:
                is_enough.set()
            for one in working:
                one.result()
        wait_for_engines(config.app, 1)
