"""Offline data as a dataset: examples from many files, mixed by weight, in an order that a restart goes on with.

In:  JSONL and Parquet files (formats: `offline_files.py`, fields: `offline_fields.py`) with a weight each.
Out: `KDDataset`, which torch's DataLoader reads with `collate_kd_batch`; its examples are those of the stream.

    dataset = KDDataset({"a.jsonl": 1.0, "b.parquet": 0.25}, tokenizer, seed=3)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=partial(collate_kd_batch, pad_id=0))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from raykd.data.examples import Wanted
from raykd.data.offline_files import FileIndex, index_file, read_examples
from raykd.data.offline_rows import RowReader
from raykd.data.pairs import numbered
from raykd.data.prompt_rows import Reject
from raykd.data.readers import DataError
from raykd.data.uids import epoch_uid
from raykd.types import Example

logger = logging.getLogger(__name__)

BLOCK_ROWS = 32
"""Rows read together: a file is opened and its spans are searched once per so many."""


@dataclass(frozen=True)
class OfflineIndex:
    """The N usable rows of all files, every uid once."""

    files: tuple[FileIndex, ...]
    weights: tuple[float, ...]
    file: np.ndarray  # int32 [N], index into `files`; rows of a file stand together, in its order
    row: np.ndarray  # int32 [N], index into the file's arrays
    uid: np.ndarray  # int64 [N]
    rejected: list[Reject]

    @property
    def fingerprint(self) -> str:
        """Hash of what all files hold, and of their weights."""
        parts = [[file.fingerprint, weight] for file, weight in zip(self.files, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check(self, max_rejected_fraction: float) -> None:
        """Raise DataError where nothing is left or too large a share is rejected."""
        total = len(self.uid) + len(self.rejected)
        reasons = "".join(f"\n  {file}:{line}: {reason}" for file, line, reason in self.rejected[:3])
        if not len(self.uid) or len(self.rejected) > max_rejected_fraction * total:
            raise DataError(
                f"{len(self.rejected)} of {total} offline rows are unusable, more than {max_rejected_fraction} of them "
                f"(data.max_rejected_fraction) or all there are; the first:{reasons}"
            )


def join_indexes(files: Sequence[FileIndex], weights: Sequence[float]) -> OfflineIndex:
    """One index of several files; a row that is there already, in this file or an earlier one, is rejected."""
    file = np.repeat(np.arange(len(files), dtype=np.int32), [len(index.uid) for index in files])
    row = np.concatenate([np.arange(len(index.uid), dtype=np.int32) for index in files])
    uid = np.concatenate([index.uid for index in files])
    keep = np.zeros(len(uid), bool)
    keep[np.unique(uid, return_index=True)[1]] = True
    rejected = [reject for index in files for reject in index.rejected]
    for i in np.flatnonzero(~keep).tolist():
        index = files[int(file[i])]
        reason = f"duplicate: an earlier row has the same uid or content (uid {uid[i]})"
        rejected.append(Reject(index.path, int(index.line[row[i]]), reason))
    return OfflineIndex(tuple(files), tuple(weights), file[keep], row[keep], uid[keep], rejected)


def epoch_order(index: OfflineIndex, seed: int, epoch: int, *, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Rows [M] of an epoch in their order (numbers into the index), and the uid of each in this epoch.

    A file of weight w gives each of its rows w times an epoch: 2.5 is every row twice and half of them once more, 0.1 a
    tenth of them. Which ones goes round from epoch to epoch, so that all are seen equally often. Every time a row comes it
    has a uid of its own; the first time, where no file has a weight above 1, its own.
    """
    rows, passes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, weight in enumerate(index.weights):
        own = np.flatnonzero(index.file == number)
        if not len(own):
            continue
        whole, rest = divmod(max(round(weight * len(own)), 1), len(own))
        copies = whole + (rest > 0)
        turn = np.random.default_rng([seed, number]).permutation(own)
        part = np.take(turn, np.arange(epoch * rest, (epoch + 1) * rest), mode="wrap")
        rows.append(np.concatenate([np.tile(own, whole), part]))
        passes.append(epoch * copies + np.concatenate([np.repeat(np.arange(whole), len(own)), np.full(rest, whole)]))
    order, times = np.concatenate(rows), np.concatenate(passes)
    if shuffle:
        place = np.random.default_rng([seed, epoch, len(index.files)]).permutation(len(order))
        order, times = order[place], times[place]
    return order, epoch_uid(index.uid[order], times)


class KDDataset(IterableDataset[Example]):
    """Examples of offline files, one epoch per iteration; the two of a pair (pairs.py) one after the other.

    Rows are read when their turn comes; memory holds 20 bytes a row. What has no example is skipped, logged, kept in
    `rejected_file`, and too much of it ends the iteration.
    """

    def __init__(
        self,
        files: Mapping[str, float] | Sequence[str | Path],
        tokenizer: Any,
        *,
        seed: int = 0,
        shuffle: bool = True,
        top_k: int = 50,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        held_out: bool = False,
        strict: bool = False,
        max_rejected_fraction: float = 0.01,
        rejected_file: str | Path | None = None,
        vocabulary_fingerprint: str | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
    ):
        """Index the files. `files`: paths, with weights where the mixture is not one to one.

        `rank` of `world_size` reads every world_size-th row. `strict`: any unusable row is an error. `wanted`: targets of
        the examples (`Wanted.by` gives those of a run). Raises DataError for unreadable files, headers that do not fit, and
        more than `max_rejected_fraction` unusable rows.
        """
        super().__init__()
        weights = dict(files) if isinstance(files, Mapping) else {str(path): 1.0 for path in files}
        wrong = {path: weight for path, weight in weights.items() if not 0 < weight < float("inf")}
        if wrong or not weights:
            raise DataError(f"weights of offline files: found {wrong or 'no file'}, expected positive numbers")
        vocabularies = [vocabulary_fingerprint] if vocabulary_fingerprint else []
        self.index = join_indexes([index_file(path, *vocabularies) for path in weights], list(weights.values()))
        self.rejected: list[Reject] = []  # in the process that iterates
        self.position = 0  # rows of this rank's order that were read, in the process that iterates
        self._reader = RowReader(tokenizer, top_k, max_tokens, wanted)
        self._seed, self._shuffle, self._held_out = seed, shuffle, held_out
        self._rank, self._world_size = rank, world_size
        self._limit = 0.0 if strict else max_rejected_fraction
        self._rejected_file = rejected_file
        self._epoch, self._start, self._consumed = 0, 0, np.empty(0, np.int64)
        for reject in self.index.rejected:
            self._book(reject)
        self.index.check(self._limit)

    @property
    def num_rows(self) -> int:
        """Rows that the next iteration of this rank reads; those that will be rejected count."""
        return len(self._order()[0])

    @property
    def fingerprint(self) -> str:
        """Hash of what the files hold and of the mixture: a checkpoint keeps it, a restart compares it."""
        return self.index.fingerprint

    def set_epoch(self, epoch: int, *, start: int = 0, consumed_uids: np.ndarray | Sequence[int] = ()) -> None:
        """What the next iteration reads: an epoch from a position of this rank on, without uids that were trained already.

        Either way leads back to the same rest: `start` is the `position` that an iteration without workers had reached,
        `consumed_uids` are those of the batches.
        """
        self._epoch, self._start = epoch, start
        self._consumed = np.asarray(consumed_uids, np.int64)

    def __iter__(self) -> Iterator[Example]:
        rows, uids = self._order()
        worker = get_worker_info()
        if worker is not None:
            rows, uids = rows[worker.id :: worker.num_workers], uids[worker.id :: worker.num_workers]
        self.position = self._start
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            for row, uid, examples in zip(block, uids[start : start + BLOCK_ROWS], self._read(block), strict=True):
                self.position += 1
                if isinstance(examples, str):
                    self._refuse(int(row), examples)
                else:
                    yield from numbered(examples, int(uid), held_out=self._held_out)

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and uids that this rank reads next."""
        rows, uids = epoch_order(self.index, self._seed, self._epoch, shuffle=self._shuffle)
        rows, uids = rows[self._rank :: self._world_size][self._start :], uids[self._rank :: self._world_size][self._start :]
        left = ~np.isin(uids, self._consumed)
        return rows[left], uids[left]

    def _read(self, rows: np.ndarray) -> list[tuple[Example, ...] | str]:
        found: dict[int, tuple[Example, ...] | str] = {}
        for number in np.unique(self.index.file[rows]):
            file, places = self.index.files[number], np.flatnonzero(self.index.file[rows] == number)
            positions = file.position[self.index.row[rows[places]]]
            examples = read_examples(file.path, file.kind, positions, self._reader)
            found |= dict(zip(places.tolist(), examples, strict=True))
        return [found[place] for place in range(len(rows))]

    def _refuse(self, row: int, reason: str) -> None:
        file = self.index.files[self.index.file[row]]
        reject = Reject(file.path, int(file.line[self.index.row[row]]), reason)
        if reject not in self.rejected:
            self._book(reject)
        total = len(self.index.uid) + len(self.index.rejected)
        if len(self.rejected) > self._limit * total:
            raise DataError(
                f"{len(self.rejected)} of {total} offline rows are unusable, more than {self._limit} of them; the last: "
                f"{reject.file}:{reject.line}: {reason}"
            )

    def _book(self, reject: Reject) -> None:
        logger.warning("%s:%d: rejected: %s", reject.file, reject.line, reject.reason)
        self.rejected.append(reject)
        if self._rejected_file is not None:
            line = json.dumps(reject._asdict(), ensure_ascii=False) + "\n"
            with open(self._rejected_file, "ab", buffering=0) as file:  # one write: lines of several workers do not mix
                file.write(line.encode("utf-8", "backslashreplace"))
