"""OpenAI's requests and answers, without a service: whatever comes is either a request of ours or a 4xx."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_serving.config import RequestConfig, SamplingConfig
from teacher_serving.openai_answers import chat_answer, completion_answer, read_choices
from teacher_serving.openai_api import ApiError, Asked, Service, read_chat, read_completion
from teacher_serving.types import PROMPT_SCHEMA, TEACHER_OUTPUT_SCHEMA, TeacherInfo

INFO = TeacherInfo("oracle", "f", "v", vocab_size=128, max_model_len=32, eos_token_ids=(0,))
SERVICE = Service(INFO, RequestConfig(top_k=4, sampling=SamplingConfig(max_tokens=10)), max_sequences=6)


class Letters:
    """A tokenizer whose ids are ASCII codes; 0 is its special token."""

    def encode(self, text: str, **options: bool) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token) if token else "" if skip_special_tokens else "<end>" for token in ids)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return "".join(f"{message['role']}:{message['content']} " for message in conversation)


def completion(**body: object) -> Asked:
    return read_completion(body, SERVICE, Letters(), fresh_seed=99)


def answers(asked: Asked, *texts: str) -> pa.Table:
    """What a teacher might say: K entries a token, the token itself first."""
    rows = []
    for number, text in enumerate(texts):
        ids, width = [ord(letter) for letter in text], asked.request.top_k
        columns = {"uid": number, "prompt_ids": asked.prompts[0], "output_ids": ids, "finish_reason": "stop", "top_k": width}
        columns["topk_ids"] = [(token + place) % 128 for token in ids for place in range(width)]
        columns["topk_logprobs"] = [-1.0 - place for _ in ids for place in range(width)]
        columns |= {"sampled_logprob": [-1.0] * len(ids), "log_tail": [-3.0] * len(ids), "hidden_states": []}
        rows.append(columns | {"teacher_id": "oracle", "teacher_fingerprint": "f", "weight_version": "0"})
    return pa.Table.from_pylist(rows, schema=TEACHER_OUTPUT_SCHEMA)


def test_what_is_not_said_is_as_the_service_has_it():
    asked = completion(prompt="ab")
    assert asked.prompts == [[97, 98]]
    assert asked.num_logprobs is None
    assert asked.request.sampling == SamplingConfig(max_tokens=10, stop_token_ids=(0,))
    assert asked.table().schema.equals(PROMPT_SCHEMA)


def test_what_is_said_counts():
    asked = completion(
        prompt=[[1, 2], [3]], n=3, max_tokens=5, temperature=0.5, top_p=0.9, top_k=-1, stop_token_ids=[7], logprobs=2
    )
    assert asked.table()["prompt_ids"].to_pylist() == [[1, 2]] * 3 + [[3]] * 3
    assert asked.table()["uid"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert asked.request == RequestConfig(
        top_k=2, sampling=SamplingConfig(temperature=0.5, top_p=0.9, max_tokens=5, seed=99, stop_token_ids=(0, 7))
    )
    assert completion(prompt="a", temperature=1, seed=3).request.sampling.seed == 3
    assert completion(prompt="a", temperature=0, top_p=0.1).request.sampling.top_p == 1.0  # greedy: nothing to cut


def test_text_ends_before_a_stop_and_so_do_its_tokens():
    asked = completion(prompt="ab", stop=["\n", "END"], logprobs=1)
    cut, whole = read_choices(asked, answers(asked, "one\ntwo END", "onetwo\0"), Letters())
    assert (cut.text, cut.tokens, cut.finish_reason) == ("one", ["o", "n", "e"], "stop")
    assert (whole.text, whole.tokens) == ("onetwo", [*"onetwo", "<end>"])
    body = completion_answer(asked, [cut, whole], "oracle", "name", 5)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["o", "n", "e"],
        "token_logprobs": [-1.0] * 3,
        "top_logprobs": [{"o": -1.0}, {"n": -1.0}, {"e": -1.0}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12}


def test_chat_logprobs_name_every_token_with_its_bytes():
    asked = read_chat(
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}, SERVICE, Letters(), 0
    )
    assert asked.prompts == [[ord(letter) for letter in "user:a "]]
    choices = read_choices(asked, answers(asked, "hi"), Letters())
    entry = chat_answer(asked, choices, "oracle", "name", 5)["choices"][0]["logprobs"]["content"][0]
    assert entry == {
        "token": "h",
        "logprob": -1.0,
        "bytes": [104],
        "top_logprobs": [
            {"token": "h", "logprob": -1.0, "bytes": [104]},
            {"token": "i", "logprob": -2.0, "bytes": [105]},
        ],
    }


def test_a_row_without_an_answer_is_no_completion():
    asked = completion(prompt="ab")
    table = answers(asked, "x").set_column(8, "finish_reason", pa.array(["error: no answer within 3 s"]))
    with pytest.raises(ApiError, match="no answer to choice 0: no answer within 3 s") as caught:
        read_choices(asked, table, Letters())
    assert caught.value.status == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "logprobs",
    "model",
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), JSON, max_size=5) | JSON, st.booleans())
def test_anything_else_is_refused_with_a_status_and_a_reason(body, chat: bool):
    """Property: a body is read, and then fits engine and limits; or it is an ApiError of the sender's."""
    read = read_chat if chat else read_completion
    try:
        asked = read(json.loads(json.dumps(body)), SERVICE, Letters(), 1)
    except ApiError as error:
        refused = (error.status, bool(str(error)))
    else:
        refused = None
    if refused is not None:
        assert refused in ((400, True), (404, True))
        return
    table = asked.table()
    assert 1 <= table.num_rows <= SERVICE.max_sequences
    assert all(1 <= len(row) < INFO.max_model_len for row in table["prompt_ids"].to_pylist())
    assert asked.request.top_k <= SERVICE.request.top_k
    assert dataclasses.asdict(asked)
