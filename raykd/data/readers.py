"""Rows out of the user's files, whatever their format, with their line numbers; nothing is inferred about their content.

In:  a path: JSONL, Parquet, a folder of either, or a Hugging Face dataset saved to disk.
Out: shards (pieces of a file that one task reads) and the raw rows of a shard. Raises DataError for unusable files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

Format = Literal["jsonl", "parquet", "arrow"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
SCAN_BYTES = 1 << 20


class DataError(ValueError):
    """The user's data cannot be used as it is; says what was found, what is expected and what to change."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `name` is its path below what the user gave: the same on every machine."""

    path: Path
    name: str
    format: Format


@dataclass(frozen=True)
class Shard:
    """A piece of a file: [start, stop) in bytes (jsonl), row groups (parquet) or record batches (arrow)."""

    file: SourceFile
    start: int
    stop: int
    first_line: int  # 1-based line (or row) of the file that the shard begins with


class RawRow(NamedTuple):
    """A row as read: its value, or why it could not be read."""

    line: int  # 1-based
    value: dict[str, Any]
    error: str | None = None


def find_files(path: str | Path, option: str) -> list[SourceFile]:
    """The files behind a path, in the order of their names. `option` is the setting to name in an error.

    Raises DataError where nothing is there or may be read, nothing of it is of a known format, or a file is empty.
    """
    try:
        return _find_files(Path(path), option)
    except OSError as error:
        raise DataError(f"{option}={path} cannot be read: {error}; correct the path or its permissions") from error


def _find_files(path: Path, option: str) -> list[SourceFile]:
    if not path.exists():
        raise DataError(f"{option}={path}: nothing there; expected a JSONL or Parquet file, or a folder")
    if path.is_file():
        files = [path]
    elif (path / "state.json").is_file():
        return _dataset_files(path, option)
    elif (path / "dataset_dict.json").is_file():
        splits = _listed(path / "dataset_dict.json", "splits", option)
        choices = ", ".join(str(path / split) for split in splits)
        raise DataError(f"{option}={path} is a Hugging Face dataset of several splits; expected one of {choices}")
    else:
        files = sorted(p for p in _files_below(path) if p.suffix in FORMATS and not p.name.startswith((".", "_")))
    if not files:
        raise DataError(f"{option}={path}: no {', '.join(FORMATS)} file in this folder, and no Hugging Face dataset")
    unknown = [p for p in files if p.suffix not in FORMATS]
    if unknown:
        raise DataError(f"{option}={unknown[0]}: unknown format {unknown[0].suffix!r}; expected {', '.join(FORMATS)}")
    root = path.parent if path.is_file() else path
    found = [SourceFile(p, p.relative_to(root).as_posix(), FORMATS[p.suffix]) for p in files]
    return _none_empty(found, option)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files; a folder that may not be looked into is an error, where `rglob` would leave it out."""

    def stop(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=stop):
        yield from (Path(place) / name for name in names)


def _listed(file: Path, key: str, option: str) -> Any:
    """A list in the JSON files by which a Hugging Face dataset describes itself."""
    try:
        return json.loads(file.read_text())[key]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{option}: {file} has no {key!r} as a Hugging Face dataset has ({error}); save it again") from error


def _dataset_files(folder: Path, option: str) -> list[SourceFile]:
    names = [entry["filename"] for entry in _listed(folder / "state.json", "_data_files", option)]
    return _none_empty([SourceFile(folder / name, name, "arrow") for name in names], option)


def _none_empty(files: list[SourceFile], option: str) -> list[SourceFile]:
    for file in files:
        if not file.path.is_file():
            raise DataError(f"{option}: {file.path} is not there though its dataset, or a link, names it")
        with file.path.open("rb") as stream:
            if not stream.read(1):
                raise DataError(f"{option}: {file.path} is empty; expected at least one row")
    return files


def cut(file: SourceFile, shard_bytes: int) -> list[Shard]:
    """Shards of about `shard_bytes`, in order. Raises DataError where the file cannot be read."""
    cutters = {"jsonl": _cut_jsonl, "parquet": _cut_parquet, "arrow": _cut_arrow}
    try:
        return cutters[file.format](file, shard_bytes)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read as {file.format}: {error}") from error


def read_rows(shard: Shard) -> Iterator[RawRow]:
    """The rows of a shard in order; blank lines are no rows. Raises DataError where the file cannot be read."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow}
    try:
        yield from readers[shard.file.format](shard)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shard.file.path} cannot be read as {shard.file.format}: {error}") from error


def _cut_jsonl(file: SourceFile, shard_bytes: int) -> list[Shard]:
    """Cut after newlines only, counting them on the way."""
    shards: list[Shard] = []
    start, position, line, first_line = 0, 0, 1, 1
    with file.path.open("rb") as stream:
        while chunk := stream.read(min(SCAN_BYTES, shard_bytes)):
            last = chunk.rfind(b"\n") + 1
            if last and position + last - start >= shard_bytes:
                line += chunk.count(b"\n", 0, last)
                shards.append(Shard(file, start, position + last, first_line))
                start, first_line = position + last, line
                line += chunk.count(b"\n", last)
            else:
                line += chunk.count(b"\n")
            position += len(chunk)
    if position > start:
        shards.append(Shard(file, start, position, first_line))
    return shards


def _read_jsonl(shard: Shard) -> Iterator[RawRow]:
    with shard.file.path.open("rb") as stream:
        stream.seek(shard.start)
        line = shard.first_line
        while stream.tell() < shard.stop:
            text = stream.readline()
            if text.strip():
                yield parse_line(line, text)
            line += 1


def parse_line(line: int, text: bytes) -> RawRow:
    """A JSONL line as a row. Line 1 may begin with a byte-order mark."""
    try:
        value = json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(line, {}, f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return RawRow(line, {}, f"malformed JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # an integer of thousands of digits
        return RawRow(line, {}, f"malformed JSON: {error}")
    except RecursionError:
        return RawRow(line, {}, "malformed JSON: nested too deeply")
    if not isinstance(value, dict):
        return RawRow(line, {}, f"found a JSON {type(value).__name__}; expected an object with messages or prompt")
    return RawRow(line, value)


def _cut_parquet(file: SourceFile, shard_bytes: int) -> list[Shard]:
    metadata = pq.ParquetFile(file.path).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return _group(file, sizes, rows, shard_bytes)


def _read_parquet(shard: Shard) -> Iterator[RawRow]:
    row_groups = list(range(shard.start, shard.stop))
    batches = pq.ParquetFile(shard.file.path).iter_batches(batch_size=256, row_groups=row_groups)
    yield from _typed_rows(batches, shard.first_line)


def _cut_arrow(file: SourceFile, shard_bytes: int) -> list[Shard]:
    with pa.memory_map(str(file.path)) as source, pa.ipc.open_stream(source) as stream:
        batches = [(batch.nbytes, batch.num_rows) for batch in stream]
    return _group(file, [size for size, _ in batches], [rows for _, rows in batches], shard_bytes)


def _read_arrow(shard: Shard) -> Iterator[RawRow]:
    with pa.memory_map(str(shard.file.path)) as source, pa.ipc.open_stream(source) as stream:
        for _ in range(shard.start):
            stream.read_next_batch()
        batches = (stream.read_next_batch() for _ in range(shard.start, shard.stop))
        yield from _typed_rows(batches, shard.first_line)


def _group(file: SourceFile, sizes: list[int], rows: list[int], shard_bytes: int) -> list[Shard]:
    """Consecutive groups of about `shard_bytes`."""
    shards: list[Shard] = []
    start, line, first_line, held = 0, 1, 1, 0
    for index, (size, count) in enumerate(zip(sizes, rows, strict=True)):
        held += size
        line += count
        if held >= shard_bytes or index == len(sizes) - 1:
            shards.append(Shard(file, start, index + 1, first_line))
            start, first_line, held = index + 1, line, 0
    return shards


def _typed_rows(batches: Iterator[pa.RecordBatch], first_line: int) -> Iterator[RawRow]:
    """Rows of typed columns. Structs carry the keys of all rows: those that are null were not there."""
    line = first_line
    for batch in batches:
        for value in _python_rows(batch):
            if isinstance(value, str):
                yield RawRow(line, {}, value)
            else:
                yield RawRow(line, {key: _without_nulls(item) for key, item in value.items() if item is not None})
            line += 1


def _python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Every row as Python values, or the reason why it is none: Arrow does not look whether its strings are UTF-8."""
    try:
        yield from batch.to_pylist()
    except ValueError as error:
        if batch.num_rows == 1:
            word = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that Python cannot hold"
            yield f"{word}: {error}"
        else:
            for row in range(batch.num_rows):
                yield from _python_rows(batch.slice(row, 1))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
