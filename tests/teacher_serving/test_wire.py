"""Tables over HTTP: what is sent comes out, and nothing else gets in."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_serving.config import RequestConfig, SamplingConfig
from teacher_serving.types import PROMPT_SCHEMA, SEQUENCE_SCHEMA
from teacher_serving.wire import MAX_TOKENS, answer_bytes, read_request, request_bytes

ROWS = pa.table({"uid": [3, 4], "prompt_ids": [[1, 2], []]}, schema=PROMPT_SCHEMA)
LIMITED = ROWS.append_column(MAX_TOKENS, pa.array([3, 1], pa.int32()))


@pytest.mark.parametrize("table", [ROWS, LIMITED, ROWS.slice(1), ROWS.slice(0, 0)])
def test_rows_and_settings_arrive(table: pa.Table):
    request = RequestConfig(top_k=7, sampling=SamplingConfig(temperature=0.5, stop_token_ids=(3, 4)))
    found, settings = read_request(request_bytes(table, request), PROMPT_SCHEMA)
    assert settings == request
    assert found.equals(table)
    assert read_request(request_bytes(table), PROMPT_SCHEMA)[1] is None


def test_types_are_widened_or_refused():
    loose = pa.table({"prompt_ids": pa.array([[1]], pa.list_(pa.int64())), "uid": pa.array([3], pa.int32())})
    assert read_request(request_bytes(loose), PROMPT_SCHEMA)[0].schema.equals(PROMPT_SCHEMA)
    with pytest.raises(ValueError, match="found the types uid: int64, prompt_ids: list<item: string>, expected uid: int64"):
        read_request(request_bytes(pa.table({"uid": [1], "prompt_ids": [["a"]]})), PROMPT_SCHEMA)
    with pytest.raises(ValueError, match="expected"):
        read_request(request_bytes(pa.table({"uid": [1], "prompt_ids": [[2**40]]})), PROMPT_SCHEMA)


@pytest.mark.parametrize(
    ("table", "schema", "words"),
    [
        (ROWS, SEQUENCE_SCHEMA, "found the columns ['uid', 'prompt_ids'], expected ['uid', 'prompt_ids', 'output_ids']"),
        (pa.table({"uid": [1, None], "prompt_ids": [[1], [2]]}), PROMPT_SCHEMA, "column uid has nulls"),
        (pa.table({"uid": [1, 2], "prompt_ids": [[1], None]}), PROMPT_SCHEMA, "column prompt_ids has nulls"),
        (pa.table({"uid": [1, 2], "prompt_ids": [[1], [None]]}), PROMPT_SCHEMA, "column prompt_ids has nulls"),
        (LIMITED.set_column(2, MAX_TOKENS, pa.array([0, 1], pa.int32())), PROMPT_SCHEMA, "max_tokens has values below 1"),
        (pa.table({"uid": [1], "prompt_ids": [[None]]}), PROMPT_SCHEMA, "prompt_ids holds no integers"),
        (pa.table({"uid": pa.nulls(3), "prompt_ids": [[1]] * 3}), PROMPT_SCHEMA, "uid holds no integers"),
        (pa.table({"uid": pa.array([1, 1]).dictionary_encode()}), PROMPT_SCHEMA, "found a dictionary"),
    ],
)
def test_what_no_engine_can_read_is_refused(table: pa.Table, schema: pa.Schema, words: str):
    with pytest.raises(ValueError, match=r".") as caught:
        read_request(request_bytes(table), schema)
    assert words in str(caught.value)


def test_a_request_of_few_bytes_takes_little_memory():
    bomb = pa.table({"uid": [1], "prompt_ids": [[0] * 10**6]}, schema=PROMPT_SCHEMA)
    body = answer_bytes(bomb)
    assert len(body) < 40_000
    with pytest.raises(ValueError, match="is compressed, expected plain buffers"):
        read_request(body, PROMPT_SCHEMA)


@pytest.mark.parametrize("text", [b"{", b'{"topk": 3}', b'{"top_k": 0}', b"[]"])
def test_settings_that_are_none_are_refused(text: bytes):
    table = ROWS.replace_schema_metadata({b"request": text})
    with pytest.raises(ValueError, match="settings|topk|top_k|dictionary"):
        read_request(request_bytes(table), PROMPT_SCHEMA)


@given(st.binary(max_size=64), st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_broken_bytes_are_refused_and_nothing_worse(start: bytes, place: int, noise: bytes):
    """Property: bytes that are no table, or a table with noise in it, give a table or a ValueError."""
    good = request_bytes(LIMITED)
    place %= len(good)
    for body in (start, good[:place], good[:place] + noise + good[place + len(noise) :]):
        try:
            table, _ = read_request(body, PROMPT_SCHEMA)
        except ValueError:
            continue
        assert table.column_names[:2] == PROMPT_SCHEMA.names
