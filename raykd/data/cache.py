"""The teacher's output on disk, so that no prompt is ever put to the same teacher twice.

In:  tables of TEACHER_OUTPUT_SCHEMA, as they leave the teacher.
Out: `<folder>/<teacher fingerprint>/<name>.parquet`, plain Parquet that any reader understands; single rows are read back
     through an index of the uids.

Files appear whole or not at all (atomic rename), and the same rows always get the same name: writing a batch twice, after a
crash or from two runs at once, leaves one file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykd.data.readers import DataError
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA

ROW_GROUP_ROWS = 4
"""Reading one row back costs the decoding of so many: later epochs come in another order than the files."""
INDEX_THREADS = 8


@dataclass(frozen=True)
class CacheIndex:
    """Where the rows of one teacher are. Every uid once."""

    files: tuple[str, ...]
    uid: np.ndarray  # int64 [N], sorted
    file: np.ndarray  # int32 [N], index into `files`
    row: np.ndarray  # int32 [N]

    def lookup(self, uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into `files`, row) of each uid, both int32 [len(uids)]; -1 where the cache has no such row."""
        if not len(self.uid):
            nowhere = np.full(len(uids), -1, np.int32)
            return nowhere, nowhere.copy()
        place = np.minimum(np.searchsorted(self.uid, uids), len(self.uid) - 1)
        found = self.uid[place] == uids
        return np.where(found, self.file[place], -1), np.where(found, self.row[place], -1)


@dataclass(frozen=True)
class TeacherCache:
    """The rows of one teacher, told apart from other teachers' by the fingerprint of model, tokenizer and sampling."""

    folder: str
    fingerprint: str

    @property
    def path(self) -> Path:
        """Where the files of this teacher are."""
        return Path(self.folder) / self.fingerprint

    def write(self, rows: pa.Table) -> None:
        """Keep rows of TEACHER_OUTPUT_SCHEMA; other columns are left out, rows without an answer are not to be given.

        Raises DataError where they cannot be written (a full disk).
        """
        if not rows.num_rows:
            return
        rows = rows.select(TEACHER_OUTPUT_SCHEMA.names).cast(TEACHER_OUTPUT_SCHEMA)
        assert set(rows["teacher_fingerprint"].unique().to_pylist()) == {self.fingerprint}, "rows of another teacher"
        uids = np.sort(rows["uid"].to_numpy())
        name = hashlib.blake2b(uids.tobytes(), digest_size=16).hexdigest()
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        try:
            # Log-probabilities hold no repetition to speak of: dictionaries and heavy compression only cost time.
            layout = {"use_dictionary": False, "write_statistics": False, "compression": "lz4"}
            pq.write_table(rows, temporary, row_group_size=ROW_GROUP_ROWS, **layout)
            os.replace(temporary, self.path / f"{name}.parquet")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free / 2**20
            raise DataError(
                f"{self.path}: the teacher's output cannot be kept: {error}; {free:.0f} MiB are free there: make room and "
                "go on with --resume, or name another folder in data.teacher_cache"
            ) from error

    def index(self) -> CacheIndex:
        """What is there now; reads the uid columns only. Raises DataError for a file that is no Parquet."""
        files = tuple(sorted(file.name for file in self.path.glob("*.parquet"))) if self.path.is_dir() else ()
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            uids = list(pool.map(self._uids, files))
        counts = [len(chunk) for chunk in uids]
        uid, first = np.unique(np.concatenate([np.empty(0, np.int64), *uids]), return_index=True)
        file = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        row = np.concatenate([np.empty(0, np.int32), *(np.arange(count, dtype=np.int32) for count in counts)])
        return CacheIndex(files, uid, file[first], row[first])

    def _uids(self, name: str) -> np.ndarray:
        try:
            return pq.read_table(self.path / name, columns=["uid"])["uid"].to_numpy()
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.path / name} is no readable Parquet file ({error}); delete it: its rows are made anew"
            ) from error

    def read(self, files: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Rows by (file name, row number), in the order asked, as TEACHER_OUTPUT_SCHEMA. Reads only their row groups."""
        if not len(files):
            return TEACHER_OUTPUT_SCHEMA.empty_table()
        names, which = np.unique(np.asarray(files, object).astype(str), return_inverse=True)
        tables: list[pa.Table] = []
        place = np.empty(len(files), np.int64)
        offset = 0
        for number, name in enumerate(names):
            asked = np.flatnonzero(which == number)
            groups, group_of = np.unique(rows[asked] // ROW_GROUP_ROWS, return_inverse=True)
            with pq.ParquetFile(self.path / name) as file:
                tables.append(file.read_row_groups(groups.tolist()).cast(TEACHER_OUTPUT_SCHEMA))
            # Only the last group of a file may be short, so the groups read stand ROW_GROUP_ROWS apart.
            place[asked] = offset + group_of * ROW_GROUP_ROWS + rows[asked] % ROW_GROUP_ROWS
            offset += tables[-1].num_rows
        return pa.concat_tables(tables).take(pa.array(place)).combine_chunks()
