"""One shard of the user's rows to part files of prepared prompts: what a task of `sources.py` does.

In:  a Shard and the rules of the run.
Out: Parquet files of PROMPT_ROW_SCHEMA, at most PART_ROWS rows each, and a ShardResult of ids, sizes and reasons.

Where there are several teachers (teacher.kind: several), a row's field `teacher_id` names the one that answers it; rows
without are dealt out by the teachers' weights. Any other teacher takes no notice of the field.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykd.data.answer_generation import NotSelected
from raykd.data.chat import tokenize_row
from raykd.data.conversation import RowError
from raykd.data.readers import RawRow, Shard, read_rows
from raykd.data.uids import hash_uid
from teacher_serving.several import teacher_for
from teacher_serving.types import FOR_TEACHER

PROMPT_ROW_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("key", pa.string()),  # the row's own id, or file:line
        ("messages_json", pa.string()),
        ("tools_json", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("recorded_ids", pa.list_(pa.int32())),  # null when the teacher writes
        ("response_mask", pa.list_(pa.bool_())),  # null when the teacher writes
        ("held_out", pa.bool_()),
        ("caws_tier", pa.int8()),  # 0: the row names none
        (FOR_TEACHER, pa.string()),  # who answers the row; null where there is but one teacher
    ]
)
"""`raykd.types.Prompt` as Arrow, and who is asked."""

PART_ROWS = 256
ROW_GROUP_ROWS = 32


@dataclass(frozen=True)
class RowRules:
    """What decides how a row becomes a prompt."""

    tokenizer: str  # folder
    completions: Literal["teacher", "recorded"]
    max_tokens: int  # of the prompt (teacher), of prompt and recorded part together (recorded)
    on_long_prompt: Literal["reject", "truncate_left"]
    answers_only: bool = False  # supervise the answers to tool results alone (stage answer)
    teachers: tuple[tuple[str, float], ...] = ()  # names and weights where there are several
    teacher_seed: int = 0  # of the choice between them


class Reject(NamedTuple):
    """A row that is not used, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class ShardResult:
    """What the driver hears of a shard of N usable rows. No text but reasons."""

    source: str  # the user's file
    part: np.ndarray  # int32 [N] number of the row's part file
    row: np.ndarray  # int32 [N] row within it
    line: np.ndarray  # int64 [N]
    uid: np.ndarray  # int64 [N]
    key_hash: np.ndarray  # int64 [N] of file and key: equal for rows with the same id
    prompt_hash: np.ndarray  # int64 [N] of the rendered prompt: equal for the same conversation
    num_tokens: np.ndarray  # int32 [N] of the prompt
    num_truncated: int
    rejected: list[Reject]
    not_selected: list[Reject] = field(default_factory=list)  # usable, but with nothing of what the stage is about


@dataclass
class _Shelf:
    """Rows on their way to part files, and the columns of the ShardResult so far."""

    stem: Path
    pending: list[dict[str, Any]] = field(default_factory=list)
    columns: list[tuple[int, ...]] = field(default_factory=list)
    num_parts: int = 0

    def add(self, row: dict[str, Any], line: int, key_hash: int, prompt_hash: int) -> None:
        numbers = (line, row["uid"], key_hash, prompt_hash, len(row["prompt_ids"]))
        self.columns.append((self.num_parts, len(self.pending), *numbers))
        self.pending.append(row)
        if len(self.pending) == PART_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            table = pa.Table.from_pylist(self.pending, schema=PROMPT_ROW_SCHEMA)
            write_table(Path(part_file(self.stem, self.num_parts)), table)
            self.num_parts += 1
            self.pending = []


class Work(NamedTuple):
    """A shard to prepare: its rows become the files `<stem>-<part>.parquet`."""

    shard: Shard
    stem: str
    held_out: bool


def prepare_shards(work: Sequence[Work], rules: RowRules) -> list[ShardResult]:
    """Prepare shards one after the other. Raises DataError where a file cannot be read."""
    tokenizer = load_tokenizer(rules.tokenizer)
    return [prepare_shard(*item, tokenizer, rules) for item in work]


def prepare_shard(shard: Shard, stem: str, held_out: bool, tokenizer: Any, rules: RowRules) -> ShardResult:
    """Turn the rows of a shard into part files."""
    shelf = _Shelf(Path(stem))
    rejected: list[Reject] = []
    not_selected: list[Reject] = []
    num_truncated = 0
    for raw in read_rows(shard):
        try:
            row, truncated = _prompt_row(raw, shard.file.name, held_out, tokenizer, rules)
        except RowError as error:
            kind = not_selected if isinstance(error, NotSelected) else rejected
            kind.append(Reject(str(shard.file.path), raw.line, str(error)))
            continue
        num_truncated += truncated
        key_hash = hash_uid(shard.file.name, row["key"])
        shelf.add(row, raw.line, key_hash, hash_uid(row["prompt_ids"]))
    shelf.flush()
    columns = np.array(shelf.columns, np.int64).reshape(-1, 7).T
    part, row_number, line, uid, key_hash, prompt_hash, num_tokens = columns
    return ShardResult(
        source=str(shard.file.path),
        part=part.astype(np.int32),
        row=row_number.astype(np.int32),
        line=line,
        uid=uid,
        key_hash=key_hash,
        prompt_hash=prompt_hash,
        num_tokens=num_tokens.astype(np.int32),
        num_truncated=num_truncated,
        rejected=rejected,
        not_selected=not_selected,
    )


def _prompt_row(raw: RawRow, file: str, held_out: bool, tokenizer: Any, rules: RowRules) -> tuple[dict[str, Any], bool]:
    """The row of PROMPT_ROW_SCHEMA, and whether its beginning was cut off. Raises RowError.

    The uid hashes file name, key and the very ids the teacher is given: the same on every machine, and another one as soon
    as the row, the template or the kind of completion changes, so that kept output is never taken for another prompt's.
    """
    if raw.error:
        raise RowError(raw.error)
    own_id = raw.value.get("id")
    if own_id is not None and not isinstance(own_id, str | int):
        raise RowError(f"`id` is a {type(own_id).__name__}; expected a string or an integer")
    key = f"{file}:{raw.line}" if own_id is None else str(own_id)
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"`id` holds an unpaired surrogate at character {error.start}, expected valid Unicode") from error
    tokenized = tokenize_row(
        tokenizer,
        raw.value,
        uid=0,
        key=key,
        completions=rules.completions,
        max_tokens=rules.max_tokens,
        overlong=rules.on_long_prompt,
        held_out=held_out,
        answers_only=rules.answers_only,
    )
    prompt = tokenized.prompt
    row = {name: getattr(prompt, name) for name in PROMPT_ROW_SCHEMA.names if name != FOR_TEACHER}
    recorded = [ids for ids in (prompt.recorded_ids, prompt.response_mask) if ids is not None]
    row["uid"] = hash_uid(file, key, prompt.prompt_ids, *recorded)
    if rules.teachers:
        row[FOR_TEACHER] = _teacher_of(raw.value, row["uid"], rules)
        row["uid"] = hash_uid(str(row["uid"]), row[FOR_TEACHER])  # another teacher's answer is not this row's
    return row, tokenized.truncated_tokens > 0


def _teacher_of(value: Mapping[str, Any], uid: int, rules: RowRules) -> str:
    """Who of several answers the row: the one it names, or one by the weights. Raises RowError."""
    weights = dict(rules.teachers)
    named = value.get("teacher_id")
    if named is None:
        return teacher_for(uid, weights, rules.teacher_seed)
    if not isinstance(named, str) or named not in weights:
        raise RowError(f"`teacher_id` is {named!r}; expected one of teacher.teachers: {', '.join(weights)}")
    return named


def part_file(stem: str | Path, part: int) -> str:
    """Name of a part file."""
    return f"{stem}-{part:05d}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is either whole or not there, in row groups small enough to read single rows back."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary, row_group_size=ROW_GROUP_ROWS, compression="zstd")
    os.replace(temporary, path)


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder, once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
