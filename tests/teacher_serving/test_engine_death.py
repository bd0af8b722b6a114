"""An engine in a process of its own is killed: everybody who waits for it is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from teacher_serving.config import SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.types import TeacherDeadError
from teacher_serving.vllm_engine import VllmEngine


@pytest.mark.vllm
@pytest.mark.slow
def test_the_death_of_the_engines_process_reaches_every_waiting_caller(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    sampling = SamplingConfig(max_tokens=2000, stop_token_ids=())
    config = VllmTeacherConfig(model=str(tiny_model_path), device="cpu", dtype="float32", top_k=5, sampling=sampling)
    before = set(multiprocessing.active_children())
    engine = connect(config)
    assert isinstance(engine, VllmEngine)
    assert engine._keeps_arrays
    (child,) = set(multiprocessing.active_children()) - before
    asked = pa.table({"uid": [0], "prompt_ids": [[1, 2, 3]]})
    errors: list[TeacherDeadError] = []

    def wait_for_it() -> None:
        try:
            engine.generate(asked)
        except TeacherDeadError as error:
            errors.append(error)

    callers = [threading.Thread(target=wait_for_it) for _ in range(2)]
    for caller in callers:
        caller.start()
    while len(engine._running) < 2:
        pass
    os.kill(child.pid or 0, signal.SIGKILL)
    for caller in callers:
        caller.join()
    assert len(errors) == 2
    with pytest.raises(TeacherDeadError):
        engine.generate(asked)
    engine.close()
