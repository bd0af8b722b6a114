"""One shared teacher, asked in every way there is: what it answers, what it refuses, what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.actor import BusyClock, answer_block, teacher_stage
from teacher_serving.config import (
    HfTeacherConfig,
    RequestConfig,
    SamplingConfig,
    ServedTeacherConfig,
    SeveralTeachersConfig,
)
from teacher_serving.connect import connect
from teacher_serving.identity import describe
from teacher_serving.serve_config import ENGINES, ServeConfig
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, Teacher, TeacherDeadError
from teacher_serving.wire import read_table, request_bytes
from tests.conftest import save_tiny_model
from tests.shared_teacher import shared_teacher

pytestmark = pytest.mark.ray

KEY_NAME, KEY = "TEACHER_KEY_OF_THE_TESTS", "a key that only this test knows"
MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def engine_config(tiny_model_path: Path) -> HfTeacherConfig:
    """The engine behind the service, and beside it the same one embedded."""
    sampling = SamplingConfig(max_tokens=6, stop_token_ids=tuple(range(0, 1000, 9)))
    return HfTeacherConfig(
        model=str(tiny_model_path),
        dtype="float32",
        device="cpu",
        top_k=8,
        sampling=sampling,
        max_model_len=512,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def embedded(engine_config: HfTeacherConfig) -> Teacher:
    return connect(engine_config)


@pytest.fixture(scope="module")
def service(ray_cluster: None, engine_config: HfTeacherConfig) -> Iterator[ServeConfig]:
    """The application, with a key; gone after the file."""
    os.environ[KEY_NAME] = KEY  # of this process alone: the cluster's were started before
    limits = {"max_request_bytes": MAX_BYTES, "max_sequences": 32, "health_check_period_s": 1.0}
    with shared_teacher(teacher=engine_config, api_key_env=KEY_NAME, **limits) as config:
        yield config
    del os.environ[KEY_NAME]


@pytest.fixture(scope="module")
def ways(service: ServeConfig, engine_config: HfTeacherConfig) -> dict[str, ServedTeacherConfig]:
    """A client's config for each way to the service."""
    common: dict[str, Any] = {name: getattr(engine_config, name) for name in ("sampling", "top_k", "batch_size")} | {
        "tokenizer": engine_config.model
    }
    return {
        "app": ServedTeacherConfig(app=service.app, **common),
        "address": ServedTeacherConfig(address=f"http://127.0.0.1:{service.port}", api_key_env=KEY_NAME, **common),
    }


def prompts(num_rows: int, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, 1000, length, dtype=np.int32) for length in generator.integers(1, 12, num_rows)]
    return pa.table({"uid": np.arange(num_rows) + 7, "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


def ask(service: ServeConfig, path: str, body: Any = None, *, key: str | None = KEY) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of a plain HTTP request; JSON unless the body is bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{service.port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            status, content, got = reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        status, content, got = error.code, error.read(), error.headers
    is_json = got["Content-Type"].startswith("application/json")
    return status, json.loads(content) if is_json else content, dict(got)


@pytest.mark.parametrize("way", ["app", "address"])
def test_the_service_gives_the_very_rows_of_an_engine_of_ones_own(ways, embedded: Teacher, engine_config, way: str):
    served = connect(ways[way])
    assert served.info == embedded.info
    asked = prompts(9)
    written = embedded.generate(asked)
    assert served.generate(asked).equals(written)
    given = written.select(["uid", "prompt_ids", "output_ids"])
    assert served.score(given).equals(embedded.score(given))
    # Rows that no engine can answer, and rows with a limit of their own.
    odd = pa.table(
        {"uid": [1, 2, 3], "prompt_ids": [[], [5] * 600, [9]], "max_tokens": [3, 3, 2]},
        schema=pa.schema([*asked.schema, ("max_tokens", pa.int32())]),
    )
    assert served.generate(odd).equals(embedded.generate(odd))
    assert served.generate(asked.slice(0, 0)).equals(TEACHER_OUTPUT_SCHEMA.empty_table())
    assert served.generate(asked.slice(3, 2)).equals(embedded.generate(asked.slice(3, 2)))


def test_every_client_has_its_own_sampling_k_and_context(ways, engine_config: HfTeacherConfig):
    own = {"top_k": 3, "sampling": SamplingConfig(temperature=0.9, seed=5, max_tokens=9), "max_model_len": 16}
    alone = connect(engine_config.model_copy(update=own))
    for way in ("app", "address"):
        served = connect(ways[way].model_copy(update={**own, "teacher_id": "renamed"}))
        assert (served.info.fingerprint, served.info.max_model_len) == (alone.info.fingerprint, 16)
        answers = served.generate(prompts(8))
        assert answers.drop_columns("teacher_id").equals(alone.generate(prompts(8)).drop_columns("teacher_id"))
        assert set(answers["teacher_id"].to_pylist()) == {"renamed"}


@pytest.mark.parametrize("way", ["app", pytest.param("address", marks=pytest.mark.long)])
def test_a_training_stage_of_thin_clients_gives_the_same_table(ways, embedded: Teacher, way: str):
    import ray.data

    recorded = [[7, 8] if row % 2 else None for row in range(12)]
    block = prompts(12).append_column("recorded_ids", pa.array(recorded, pa.list_(pa.int32())))
    block = block.append_column("note", pa.array([f"row {row}" for row in range(12)]))
    rows = teacher_stage(ray.data.from_arrow(block), ways[way]).take_all()
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["uid"])).select(["note", *TEACHER_OUTPUT_SCHEMA.names])
    expected = pa.concat_tables(
        answer_block(embedded, block.slice(start, 4), BusyClock()).select(table.column_names) for start in (0, 4, 8)
    )
    assert table.cast(expected.schema).equals(expected.combine_chunks())


def test_an_openai_client_gets_completions(service: ServeConfig, embedded: Teacher, demo_tokenizer):
    ids = demo_tokenizer.encode("what is it")
    row = embedded.generate(pa.table({"uid": [0], "prompt_ids": [ids]})).to_pylist()[0]
    body = {"model": "tiny", "prompt": "what is it", "logprobs": 3, "temperature": 0, "top_p": 0.5, "stream": False}
    status, answer, _ = ask(service, "/v1/completions", body)
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["text"] == demo_tokenizer.decode(row["output_ids"], skip_special_tokens=True)
    assert choice["finish_reason"] == row["finish_reason"]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], row["sampled_logprob"], rtol=1e-6)
    assert [max(top, key=top.get) for top in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["tokens"]  # greedy
    assert answer["usage"]["completion_tokens"] == len(row["output_ids"])
    # The same prompt as token ids, tokens by their ids, several prompts and choices.
    body = {"prompt": [ids, ids], "n": 2, "logprobs": 0, "temperature": 0, "return_tokens_as_token_ids": True}
    status, answer, _ = ask(service, "/v1/completions", body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in row["output_ids"]]


def test_an_openai_client_gets_chat_with_tools_and_its_own_sampling(service: ServeConfig, embedded: Teacher, demo_tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    tool = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object"}}}
    body = {"messages": messages, "tools": [tool], "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    status, answer, _ = ask(service, "/v1/chat/completions", body)
    assert (status, answer["object"]) == (200, "chat.completion")
    rendered = demo_tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=True, tokenize=False)
    ids = demo_tokenizer.encode(rendered, add_special_tokens=False)
    limited = pa.table({"uid": [0], "prompt_ids": [ids], "max_tokens": pa.array([4], pa.int32())})
    row = embedded.generate(limited).to_pylist()[0]
    message, tokens = answer["choices"][0]["message"], answer["choices"][0]["logprobs"]["content"]
    assert message == {"role": "assistant", "content": demo_tokenizer.decode(row["output_ids"], skip_special_tokens=True)}
    assert [entry["token"] for entry in tokens] == [demo_tokenizer.decode([token]) for token in row["output_ids"]]
    assert all(len(entry["top_logprobs"]) == 2 for entry in tokens)
    # Sampled: a seed repeats itself, none does not.
    body = {"messages": messages, "max_tokens": 12, "temperature": 1.5}

    def text(**more: int) -> str:
        return ask(service, "/v1/chat/completions", body | more)[1]["choices"][0]["message"]["content"]

    assert text(seed=3) == text(seed=3)
    assert len({text() for _ in range(4)}) > 1


def test_who_it_is_is_told(service: ServeConfig, embedded: Teacher):
    status, models, _ = ask(service, "/v1/models")
    assert (status, models["data"][0]["id"], models["data"][0]["max_model_len"]) == (200, "tiny", 512)
    info = ask(service, "/v1/info")[1]
    assert info["info"] == json.loads(json.dumps(vars(embedded.info)))
    assert (info["top_k"], info["limits"]["max_sequences"]) == (8, 32)
    status, answer, _ = ask(service, "/health", key=None)
    assert (status, answer) == (200, {"status": "ok", "engines": {"RUNNING": 1}})


LONG = {"prompt": [5] * 600}
BAD = {
    "no JSON": ("/v1/completions", b"{", 400, "no JSON"),
    "no prompt": ("/v1/completions", {"max_tokens": 3}, 400, "prompt: "),
    "a prompt of another kind": ("/v1/completions", {"prompt": 3}, 400, "expected a text, a list of token ids"),
    "an empty prompt": ("/v1/completions", {"prompt": []}, 400, "1 to 32 sequences"),
    "a token that is none": ("/v1/completions", {"prompt": [2**40]}, 400, "outside the vocabulary of 1152"),
    "too long": ("/v1/completions", LONG, 400, "601 tokens are needed, the teacher's context has 512"),
    "too many": ("/v1/completions", {"prompt": ["a"] * 20, "n": 2}, 400, "found 20 prompts with n=2, expected 1 to 32"),
    "an unknown option": ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "temprature: no such option"),
    "what is not offered": ("/v1/completions", {"prompt": "a", "stream": True}, 400, "stream: found True"),
    "more log-probabilities than there are": ("/v1/completions", {"prompt": "a", "logprobs": 9}, 400, "at most 8"),
    "another model": (
        "/v1/completions",
        {"prompt": "a", "model": "gpt"},
        404,
        "model='gpt' is not served here; expected 'tiny'",
    ),
    "no messages": ("/v1/chat/completions", {"messages": []}, 400, "messages: found []"),
    "messages the template refuses": ("/v1/chat/completions", {"messages": [{"content": 3}]}, 400, "chat template"),
    "no table": ("/v1/score", b"hello", 400, "no Arrow IPC stream"),
    "a table of something else": (
        "/v1/score",
        request_bytes(prompts(2)),
        400,
        "expected ['uid', 'prompt_ids', 'output_ids']",
    ),
    "too many rows": ("/v1/generate", request_bytes(prompts(33)), 413, "found 33 rows, expected at most 32"),
    "more K than there is": ("/v1/generate", request_bytes(prompts(1), RequestConfig(top_k=9)), 400, "more than the 8 that"),
    "more context": (
        "/v1/generate",
        request_bytes(prompts(1), RequestConfig(top_k=8, max_model_len=600)),
        400,
        "the 512 that",
    ),
    "settings that are none": ("/v1/info", {"topk": 3}, 400, "topk: no such option"),
    "too large": ("/v1/score", b"x" * (MAX_BYTES + 1), 413, f"at most {MAX_BYTES}"),
    "nothing there": ("/v1/embeddings", {"input": "a"}, 404, "there is nothing at /v1/embeddings; expected one of"),
    "another method": ("/v1/score", None, 405, "found GET /v1/score, expected POST"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(service: ServeConfig, case: str):
    path, body, expected, words = BAD[case]
    status, answer, _ = ask(service, path, body)
    assert status == expected, answer
    assert words in answer["error"]["message"]


def test_without_the_key_nothing_is_answered(service: ServeConfig):
    for key, words in ((None, "no API key came"), ("another key", "not the one")):
        status, answer, headers = ask(service, "/v1/completions", {"prompt": "a"}, key=key)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert words in answer["error"]["message"]


def test_a_client_that_cannot_work_says_so_before_anything_starts(
    ways, service: ServeConfig, tmp_path, demo_tokenizer, monkeypatch
):
    def problem(way: str, **changes: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            describe(ways[way].model_copy(update=changes))
        return str(caught.value)

    assert "teacher.address=http://127.0.0.1:9 does not answer" in problem("address", address="http://127.0.0.1:9")
    assert "asks for an API key" in problem("address", api_key_env=None)
    assert "teacher.batch_size=64, but" in problem("address", batch_size=64)
    assert "is not a shared teacher's" in problem("address", address=f"http://127.0.0.1:{service.port}/-")
    assert "teacher.app=other: the cluster has no such application, found ['shared']" in problem("app", app="other")
    for way in ways:
        assert "top_k=9 is more than the 8 that this teacher gives" in problem(way, top_k=9)
    more = demo_tokenizer.__class__.from_pretrained(demo_tokenizer.name_or_path)
    more.add_tokens(["<another>"])
    other = save_tiny_model(tmp_path / "other", more, seed=0)
    assert "serves 'tiny' with another vocabulary" in problem("app", tokenizer=str(other))
    two = {"code": {"kind": "http", "address": "http://h/v1", "model": "m"}, "math": {"kind": "served", "app": "shared"}}
    options = {"tokenizer": str(other), "top_k": 8, "max_model_len": 64, "teachers": two}
    with pytest.raises(ValueError, match=r"teacher.teachers.math: teacher.app=shared serves 'tiny' with another vocabulary"):
        describe(SeveralTeachersConfig.model_validate(options))
    monkeypatch.setenv(KEY_NAME, "another key")
    refused = problem("address")
    assert "refuses the API key (HTTP 401: the API key is not the one of this service)" in refused
    assert f"put a valid one into the environment variable {KEY_NAME}" in refused
    monkeypatch.delenv(KEY_NAME)
    assert f"teacher.api_key_env={KEY_NAME}, but the environment has no such variable" in problem("address")


def test_a_table_over_http_takes_few_bytes_a_token(service: ServeConfig):
    length, num_rows = 300, 4
    ids = np.random.default_rng(0).integers(0, 1000, (num_rows, length), dtype=np.int32)
    rows = {"uid": np.arange(num_rows), "prompt_ids": list(ids[:, :1]), "output_ids": list(ids[:, 1:])}
    body = request_bytes(pa.table(rows), RequestConfig(top_k=8))
    status, content, headers = ask(service, "/v1/score", body)
    assert (status, headers["content-type"]) == (200, "application/vnd.apache.arrow.stream")
    answers = read_table(content)
    assert answers.schema.equals(TEACHER_OUTPUT_SCHEMA)
    assert len(content) / (num_rows * length) < 6 * 8 + 16  # K ids and halves, the token, its log-probability, the tail


def test_what_the_engines_do_is_among_rays_metrics(service: ServeConfig):
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [f"ray_raykd_served_{name}" for name in ("requests", "tokens", "failed_rows", "request_seconds")]
    deadline = time.monotonic() + 60
    text = ""
    while not all(name in text for name in wanted):  # they are sent every few seconds
        assert time.monotonic() < deadline, [name for name in wanted if name not in text]
        with urllib.request.urlopen(address) as reply:
            text = reply.read().decode()
        time.sleep(0.5)
    assert 'teacher="tiny"' in text


def test_a_killed_engine_is_replaced_and_its_requests_are_answered(ways, service: ServeConfig, embedded: Teacher):
    import ray

    actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors]
    (name,) = [name for name in names if name.startswith(f"SERVE_REPLICA::{service.app}#{ENGINES}#")]
    sampling = SamplingConfig(max_tokens=200, stop_token_ids=())
    asked, longer = prompts(4), {"sampling": sampling}
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(connect(way.model_copy(update=longer)).generate, asked) for way in ways.values()]
        time.sleep(0.3)
        ray.kill(ray.get_actor(name, namespace="serve"))
        answers = [one.result() for one in running]
    for table in answers:
        assert table["finish_reason"].to_pylist() == ["length"] * 4
        assert table["output_ids"].equals(answers[0]["output_ids"])
    assert connect(ways["app"]).generate(asked).equals(embedded.generate(asked))


@pytest.mark.long
def test_the_command_shares_a_second_teacher_in_the_cluster_until_it_is_told_to_stop(
    service: ServeConfig, tiny_model_path: Path, tmp_path: Path
):
    file = tmp_path / "teacher.yaml"
    file.write_text(
        f"teacher: {{kind: hf, model: {tiny_model_path}, device: cpu, dtype: float32, max_model_len: 64, top_k: 4}}"
    )

    def command(*overrides: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "teacher_serving.serve", "--config", str(file), *overrides]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    own = (f"port={service.port}", "app=second", "route=/second")
    for overrides, words in (
        (("port=1", *own[1:]), "listens on 127.0.0.1:"),
        ((own[0], "app=shared", own[2]), "app=shared is running in this cluster already"),
        ((*own, "teacher.num_cpus=1000"), "1 engines of 1000 CPUs each, but the cluster has 8"),
    ):
        refused = command(*overrides)
        assert words in refused.communicate()[1]
        assert refused.returncode == 1
    running = command(*own)
    deadline = time.monotonic() + 180
    while ask(service, "/second/health", key=None)[0] != 200 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    status, answer, _ = ask(service, "/second/v1/completions", {"prompt": "a", "max_tokens": 3}, key=None)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    running.send_signal(signal.SIGTERM)
    assert "stopping: requests in work have 60 s" in running.communicate(timeout=120)[1]
    assert running.returncode == 0
    assert ask(service, "/second/health")[0] == 404  # of the teacher at /, which knows no such path
    assert ask(service, "/health", key=None)[0] == 200


def test_a_service_that_is_another_teacher_by_now_is_not_used(ways):
    served = connect(ways["app"])
    served.info = served.info.__class__(**{**vars(served.info), "fingerprint": "of before"})
    with pytest.raises(TeacherDeadError, match="another teacher than at the start of the run"):
        served.generate(prompts(1))


def test_stopping_lets_requests_in_work_come_to_their_end(ways, service: ServeConfig):
    """The last test of the file: there is no service afterwards."""
    from teacher_serving.serve import stop

    sampling = SamplingConfig(max_tokens=400, stop_token_ids=())
    served = connect(ways["address"].model_copy(update={"sampling": sampling, "max_retries": 0}))
    with ThreadPoolExecutor() as threads:
        running = threads.submit(served.generate, prompts(8))
        time.sleep(0.3)
        assert not running.done()
        stop(service)
        assert running.result()["finish_reason"].to_pylist() == ["length"] * 8
    with pytest.raises(ValueError, match="does not answer|no such application"):
        describe(ways["app"])
