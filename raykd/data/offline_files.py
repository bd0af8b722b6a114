"""Files of offline data: what is in them, found once, and single rows read back without holding a file in memory.

In:  JSONL (rows of `offline_fields.py`, an optional header line), or Parquet: of such rows, of TEACHER_OUTPUT_SCHEMA (with
     the prompts' columns or without), or of EXAMPLE_SCHEMA.
Out: a `FileIndex` per file, 20 bytes a row; examples by (file, position). Stored examples come one by one: no pairs.

A header is the first line that is not blank, an object with `__header__`: true, or the header itself in it. Of its entries
`dataset_fingerprint` (or `dataset_sha256`), the SHA-256 of all other lines that are not blank, and `vocabulary_fingerprint`
are checked. Parquet may have the latter in the metadata of its schema. It says whose ids the rows have (the teacher's, or
the student's where that one has other ids or more tokens), and whose tokens texts are split into; without it the teacher's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykd.data.conversation import RowError
from raykd.data.examples import example_from_row
from raykd.data.offline_rows import RowReader, check_row
from raykd.data.prompt_rows import Reject
from raykd.data.readers import DataError, RawRow, parse_line
from raykd.data.stored_examples import check_types, example_problem, ids_problem, logprobs_problem, with_all_columns
from raykd.types import Example

logger = logging.getLogger(__name__)

Kind = Literal["jsonl", "rows", "teacher", "examples"]
"""jsonl; Parquet of offline rows, of teacher output, of examples."""

READ_ROWS = 32
READ_BYTES = 1 << 20
"""What is in memory of a Parquet file: so many rows, and so many bytes of each column of the file itself."""


@dataclass(frozen=True)
class FileIndex:
    """Where the N usable rows of a file are."""

    path: str
    kind: Kind
    position: np.ndarray  # int64 [N], byte of the line (jsonl) or number of the row (Parquet)
    line: np.ndarray  # int32 [N], 1-based
    uid: np.ndarray  # int64 [N]
    rejected: list[Reject]
    fingerprint: str  # SHA-256 of the rows (jsonl), of uids and layout (Parquet)
    header: Mapping[str, Any]

    @property
    def vocabulary(self) -> str | None:
        """Fingerprint of the vocabulary of its ids; None where the file does not say."""
        return self.header.get("vocabulary_fingerprint")


def index_file(path: str | Path, *vocabularies: str) -> FileIndex:
    """Read a file once and note where its rows are; rows that cannot be used are rejected with line and reason.

    `vocabularies`: fingerprints of those that its ids may be of; none given: any. Raises DataError for a file that cannot be
    read, and for a header that does not fit the rows or the vocabularies.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a JSONL or Parquet file of offline data")
    try:
        index = _index_parquet(path) if path.suffix in (".parquet", ".pq") else _index_jsonl(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    _check_header(path, index, vocabularies)
    return index


def _index_jsonl(path: Path) -> FileIndex:
    found: list[tuple[int, int, int]] = []
    rejected: list[Reject] = []
    digest = hashlib.sha256()
    header: Mapping[str, Any] = {}
    start, is_first = 0, True
    with path.open("rb") as stream:
        for line, text in enumerate(stream, 1):
            position, start = start, start + len(text)
            if not text.strip():
                continue
            raw = parse_line(line, text)
            if is_first and "__header__" in raw.value:
                header = raw.value["__header__"] if isinstance(raw.value["__header__"], dict) else raw.value
            else:
                digest.update(text)
                _note(raw, position, path, found, rejected)
            is_first = False
    fingerprint = digest.hexdigest()
    positions, lines, uids = np.array(found, np.int64).reshape(-1, 3).T
    return FileIndex(str(path), "jsonl", positions, lines.astype(np.int32), uids, rejected, fingerprint, header)


def _note(raw: RawRow, position: int, path: Path, found: list[tuple[int, int, int]], rejected: list[Reject]) -> None:
    """Check a row as far as it goes without a tokenizer, and keep its place or the reason against it."""
    try:
        if raw.error:
            raise RowError(raw.error)
        found.append((position, raw.line, check_row(raw.value)))
    except RowError as error:
        rejected.append(Reject(str(path), raw.line, str(error)))


def _check_header(path: Path, index: FileIndex, vocabularies: Sequence[str]) -> None:
    stated = index.header.get("dataset_fingerprint") or index.header.get("dataset_sha256")
    if stated is not None and stated != index.fingerprint:
        raise DataError(
            f"{path}: the header says dataset_fingerprint {stated}, the rows have {index.fingerprint}: the file was changed "
            "after it was written; write it anew, or remove the entry from the header"
        )
    if index.vocabulary is not None and vocabularies and index.vocabulary not in vocabularies:
        raise DataError(
            f"{path}: its ids are of vocabulary {index.vocabulary}, expected {' or '.join(dict.fromkeys(vocabularies))}"
            ", which the tokenizers have: take that tokenizer, map the ids (raykd.vocabulary.remap_ids), or leave them out "
            "and keep the texts"
        )


def _index_parquet(path: Path) -> FileIndex:
    file = open_parquet(path)
    names = set(file.schema_arrow.names)
    is_teacher_output = {"uid", "prompt_ids", "output_ids", "finish_reason"} <= names
    is_teacher_output &= not names & {"messages", "prompt", "teacher_text"}  # else offline rows with their tokens
    if {"uid", "input_ids", "marks"} <= names or is_teacher_output:
        kind: Kind = "examples" if "marks" in names else "teacher"
        if kind == "examples":
            check_types(path, file.schema_arrow)
        uids = file.read(columns=["uid"])["uid"].to_numpy().astype(np.int64)
        positions, rejected = np.arange(len(uids)), []
    else:
        found: list[tuple[int, int, int]] = []
        rejected: list[Reject] = []
        rows = (row for batch in file.iter_batches(batch_size=READ_ROWS) for row in batch.to_pylist())
        for position, row in enumerate(rows):
            _note(RawRow(position + 1, row), position, path, found, rejected)
        positions, _, uids = np.array(found, np.int64).reshape(-1, 3).T
        kind = "rows"
    digest = hashlib.sha256(np.ascontiguousarray(uids).tobytes())
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    digest.update(json.dumps([[g.num_rows, g.total_byte_size] for g in groups] + sorted(names)).encode())
    lines = (positions + 1).astype(np.int32)
    vocabulary = (file.schema_arrow.metadata or {}).get(b"vocabulary_fingerprint")
    header = {} if vocabulary is None else {"vocabulary_fingerprint": vocabulary.decode()}
    return FileIndex(str(path), kind, positions, lines, uids, rejected, digest.hexdigest(), header)


def read_examples(path: str, kind: Kind, positions: np.ndarray, reader: RowReader) -> list[tuple[Example, ...] | str]:
    """The rows at these positions, in this order: an example each (a pair of them where `RowReader` makes one), or the
    reason why there is none.

    Raises DataError where the file has changed since it was indexed.
    """
    if kind == "jsonl":
        return reader.examples(read_lines(path, positions))
    table = _take(path, positions)
    if kind == "rows":
        return reader.examples(table.to_pylist())
    vocab_size = reader.num_ids
    if kind == "examples":
        table = with_all_columns(table, path)
        return [
            example_problem(table, i, vocab_size)
            or _length_problem(table, i, ("input_ids",), reader)
            or (example_from_row(table, i),)
            for i in range(table.num_rows)
        ]
    return _from_teacher_output(table, reader, vocab_size)


def read_lines(path: str, positions: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a JSONL file by the byte that they begin at. Raises DataError where the file has changed."""
    rows = []
    with open(path, "rb") as stream:
        for position in positions.tolist():
            stream.seek(position)
            raw = parse_line(1 if position == 0 else 2, stream.readline())
            if raw.error:
                raise DataError(f"{path} has changed while it was in use: at byte {position} {raw.error}")
            rows.append(raw.value)
    return rows


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """The file, to be read by `iter_batches`: so much of it is in memory at a time, however large its row groups are."""
    return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)


def _take(path: str, positions: np.ndarray) -> pa.Table:
    """Rows of a Parquet file by number, in the order asked."""
    order = np.argsort(positions, kind="stable")
    with open_parquet(path) as file:
        table = pa.Table.from_batches(take_batches(file, path, positions[order]), file.schema_arrow)
    return table.take(pa.array(np.argsort(order))).combine_chunks()


def take_batches(
    file: pq.ParquetFile, path: str, positions: np.ndarray, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a file of `open_parquet` by number, of some of its columns or all. `positions`: int64 [N], none falling.

    Reads the row groups of these rows, READ_ROWS rows at a time, and nothing behind the last. Raises DataError where the
    file has changed since it was indexed.
    """
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    if len(positions) and positions[-1] >= starts[-1]:
        raise DataError(f"{path} has changed while it was in use: row {positions[-1]} of {starts[-1]} asked for")
    groups, which = np.unique(np.searchsorted(starts, positions, side="right") - 1, return_inverse=True)
    read_starts = np.cumsum([0, *(sizes[group] for group in groups)])
    place = positions - starts[groups][which] + read_starts[which]  # among the rows of these groups
    first = 0
    for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=groups.tolist(), columns=columns):
        here = place[slice(*np.searchsorted(place, [first, first + batch.num_rows]))] - first
        if len(here):
            yield batch.take(pa.array(here))  # a copy: the batch itself goes
        first += batch.num_rows
        if first > place[-1]:
            return


def _from_teacher_output(table: pa.Table, reader: RowReader, vocab_size: int) -> list[tuple[Example, ...] | str]:
    """Rows of the teacher's output; without the prompts' columns its messages and tools are unknown."""
    uids = table["uid"].to_pylist()
    place = table.schema.get_field_index("uid")
    table = table.set_column(place, "uid", pa.array(np.arange(table.num_rows)))
    results: dict[int, tuple[Example, ...] | str] = {}
    for index in range(table.num_rows):
        problem = ids_problem(table, index, ("prompt_ids", "output_ids"), vocab_size)
        problem = problem or ids_problem(table, index, ("topk_ids",), 2**31)  # some may be padding of the teacher's head
        problem = problem or logprobs_problem(table, index, ("topk_logprobs", "log_tail"))
        problem = problem or _length_problem(table, index, ("prompt_ids", "output_ids"), reader)
        if problem:
            results[index] = problem
    built, rejected = reader.build(table.filter(pa.array([i not in results for i in range(len(uids))])))
    results |= dict(zip(rejected["uid"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    for position in range(built.num_rows):
        example = example_from_row(built, position)
        results[example.uid] = (dataclasses.replace(example, uid=uids[example.uid]),)
    return [results[index] for index in range(len(uids))]


def _length_problem(table: pa.Table, index: int, names: Sequence[str], reader: RowReader) -> str | None:
    num_tokens = sum(len(table[name][index].values or ()) for name in names)
    if reader.max_tokens is None or num_tokens <= reader.max_tokens:
        return None
    return f"{num_tokens} tokens, expected at most {reader.max_tokens}; leave the row out or raise the context"
