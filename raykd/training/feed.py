"""Rows for the next step: what a rank takes from the stream, how it is cut into micro-batches, how long it waited.

In:  an iterator over Arrow tables of EXAMPLE_SCHEMA of any size, held-out rows among them.
Out: lists of `Batch`, one list per optimizer step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import torch

from raykd.data.collate import collate_kd_batch, split_micro_batches
from raykd.data.pairs import begins_row
from raykd.types import EXAMPLE_SCHEMA, Batch, Mark


@dataclass(frozen=True)
class StepRows:
    """A rank's part of one optimizer step, on the host."""

    batches: list[Batch]  # empty when this rank has run dry
    uid: np.ndarray  # int64, of the rows of the data: a pair counts by its preferred half
    table: pa.Table  # EXAMPLE_SCHEMA
    numbers: dict[str, float]  # sequences, tokens, seconds waited


class Feed:
    """Takes `rows_per_step` training rows at a time from the stream and keeps the held-out rows that pass by.

    A row with a pair of examples counts as one, and the two stay in one step and one micro-batch.
    """

    def __init__(self, tables: Iterator[pa.Table], rows_per_step: int, max_tokens: int, pad_id: int):
        """`max_tokens`: padded tokens of a micro-batch. `tables` may be endless; nothing is read before `next_step`."""
        self.held_out: list[pa.Table] = []
        self.missing: Counter[str] = Counter()  # training rows by `Example.missing`
        self._tables = tables
        self._rows_per_step = rows_per_step
        self._max_tokens = max_tokens
        self._pad_id = pad_id
        self._waiting = EXAMPLE_SCHEMA.empty_table()

    def next_step(self) -> StepRows:
        """The next rows, waiting for the teacher where need be; fewer at the end of the stream, then none, for ever."""
        start = time.perf_counter()
        while self._num_whole() < self._rows_per_step and (table := next(self._tables, None)) is not None:
            held_out = table["held_out"].to_numpy()
            if held_out.any():
                self.held_out.append(table.filter(pa.array(held_out)))
            self._waiting = pa.concat_tables([self._waiting, table.filter(pa.array(~held_out))])
        waited = time.perf_counter() - start
        starts = np.flatnonzero(begins_row(self._waiting))
        end = int(starts[self._rows_per_step]) if len(starts) > self._rows_per_step else len(self._waiting)
        rows, self._waiting = self._waiting.slice(0, end), self._waiting.slice(end)
        uid = rows["uid"].to_numpy()[begins_row(rows)]
        self.missing.update({entry["values"]: entry["counts"] for entry in rows["missing"].value_counts().to_pylist()})
        return StepRows(self.batches(rows), uid, rows, _numbers(rows) | {"wait/teacher_s": waited})

    def _num_whole(self) -> int:
        """Rows that wait; not the last one while its rejected half is still to come."""
        cut = len(self._waiting) > 0 and self._waiting["pair"][-1].as_py() > 0
        return int(begins_row(self._waiting).sum()) - cut

    def batches(self, rows: pa.Table) -> list[Batch]:
        """Cut rows into micro-batches of similar lengths within the token budget."""
        if len(rows) == 0:
            return []
        lengths, _ = _lists(rows["input_ids"])
        parts = split_micro_batches(lengths, self._max_tokens, rows["pair"].to_numpy())
        return [collate_kd_batch(rows.take(index), self._pad_id) for index in parts]

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


def mixed(
    streams: Mapping[str, Iterator[pa.Table]], numbers: Mapping[str, int], rows_per_step: int, steps_made: int = 0
) -> Iterator[pa.Table]:
    """One stream of several, in slices: every `rows_per_step` training rows are of each in the ratio of `numbers`, to within
    a row; where one is dry the others go on.

    Held-out rows pass with the training row behind them. The two of a pair stay together, and as in `Feed` count as one
    row. After `steps_made` steps it goes on as it would have without a break. No more of a stream is waited for than its
    share, but for the first table of each: to begin a stream of Ray Train's waits for all ranks, so they begin in the same
    order.
    """
    slices = [_Slices(stream) for stream in streams.values()]
    bounds = np.cumsum([0, *(numbers[name] for name in streams)])
    given = np.diff(bounds * steps_made * rows_per_step // bounds[-1])
    for step in count(steps_made + 1):
        due = np.diff(bounds * step * rows_per_step // bounds[-1])  # rows of each by the end of the step
        for stream, num_rows in zip(slices, np.maximum(due - given, 0).tolist(), strict=True):
            yield from stream.take(num_rows)
        given = np.maximum(due, given)
        if all(stream.is_dry for stream in slices):
            return


class _Slices:
    """A stream cut at will; reads its first table when it is made."""

    def __init__(self, tables: Iterator[pa.Table]):
        self._tables = tables
        self._table = next(tables, None)

    @property
    def is_dry(self) -> bool:
        """The end was seen: nothing is left."""
        return self._table is None

    def take(self, num_rows: int) -> Iterator[pa.Table]:
        """The next `num_rows` training rows, with what stands before them; fewer at the end of the stream."""
        is_cut = False  # the last row handed on waits for its rejected half
        while self._table is not None and (num_rows or is_cut or self._table.num_rows):
            table = self._table
            starts = np.flatnonzero(begins_row(table) & ~table["held_out"].to_numpy())
            end = int(starts[num_rows]) if len(starts) > num_rows else table.num_rows
            if end:
                yield table.slice(0, end)
                is_cut = table["pair"][end - 1].as_py() > 0
            self._table = table.slice(end)
            if len(starts) > num_rows:
                return
            num_rows -= len(starts)
            if num_rows or is_cut:  # else what comes next is not waited for: it is not due
                self._table = next(self._tables, None)
