"""Prompts that are held out: rows of offline files with the same prompt are left out of training.

In:  indexed offline files, in any of their forms; prompts.
Out: a hash of each prompt, and the files without what is held out.

What is compared is text without its white space: one row has its prompt as text, another as messages, a third as tokens of
another vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.data.conversation import RowError
from raykd.data.detokenize import decode_tokens
from raykd.data.offline_fields import gather_fields
from raykd.data.offline_files import READ_ROWS, FileIndex, open_parquet, read_lines
from raykd.data.offline_tokens import prompt_text
from raykd.data.prompt_rows import Reject
from raykd.data.uids import hash_uid
from raykd.types import Mark
from teacher_serving.identity import vocabulary_size

NO_PROMPT = -1
"""Hash of a row whose prompt cannot be told: whoever reads the row rejects it, and says why."""


def prompt_hashes(index: FileIndex, tokenizer: Any) -> np.ndarray:
    """Hash [N] of the prompt of every usable row, int64. `tokenizer`: of the file's vocabulary."""
    if index.kind == "jsonl":
        blocks = range(0, len(index.position), READ_ROWS)
        rows = (row for start in blocks for row in read_lines(index.path, index.position[start : start + READ_ROWS]))
        return np.array([_of_row(row, tokenizer) for row in rows], np.int64)
    return np.array(list(_of_parquet(index, tokenizer)), np.int64)[index.position]


def hash_of_ids(ids: np.ndarray, tokenizer: Any) -> int:
    """Hash of a prompt of tokens [P]."""
    known = not len(ids) or (ids.min() >= 0 and ids.max() < vocabulary_size(tokenizer))
    return _of_text(decode_tokens(tokenizer, ids).text) if known else NO_PROMPT


def leave_out(
    files: Sequence[FileIndex], hashes: Sequence[np.ndarray], held_out: np.ndarray
) -> tuple[list[FileIndex], list[Reject]]:
    """The files without rows whose prompt's hash is in `held_out` [any number], and those rows."""
    kept, left_out = [], []
    for index, of_rows in zip(files, hashes, strict=True):
        also = np.isin(of_rows, held_out[held_out != NO_PROMPT])
        kept.append(replace(index, position=index.position[~also], line=index.line[~also], uid=index.uid[~also]))
        reason = "left out of training: the same prompt is held out (not counted as rejected)"
        left_out += [Reject(index.path, line, reason) for line in index.line[also].tolist()]
    return kept, left_out


def _of_text(text: str) -> int:
    return hash_uid("".join(text.split()))


def _of_row(row: dict[str, Any], tokenizer: Any) -> int:
    try:
        return _of_text(prompt_text(gather_fields(row), tokenizer))
    except RowError:
        return NO_PROMPT


def _of_parquet(index: FileIndex, tokenizer: Any) -> Iterator[int]:
    """Hashes of all rows of the file, in order."""
    with open_parquet(index.path) as file:
        if index.kind == "rows":
            for batch in file.iter_batches(batch_size=READ_ROWS):
                yield from (_of_row(row, tokenizer) for row in batch.to_pylist())
            return
        columns = ("prompt_ids",) if index.kind == "teacher" else ("input_ids", "marks")
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=columns):
            for place in range(batch.num_rows):
                ids, *marks = (_numbers(batch.column(name)[place].values) for name in columns)
                yield hash_of_ids(ids[: _first_response(*marks)] if marks else ids, tokenizer)


def _numbers(values: pa.Array | None) -> np.ndarray:
    return np.empty(0, np.int64) if values is None else values.to_numpy(zero_copy_only=False)


def _first_response(marks: np.ndarray) -> int:
    written = np.flatnonzero(marks & int(Mark.RESPONSE | Mark.LATENT))
    return int(written[0]) if len(written) else 0
