"""Tables on their way over HTTP: Arrow IPC streams, read from strangers with care.

In:  a table and, as metadata of its schema, the RequestConfig that it is to be answered with.
Out: bytes; or the checked table and its request. Every error is a ValueError that the sender can mend.

A request takes no more memory than a few times its bytes: compressed tables and types without values of their own, which
may hold gigabytes in a line, are refused.
"""

from __future__ import annotations

import json
import struct

import pyarrow as pa
from pydantic import ValidationError

from teacher_serving.config import RequestConfig
from teacher_serving.types import PROMPT_SCHEMA, SEQUENCE_SCHEMA

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
REQUEST_KEY = b"request"
"""Key of the schema's metadata under which a request's settings stand, as JSON."""
MAX_TOKENS = pa.field("max_tokens", pa.int32())
"""Beside PROMPT_SCHEMA: the row's own limit."""


def request_bytes(rows: pa.Table, request: RequestConfig | None = None) -> bytes:
    """Rows to be answered, as an IPC stream."""
    if request is not None:
        rows = rows.replace_schema_metadata({REQUEST_KEY: request.model_dump_json()})
    return _written(rows, compression=None)


def answer_bytes(answers: pa.Table) -> bytes:
    """Answers as an IPC stream with compressed buffers."""
    return _written(answers, compression="lz4")


def _written(table: pa.Table, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_table(body: bytes) -> pa.Table:
    """The table of an IPC stream. Raises ValueError where it is none, or its offsets lead out of its buffers."""
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowMemoryError, OSError) as error:
        raise ValueError(
            f"the body is no Arrow IPC stream ({error}); expected one table, as pyarrow.ipc writes it"
        ) from None
    return table


def read_request(body: bytes, schema: pa.Schema) -> tuple[pa.Table, RequestConfig | None]:
    """Rows to be answered, as PROMPT_SCHEMA or SEQUENCE_SCHEMA has them, and the settings that came with them."""
    _check_plain(body)
    table = read_table(body)
    settings = (table.schema.metadata or {}).get(REQUEST_KEY)
    optional = [MAX_TOKENS] if schema is PROMPT_SCHEMA else []
    expected = pa.schema([*schema, *(field for field in optional if field.name in table.column_names)])
    if sorted(table.column_names) != sorted(expected.names):
        raise ValueError(f"found the columns {table.column_names}, expected {schema.names}")
    try:
        for field in table.schema:
            is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
            if not pa.types.is_integer(field.type.value_type if is_list else field.type):
                raise pa.ArrowInvalid(f"{field.name} holds no integers")
        table = table.select(expected.names).cast(expected)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        found = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        raise ValueError(f"found the types {found}, expected {_types(expected)} ({error})") from None
    table = table.combine_chunks()
    for name in table.column_names:
        column = table[name]
        inside = (chunk.flatten().null_count for chunk in column.chunks) if pa.types.is_list(column.type) else ()
        if column.null_count or any(inside):
            raise ValueError(f"column {name} has nulls, expected a value in every row")
    if MAX_TOKENS.name in table.column_names and table[MAX_TOKENS.name].to_numpy().min(initial=1) < 1:
        raise ValueError("column max_tokens has values below 1, expected 1 or more")
    return table, None if settings is None else read_settings(settings)


def _check_plain(body: bytes) -> None:
    """Raises ValueError where a message of the stream is compressed or none of a plain table."""
    try:
        for message in pa.ipc.MessageReader.open_stream(body):
            if message.type not in ("schema", "record batch"):
                raise ValueError(f"found a {message.type} in the Arrow IPC stream, expected plain columns")
            if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
                raise ValueError("the Arrow IPC stream is compressed, expected plain buffers (compression=None)")
    except (pa.ArrowInvalid, OSError, struct.error) as error:
        raise ValueError(
            f"the body is no Arrow IPC stream ({error}); expected one table, as pyarrow.ipc writes it"
        ) from None


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's message says `compression` (Arrow's Message.fbs: Message.header is its third field,
    RecordBatch.compression its fourth); pyarrow does not tell."""

    def field(table: int, number: int) -> int:
        """Where a field of a flatbuffer's table stands; 0: it is not there."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", metadata, 0)[0], 2)
    return bool(field(header + struct.unpack_from("<I", metadata, header)[0], 3))


def read_settings(text: bytes) -> RequestConfig:
    """A request's settings from JSON. Raises ValueError that names what is wrong with them."""
    try:
        return RequestConfig.model_validate(json.loads(text))
    except ValidationError as error:
        raise ValueError("; ".join(explain(item) for item in error.errors())) from None
    except ValueError as error:  # no JSON
        raise ValueError(f"the request's settings are no JSON: {error}") from None


def explain(item: object) -> str:
    """One of pydantic's errors as: where, what was found, what was expected."""
    assert isinstance(item, dict)
    path = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{path}: no such option"
    if item["type"] == "missing":
        return f"{path}: is missing and has no default"
    message = item["msg"].removeprefix("Value error, ")
    found = repr(item["input"])
    return f"{path}: found {found if len(found) < 100 else f'{found[:100]}…'}: {message}" if path else message


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


SCHEMAS = {"generate": PROMPT_SCHEMA, "score": SEQUENCE_SCHEMA}
"""What each of a teacher's methods is asked with."""
