"""Offline data on its way to a file: rows of the teacher's output, and spans for rows that lack them.

In:  prompt rows with the teacher's columns (as the stream's first stages make them), or a JSONL file.
Out: a JSONL file whose first line is a header with the rows' fingerprint; or Parquet of the same rows.

A row holds tokens, scores and hidden states exactly; in JSONL the texts too, for people and for other tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykd.data.conversation import RowError
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import known_ids, padding_to_tail
from raykd.data.integration import ResultIndex
from raykd.data.offline_fields import gather_fields, read_text
from raykd.data.offline_files import index_file
from raykd.data.offline_rows import read_context
from raykd.data.offline_tokens import is_recorded
from raykd.data.process_targets import find_turn_spans
from raykd.data.prompt_rows import PROMPT_ROW_SCHEMA, ROW_GROUP_ROWS
from raykd.data.readers import parse_line
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA

FORMAT = "raykd offline 1"
_UNKNOWN = "0" * 64


class ParquetWriter:
    """Writes prompt rows with the teacher's columns; the file appears when the block is left without an error."""

    def __init__(self, path: str | Path, header: Mapping[str, str]):
        """`header`: what stands in the metadata of the schema."""
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        names = ("uid", "key", "messages_json", "tools_json", "response_mask", "caws_tier")
        fields = [PROMPT_ROW_SCHEMA.field(name) for name in names]
        fields += [field for field in TEACHER_OUTPUT_SCHEMA if field.name != "uid"]
        self._schema = pa.schema(fields, metadata=dict(header))
        self.num_rows = 0

    def __enter__(self) -> Self:
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._stream = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        return self

    def write(self, rows: pa.Table) -> None:
        """Rows in their order; other columns are left out."""
        self._stream.write_table(rows.select(self._schema.names).cast(self._schema), row_group_size=ROW_GROUP_ROWS)
        self.num_rows += rows.num_rows

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink()


class JsonlWriter:
    """Writes rows behind a header; the file appears with its fingerprint when the block is left without an error."""

    def __init__(self, path: str | Path, header: Mapping[str, Any]):
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._header = {**header, "format": FORMAT, "dataset_fingerprint": _UNKNOWN}
        self._digest = hashlib.sha256()
        self.num_rows = 0

    def __enter__(self) -> Self:
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._temporary.open("wb")
        self._stream.write(self._header_line())
        return self

    def write(self, row: Mapping[str, Any] | bytes) -> None:
        """A row, or a line as it is."""
        line = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._digest.update(line)
        self._stream.write(line)
        self.num_rows += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._header["dataset_fingerprint"] = self._digest.hexdigest()  # as long as the zeros that it replaces
            self._stream.seek(0)
            self._stream.write(self._header_line())
        self._stream.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink()

    def _header_line(self) -> bytes:
        return json.dumps({"__header__": self._header}, ensure_ascii=False).encode() + b"\n"


def offline_rows(rows: pa.Table, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of PROMPT_ROW_SCHEMA with the columns of TEACHER_OUTPUT_SCHEMA as rows of the JSONL form.

    The teacher's mass on ids that are no tokens is in the tail, as in examples: whoever reads the file may refuse such ids.
    """
    is_token = known_ids(tokenizer, len(tokenizer))
    for row in rows.to_pylist():
        output_ids = np.array(row["output_ids"], np.int32)
        offline = {
            "id": row["key"],
            "uid": row["uid"],
            "prompt": decode_tokens(tokenizer, np.array(row["prompt_ids"], np.int32)).text,
            "teacher_text": decode_tokens(tokenizer, output_ids).text,
            "messages": json.loads(row["messages_json"]),
            "tools": json.loads(row["tools_json"]),
            **{name: row[name] for name in ("prompt_ids", "output_ids", "finish_reason", "teacher_id")},
        }
        if row["response_mask"] is not None:
            offline["response_mask"] = [int(written) for written in row["response_mask"]]
        if tier := row.get("caws_tier"):
            offline["metadata"] = {"caws_tier": tier}
        if row["top_k"]:
            scores = (
                np.array(row["topk_ids"]),
                np.array(row["topk_logprobs"], np.float16),
                np.array(row["log_tail"], np.float32),
            )
            topk_ids, topk_logprobs, log_tail = padding_to_tail(*scores, is_token)
            offline |= {"top_k": row["top_k"], "topk_ids": topk_ids.tolist()}
            offline |= {"topk_logprobs": _without_infinity(topk_logprobs), "log_tail": _without_infinity(log_tail)}
        if num_layers := row.get("num_hidden_layers_shipped"):
            num_tokens = len(row["prompt_ids"]) + len(row["output_ids"])
            states = np.array(row["hidden_states"], np.float64).reshape(num_layers, num_tokens, -1).astype(object)
            states[states != states] = None  # NaN: no state there
            offline["teacher_hidden_states"] = states.tolist()
        yield offline


def _without_infinity(values: np.ndarray) -> list[float | None]:
    """JSON has no infinity: null stands for it."""
    return [None if value == -np.inf else value for value in values.tolist()]


class AddedTargets(NamedTuple):
    """What `add_process_targets` made of a file."""

    file: str  # the new one
    num_rows: int
    num_added: int  # rows that got spans
    reasons: list[tuple[int, str]]  # line and reason of those that cannot have any; they are kept as they are


def add_process_targets(path: str | Path) -> AddedTargets:
    """Write `<name>.targets.jsonl` beside a JSONL file: the same rows, with `spans` where they had none.

    Spans are those that reading the file without them would find; in the file they can be looked at and corrected. Raises
    DataError where the file cannot be read or its header does not fit.
    """
    path = Path(path)
    header = {name: value for name, value in index_file(path).header.items() if name not in ("__header__", "dataset_sha256")}
    target = path.with_name(f"{path.stem}.targets.jsonl")
    num_added, reasons = 0, []
    with path.open("rb") as stream, JsonlWriter(target, header) as writer:
        for line, text in enumerate(stream, 1):
            raw = parse_line(line, text) if text.strip() else None
            if raw is None or (not writer.num_rows and "__header__" in raw.value):
                continue
            try:
                if raw.error:
                    raise RowError(raw.error)
                spans = _spans_for(raw.value)
            except RowError as error:
                reasons.append((line, str(error)))
                spans = None
            num_added += spans is not None
            writer.write(text.rstrip(b"\r\n") + b"\n" if spans is None else {**raw.value, "spans": spans})
    return AddedTargets(str(target), writer.num_rows, num_added, reasons)


def _spans_for(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Spans of a row's response; None where it has some. Raises RowError where it cannot have any."""
    fields = gather_fields(row)
    if "spans" in fields:
        return None
    if is_recorded(fields):
        raise RowError("a recorded conversation: its turns are searched when it is read")
    text = read_text(fields.get("teacher_text"), "teacher_text")
    messages, tools = read_context(fields)
    results = [ResultIndex([m["content"]]) for m in messages if m["role"] == "tool" and m.get("content")]
    names = frozenset(tool["function"]["name"] for tool in tools)
    return find_turn_spans(text, results, names)._asdict()
