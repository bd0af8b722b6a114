"""A teacher behind an API, through the faults that APIs have; against a real server: test_http_stock_vllm.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_serving.config import HttpTeacherConfig, SamplingConfig
from teacher_serving.connect import contact
from teacher_serving.http_calls import EndpointError, retry_after_s
from teacher_serving.http_client import HttpTeacher
from teacher_serving.identity import describe
from teacher_serving.spending import Clock
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA
from tests.completion_server import (
    HANG,
    KEY,
    OUTPUT_IDS,
    CompletionServer,
    Said,
    completion,
    completion_server,
    prompts,
    reasons,
    refuse,
)


class FakeTime:
    """A clock that stands still but for sleeping, which takes no time."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep, chance=lambda: 1.0)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    with completion_server() as server:
        yield server


@pytest.fixture
def open_teacher(server: CompletionServer, tiny_model_path: Path, monkeypatch) -> Iterator[Callable[..., HttpTeacher]]:
    """Makes teachers of the server; `fake_time` shows what they waited."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    opened = []

    def make(*, ledger: Path | None = None, fake_time: FakeTime | None = None, **changes: Any) -> HttpTeacher:
        config = config_of(server, tiny_model_path, **changes)
        teacher = HttpTeacher(config, describe(config), ledger, (fake_time or FakeTime()).clock)
        opened.append(teacher)
        server.asked.clear()
        return teacher

    yield make
    for teacher in opened:
        teacher.close()
        teacher.close()  # idempotent


def config_of(server: CompletionServer, tokenizer: Path, **changes: Any) -> HttpTeacherConfig:
    options = {
        "address": server.address,
        "model": "tiny",
        "tokenizer": str(tokenizer),
        "top_k": 3,
        "api_key_env": "TEACHER_KEY",
        "sampling": SamplingConfig(max_tokens=8),
        "max_retries": 3,
    }
    return HttpTeacherConfig.model_validate({**options, **changes})


def test_an_answer_becomes_a_row_and_the_key_travels_in_the_header_alone(open_teacher, server):
    teacher = open_teacher()
    table = teacher.generate(prompts(2))
    assert table.schema.equals(TEACHER_OUTPUT_SCHEMA)
    row = table.to_pylist()[1]
    assert (row["uid"], row["output_ids"], row["finish_reason"], row["top_k"]) == (1, OUTPUT_IDS, "length", 3)
    assert row["topk_ids"] == [212, 754, 814, 222, 172, 774]
    assert row["sampled_logprob"] == pytest.approx([-3.732551, -4.077273])
    rest = 1 - np.exp([-3.732551336288452, -4.024319648742676, -4.053122520446777]).sum()
    assert row["log_tail"][0] == pytest.approx(np.log(rest), abs=1e-6)
    assert server.keys[-1] == f"Bearer {KEY}"
    assert KEY not in repr(teacher._config) + str(server.asked)
    body = server.asked[0]
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["logprobs"]) == ([5, 6, 7], 8, 0.0, 3)
    assert body["stop_token_ids"] == list(teacher.info.eos_token_ids)


def test_all_requests_wait_for_as_long_as_the_server_asks(open_teacher, server):
    fake_time = FakeTime()
    teacher = open_teacher(fake_time=fake_time, connections=1)
    server.next = [refuse(429, "slow down", Retry_After="17")]
    assert reasons(teacher.generate(prompts(3))) == ["length"] * 3
    assert len(server.asked) == 4
    assert fake_time.now == pytest.approx(17)  # the backoff is part of it


def test_a_retry_date_is_compared_with_the_servers_own():
    date = {"Date": "Fri, 17 May 2024 12:00:10 GMT"}
    assert retry_after_s({"Retry-After": "Fri, 17 May 2024 12:00:40 GMT"} | date) == 30
    assert retry_after_s({"Retry-After": "Fri, 17 May 2024 12:00:00 GMT"} | date) == 0
    assert retry_after_s({"Retry-After": "1.5"}) == 1.5
    assert retry_after_s({"Retry-After": "soon"} | date) == retry_after_s({}) == 0


def test_a_server_in_trouble_is_asked_again_ever_more_seldom_and_then_the_row_says_so(open_teacher, server):
    fake_time = FakeTime()
    teacher = open_teacher(fake_time=fake_time, connections=1)
    server.next = [refuse(500, "out of order")] * 4
    first, second = reasons(teacher.generate(prompts(2)))
    assert first == "error: no answer in 4 tries, the last: HTTP 500: out of order"
    assert second == "length"
    assert fake_time.slept == [1.0, 2.0, 4.0]


def test_a_server_that_hangs_or_talks_nonsense_is_asked_again(open_teacher, server):
    teacher = open_teacher(request_timeout_s=0.3)
    server.next = [HANG, Said(200, b"<html>busy</html>"), Said(200, b"[]")]
    assert reasons(teacher.generate(prompts(1))) == ["length"]
    assert len(server.asked) == 4
    server.next = [Said(200, {"ok": True})]
    assert reasons(teacher.generate(prompts(1))) == ["error: the server's answer has no choices, but ['ok']"]


def test_a_request_that_is_wrong_is_not_made_again_and_the_others_go_on(open_teacher, server):
    teacher = open_teacher(connections=1)
    server.next = [refuse(400, "the prompt is rude")]
    first, second = reasons(teacher.generate(prompts(2)))
    assert first == "error: the server refuses the request: HTTP 400: the prompt is rude"
    assert second == "length"
    too_long = teacher.generate(prompts(1, length=64))
    assert "64" in reasons(too_long)[0]
    assert len(server.asked) == 2


def test_a_key_that_is_refused_ends_the_work_and_is_not_told(open_teacher, server):
    teacher = open_teacher()
    server.next = [refuse(401, f"no such key: {KEY}")] * 2
    with pytest.raises(
        EndpointError, match="refuses the API key .*no such key: .*environment variable TEACHER_KEY"
    ) as caught:
        teacher.generate(prompts(1))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "large"}, "serves no model 'large', but tiny; set teacher.model"),
        ({"max_model_len": 100}, "max_model_len=100 is more than the 64 tokens"),
        ({"api_key_env": "NO_SUCH"}, "api_key_env=NO_SUCH, but the environment has no such variable"),
        ({"address": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1 does not answer: .*start the server"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_work_starts(server, tiny_model_path, monkeypatch, changes, words):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr("teacher_serving.http_calls.BACKOFF_S", 0.0)
    config = config_of(server, tiny_model_path, **changes)
    with pytest.raises(ValueError, match=words):
        contact(config, describe(config), scoring=False)


def test_a_server_that_does_not_say_its_context_needs_it_in_the_config(server, tiny_model_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server.models = {"data": [{"id": "tiny"}]}
    with pytest.raises(ValueError, match="does not say how long the context of tiny is; set teacher.max_model_len"):
        describe(config_of(server, tiny_model_path))
    assert describe(config_of(server, tiny_model_path, max_model_len=32)).max_model_len == 32


def test_ids_outside_the_vocabulary_are_those_of_another_tokenizer(open_teacher, server):
    teacher = open_teacher(top_k=0)
    server.answer = lambda body: completion(token_ids=[200_000])
    with pytest.raises(
        EndpointError, match="answers with token id 200000, but the vocabulary in .* has .*teacher.tokenizer"
    ):
        teacher.generate(prompts(1))


def limited_to(limit: int) -> Callable[[dict[str, Any]], Said]:
    def answer(body: dict[str, Any]) -> Said:
        asked = body.get("logprobs", 0)
        if asked > limit:
            return refuse(400, f"Requested sample logprobs of {asked}, which is greater than max allowed: {limit}")
        return completion()

    return answer


def test_as_many_log_probabilities_as_the_server_allows_are_asked_for(open_teacher, server):
    server.answer = limited_to(2)
    teacher = open_teacher(top_k=64)
    assert teacher.offer.top_k == 2
    table = teacher.generate(prompts(1))
    assert server.asked[-1]["logprobs"] == 2
    row = table.to_pylist()[0]
    assert (row["top_k"], row["topk_ids"]) == (2, [212, 754, 222, 172])
    assert row["log_tail"][0] == pytest.approx(np.log(1 - np.exp(-3.732551) - np.exp(-4.02432)), abs=1e-5)
    said = contact(teacher._config, teacher.info, scoring=False)
    assert said == f"tiny at {server.address} gives top-2 of the 64 asked for, the server's limit"


def test_rows_of_one_call_may_have_different_k_and_keep_their_order(open_teacher, server):
    teacher = open_teacher(connections=1)
    choice = completion().body["choices"][0]
    fewer = choice["logprobs"] | {
        "top_logprobs": [dict(list(top.items())[:2]) for top in choice["logprobs"]["top_logprobs"]]
    }
    server.next = [completion(), completion(logprobs=fewer), completion()]
    rows = teacher.generate(prompts(4)).to_pylist()
    assert sorted(row["top_k"] for row in rows) == [2, 3, 3, 3]
    assert [row["uid"] for row in rows] == [0, 1, 2, 3]
    assert all(len(row["topk_ids"]) == 2 * row["top_k"] for row in rows)


@pytest.mark.parametrize("by_text", [False, True])
def test_a_server_without_log_probabilities_by_id_gives_text_and_says_so(open_teacher, server, by_text):
    names = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -1.0], "top_logprobs": [{"a": -1.0}, {"b": -1.0}]}
    server.answer = lambda body: completion(logprobs=names if by_text else {}, token_ids=None, finish_reason="stop")
    with pytest.raises(
        EndpointError, match=r"gives no log-probabilities by token id .*set teacher.top_k=0 .*loss.ce_teacher"
    ):
        open_teacher(top_k=3)
    teacher = open_teacher(top_k=0)
    table = teacher.generate(prompts(1))
    row = table.to_pylist()[0]
    expected = [*teacher._tokenizer.encode("ab").ids, *teacher.info.eos_token_ids[:1]]  # a text that stopped has its end
    assert (row["output_ids"], row["top_k"], row["topk_ids"], row["log_tail"]) == (expected, 0, [], [])
    assert "logprobs" not in server.asked[-1]
    scored = teacher.score(table.select(["uid", "prompt_ids", "output_ids"]))
    assert (reasons(scored), scored["top_k"].to_pylist(), len(server.asked)) == (["given"], [0], 1)
    assert "text alone (sequence-level distillation); its text is tokenised here" in contact(
        teacher._config, teacher.info, scoring=True
    )


def test_a_server_that_knows_neither_ids_nor_vllms_words_is_asked_in_plain_ones(open_teacher, server):
    def answer(body: dict[str, Any]) -> Said:
        if not isinstance(body["prompt"], str) or "ignore_eos" in body:
            return refuse(422, "unknown field")
        return completion(logprobs=None, token_ids=None)

    server.answer = answer
    teacher = open_teacher(top_k=0)
    assert reasons(teacher.generate(prompts(1))) == ["length"]
    assert server.asked[-1]["prompt"] == teacher._tokenizer.decode([5, 6, 7], skip_special_tokens=False)
    with pytest.raises(EndpointError, match="stop_token_ids=.1,., but .* knows neither"):
        open_teacher(top_k=0, sampling=SamplingConfig(stop_token_ids=(1,)))


def test_a_budget_ends_the_asking_and_loses_nothing(open_teacher, server, tmp_path: Path):
    """Each request may take 3 + 8 tokens and takes 3 + 2."""
    ledger = tmp_path / "cache" / "spent.txt"
    teacher = open_teacher(ledger=ledger, budget={"max_tokens": 24})
    found = reasons(teacher.generate(prompts(8)))
    assert found[:3] == ["length"] * 3  # after 15 tokens another 11 could pass 24
    assert len(server.asked) == 3
    assert all(reason == found[3] for reason in found[3:])
    assert found[3].startswith(
        "error: not asked: 15 tokens are spent of teacher.budget.max_tokens=24, and a prompt of 3 may "
    )
    assert ledger.read_bytes() == b"3 2\n" * 3
    richer = open_teacher(ledger=ledger, budget={"max_tokens": 35})  # what others have spent counts
    assert sum(reason == "length" for reason in reasons(richer.generate(prompts(8)))) == 2
    prices = {"prompt_price": 2e6, "completion_price": 10e6}  # 3 * 2 + 2 * 10 = 26 a request, at most 86
    dear = open_teacher(budget={"max_cost": 150.0, **prices})
    found = reasons(dear.generate(prompts(8)))
    assert sum(reason == "length" for reason in found) == 3  # 52 + 86 is within, 78 + 86 is not
    assert "78 is spent of teacher.budget.max_cost=150" in found[-1]


def test_requests_keep_to_their_pace(open_teacher, server):
    fake_time = FakeTime()
    teacher = open_teacher(fake_time=fake_time, requests_per_s=2.0, num_replicas=2, connections=1)
    begun = fake_time.now
    teacher.generate(prompts(5))
    assert fake_time.now - begun == pytest.approx(5.0, abs=1.0)  # one a second is this actor's share


def test_the_fingerprint_is_of_what_changes_the_answers(server, tiny_model_path, tmp_path: Path):
    def fingerprint(**changes: Any) -> str:
        return describe(config_of(server, tiny_model_path, max_model_len=64, **changes)).fingerprint

    elsewhere = {"address": "http://elsewhere/v1", "connections": 3, "budget": {"max_tokens": 9}}
    same = {fingerprint(), fingerprint(**elsewhere)}
    assert len(same) == 1
    changes = ({"model": "other"}, {"top_k": 2}, {"weight_version": "1"}, {"sampling": SamplingConfig(max_tokens=9)})
    assert len({*same, *(fingerprint(**change) for change in changes)}) == 5


def test_a_folder_with_a_tokenizer_alone_says_where_texts_end(server, tiny_model_path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_path / name).read_bytes())
    whole, alone = (describe(config_of(server, path, max_model_len=64)) for path in (tiny_model_path, tmp_path))
    assert alone.eos_token_ids == whole.eos_token_ids
    assert alone.vocabulary_fingerprint == whole.vocabulary_fingerprint
