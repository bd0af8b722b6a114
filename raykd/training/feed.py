"""Rows for the next step: what a rank takes from the stream, how it is cut into micro-batches, how long it waited.

In:  an iterator over Arrow tables of EXAMPLE_SCHEMA of any size, held-out rows among them.
Out: lists of `Batch`, one list per optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from raykd.data.collate import collate_kd_batch, split_micro_batches
from raykd.types import EXAMPLE_SCHEMA, Batch, Mark


@dataclass(frozen=True)
class StepRows:
    """A rank's part of one optimizer step, on the host."""

    batches: list[Batch]  # empty when this rank has run dry
    uid: np.ndarray  # int64 [B]
    table: pa.Table  # EXAMPLE_SCHEMA
    numbers: dict[str, float]  # sequences, tokens, seconds waited


class Feed:
    """Takes `rows_per_step` training rows at a time from the stream and keeps the held-out rows that pass by."""

    def __init__(self, tables: Iterator[pa.Table], rows_per_step: int, max_tokens: int, pad_id: int):
        """`max_tokens`: padded tokens of a micro-batch. `tables` may be endless; nothing is read before `next_step`."""
        self.held_out: list[pa.Table] = []
        self._tables = tables
        self._rows_per_step = rows_per_step
        self._max_tokens = max_tokens
        self._pad_id = pad_id
        self._waiting = EXAMPLE_SCHEMA.empty_table()

    def next_step(self) -> StepRows:
        """The next rows, waiting for the teacher where need be; fewer at the end of the stream, then none, for ever."""
        start = time.perf_counter()
        while len(self._waiting) < self._rows_per_step and (table := next(self._tables, None)) is not None:
            held_out = table["held_out"].to_numpy()
            self.held_out.append(table.filter(pa.array(held_out)))
            self._waiting = pa.concat_tables([self._waiting, table.filter(pa.array(~held_out))])
        waited = time.perf_counter() - start
        rows = self._waiting.slice(0, self._rows_per_step)
        self._waiting = self._waiting.slice(self._rows_per_step)
        return StepRows(self.batches(rows), rows["uid"].to_numpy(), rows, _numbers(rows) | {"wait/teacher_s": waited})

    def batches(self, rows: pa.Table) -> list[Batch]:
        """Cut rows into micro-batches of similar lengths within the token budget."""
        if len(rows) == 0:
            return []
        lengths, _ = _lists(rows["input_ids"])
        return [collate_kd_batch(rows.take(index), self._pad_id) for index in split_micro_batches(lengths, self._max_tokens)]

    def idle_batch(self) -> Batch:
        """One token that nothing supervises: lets a rank without rows take part in the collectives of a step."""
        ids = torch.full((1, 1), self._pad_id)
        none = torch.empty(0, dtype=torch.int64)
        return Batch(
            uid=none,
            input_ids=ids,
            attention_mask=torch.ones(1, 1, dtype=torch.bool),
            marks=torch.zeros(1, 1, dtype=torch.int32),
            response_index=none,
            response_source=none.to(torch.int8),
            topk_ids=none.reshape(0, 0),
            topk_logprobs=torch.empty(0, 0),
            log_tail=torch.empty(0),
            has_teacher=none.to(torch.bool),
        )


def _numbers(rows: pa.Table) -> dict[str, float]:
    """What the rows amount to, for the metrics."""
    lengths, marks = _lists(rows["marks"])
    is_response = (marks & Mark.RESPONSE) != 0
    came_live = rows["teacher_seconds"].to_numpy() > 0  # not from the cache
    return {
        "sequences": float(len(rows)),
        "tokens": float(lengths.sum()),
        "response_tokens": float(np.count_nonzero(is_response)),
        "teacher_tokens": float(np.count_nonzero(is_response & np.repeat(came_live, lengths))),
        "wait/trainer_s": float(rows["teacher_wait_seconds"].to_numpy().sum()),
    }


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists of a column without nulls, and their values end to end."""
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    return lengths, lists.flatten().to_numpy()
