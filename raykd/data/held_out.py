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
from raykd.data.offline_files import READ_ROWS, FileIndex, Kind, open_parquet, read_lines, take_batches
from raykd.data.offline_tokens import prompt_text
from raykd.data.prompt_rows import Reject, load_tokenizer
from raykd.data.sources import PromptSet
from raykd.data.uids import hash_uid
from raykd.types import Mark
from teacher_serving.identity import vocabulary_size

NO_PROMPT = -1
"""Hash of a row whose prompt cannot be told: whoever reads the row rejects it, and says why."""


def prompt_hashes(path: str, kind: Kind, positions: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Hash [N] of the prompt of each of these rows of a file, int64.

    `positions`: int64 [N] of its FileIndex, rising. `tokenizer`: of the file's vocabulary.
    """
    if kind == "jsonl":
        blocks = range(0, len(positions), READ_ROWS)
        rows = (row for start in blocks for row in read_lines(path, positions[start : start + READ_ROWS]))
        return np.array([_of_row(row, tokenizer) for row in rows], np.int64)
    return np.array(list(_of_parquet(path, kind, positions, tokenizer)), np.int64)


def held_out_hashes(prompts: PromptSet, tokenizer_folder: str) -> np.ndarray:
    """Hashes of the held-out prompts of a run, int64 in rising order. `tokenizer_folder`: the teacher's."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = prompts.read(held_out=True)["prompt_ids"]
    return np.unique(np.array([hash_of_ids(row.values.to_numpy(), tokenizer) for row in ids], np.int64))


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


def _of_parquet(path: str, kind: Kind, positions: np.ndarray, tokenizer: Any) -> Iterator[int]:
    with open_parquet(path) as file:
        if kind == "rows":
            for batch in take_batches(file, path, positions):
                yield from (_of_row(row, tokenizer) for row in batch.to_pylist())
            return
        columns = ("prompt_ids",) if kind == "teacher" else ("input_ids", "marks")
        for batch in take_batches(file, path, positions, columns):
            for place in range(batch.num_rows):
                ids, *marks = (_numbers(batch.column(name)[place].values) for name in columns)
                yield hash_of_ids(ids[: _first_response(*marks)] if marks else ids, tokenizer)


def _numbers(values: pa.Array | None) -> np.ndarray:
    return np.empty(0, np.int64) if values is None else values.to_numpy(zero_copy_only=False)


def _first_response(marks: np.ndarray) -> int:
    written = np.flatnonzero(marks & int(Mark.RESPONSE | Mark.LATENT))
    return int(written[0]) if len(written) else 0
