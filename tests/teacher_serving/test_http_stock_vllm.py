"""A teacher behind a real server, `vllm serve`: its rows are those of the embedded engines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.config import HfTeacherConfig, HttpTeacherConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect, contact
from teacher_serving.http_calls import EndpointError
from teacher_serving.identity import describe
from tests.completion_server import KEY, prompts, reasons

SOMETIMES_STOP = tuple(range(0, 1000, 9))  # a random model never writes its real end token
MAX_LOGPROBS = 8
CONTEXT = 256
START_S = 400.0
"""Of processes that load torch and vLLM three times over, on a machine that others use as well."""


@pytest.fixture(scope="module")
def vllm_address(tiny_model_path: Path, tmp_path_factory) -> Iterator[str]:
    """Where a vLLM of this file's own serves the tiny model under the name `org/tiny`, behind a key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "model": tiny_model_path,
        "served-model-name": "org/tiny",
        "host": "127.0.0.1",
        "port": port,
        "api-key": KEY,
        "max-logprobs": MAX_LOGPROBS,
        "max-model-len": CONTEXT,
        "max-num-seqs": 16,
        "max-num-batched-tokens": 512,
        "dtype": "float32",
        "kv-cache-memory-bytes": 32 * 2**20,
    }
    # Not `vllm serve`: the CPU wheel's own command looks for the package's other name.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def assert_same_rows(found: pa.Table, expected: pa.Table) -> None:
    for name in ("uid", "prompt_ids", "output_ids", "top_k", "finish_reason", "weight_version"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    arrays = {}
    for name in ("topk_ids", "topk_logprobs", "log_tail", "sampled_logprob"):
        arrays[name] = [t[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for t in (found, expected)]
        assert len(arrays[name][0]) == len(arrays[name][1]), name
    for name, atol in (("topk_logprobs", 1e-2), ("log_tail", 1e-4), ("sampled_logprob", 1e-4)):
        a, b = (values.astype(np.float32) for values in arrays[name])
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)
    assert np.mean(arrays["topk_ids"][0] == arrays["topk_ids"][1]) > 0.99  # ties apart


@pytest.mark.long
@pytest.mark.vllm
def test_rows_of_a_stock_vllm_are_those_of_the_embedded_engines(vllm_address, tiny_model_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    sampling = SamplingConfig(max_tokens=24, stop_token_ids=SOMETIMES_STOP)
    config = HttpTeacherConfig(
        address=vllm_address,
        model="org/tiny",
        tokenizer=str(tiny_model_path),
        top_k=64,
        api_key_env="TEACHER_KEY",
        sampling=sampling,
    )
    info = describe(config)
    assert (info.teacher_id, info.max_model_len) == ("tiny", CONTEXT)
    said = contact(config, info, scoring=True)
    assert said == f"org/tiny at {vllm_address} gives top-{MAX_LOGPROBS} of the 64 asked for, the server's limit"
    teacher = connect(config)
    local = {"model": str(tiny_model_path), "dtype": "float32", "device": "cpu", "max_model_len": CONTEXT}
    embedded = [
        connect(kind(**local, top_k=MAX_LOGPROBS, sampling=sampling)) for kind in (HfTeacherConfig, VllmTeacherConfig)
    ]
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(1, 40, 22), CONTEXT - 4, CONTEXT]  # the last ones fill the context
    ids = [generator.integers(0, info.vocab_size, length, dtype=np.int32) for length in lengths]
    asked = pa.table({"uid": np.arange(len(ids)), "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})
    written = teacher.generate(asked)
    assert set(reasons(written)[:-1]) == {"stop", "length"}
    assert "context" in reasons(written)[-1]
    given = written.slice(0, 22).select(["uid", "prompt_ids", "output_ids"])
    scored = teacher.score(given)
    for engine in embedded:
        assert_same_rows(written, engine.generate(asked))
        assert_same_rows(scored, engine.score(given))
        engine.close()
    limited = asked.slice(0, 3).append_column("max_tokens", pa.array([1, 2, 3], pa.int32()))
    cut = teacher.generate(limited)["output_ids"].to_pylist()
    assert all(len(ids) <= limit for ids, limit in zip(cut, (1, 2, 3), strict=True))
    teacher.close()


@pytest.mark.long
@pytest.mark.vllm
def test_a_stock_vllm_without_its_key_its_model_or_log_probabilities(vllm_address, tiny_model_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "wrong")
    options: dict[str, Any] = {"address": vllm_address, "tokenizer": str(tiny_model_path), "max_model_len": CONTEXT}
    for name, words in (
        ("TEACHER_KEY", "refuses the API key .*environment variable TEACHER_KEY"),
        (None, "asks for an API key .*teacher.api_key_env"),
    ):
        config = HttpTeacherConfig(model="org/tiny", api_key_env=name, **options)
        with pytest.raises(EndpointError, match=words):
            contact(config, describe(config), scoring=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    options["api_key_env"] = "TEACHER_KEY"
    config = HttpTeacherConfig(model="tiny", **options)
    with pytest.raises(EndpointError, match="serves no model 'tiny', but org/tiny"):
        contact(config, describe(config), scoring=False)
    sampling = SamplingConfig(max_tokens=6, temperature=1.0)
    config = HttpTeacherConfig(model="org/tiny", top_k=0, sampling=sampling, **options)
    teacher = connect(config)
    rows = teacher.generate(prompts(4)).to_pylist()
    again = teacher.generate(prompts(4)).to_pylist()
    teacher.close()
    assert {row["top_k"] for row in rows} == {0}
    assert len({tuple(row["output_ids"]) for row in rows}) == 4  # each uid has its own seed
    assert [row["output_ids"] for row in rows] == [row["output_ids"] for row in again]
