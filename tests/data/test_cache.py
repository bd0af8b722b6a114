"""The teacher's output on disk: what is written comes back by uid, whole, and of the right teacher only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_helpers import answers

from raykd.data.cache import ROW_GROUP_ROWS, TeacherCache
from raykd.data.readers import DataError
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA


def test_rows_come_back_by_uid_in_the_order_asked(tmp_path):
    cache = TeacherCache(str(tmp_path), "f")
    first, second = answers(list(range(11))), answers([2**62, 77, 55])
    cache.write(first)
    cache.write(second)
    wanted = np.array([77, 3, 10, 2**62, 0, 3])
    index = cache.index()
    file, row = index.lookup(wanted)
    found = cache.read([index.files[i] for i in file], row)
    everything = pa.concat_tables([first, second])
    expected = everything.take(pa.array([everything["uid"].to_pylist().index(uid) for uid in wanted]))
    assert found.equals(expected.combine_chunks())


def test_a_uid_that_is_not_there_is_not_found_nor_is_one_of_another_teacher(tmp_path):
    TeacherCache(str(tmp_path), "f").write(answers([1, 5]))
    assert [column.tolist() for column in TeacherCache(str(tmp_path), "f").index().lookup(np.array([0, 3, 9]))] == [
        [-1] * 3
    ] * 2
    assert [column.tolist() for column in TeacherCache(str(tmp_path), "g").index().lookup(np.array([1, 5]))] == [
        [-1] * 2
    ] * 2
    with pytest.raises(AssertionError, match="rows of another teacher"):
        TeacherCache(str(tmp_path), "g").write(answers([2]))


def test_writing_a_batch_twice_leaves_one_file_and_a_uid_in_two_files_counts_once(tmp_path):
    cache = TeacherCache(str(tmp_path), "f")
    cache.write(answers([4, 2]))
    cache.write(answers([2, 4]))
    assert len(list(cache.path.iterdir())) == 1, "no second file, no temporary file"
    cache.write(answers([4, 9]))
    assert cache.index().uid.tolist() == [2, 4, 9]
    cache.write(answers([]))
    assert len(list(cache.path.iterdir())) == 2


def test_half_a_file_is_never_seen_nor_kept(tmp_path, monkeypatch):
    cache = TeacherCache(str(tmp_path), "f")

    def fail_midway(table: pa.Table, path: Path, **_: object) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", fail_midway)
    with pytest.raises(DataError, match=rf"{cache.path}: .*No space left.* MiB are free there: make room"):
        cache.write(answers([1]))
    monkeypatch.undo()
    assert not list(cache.path.iterdir())
    assert len(cache.index().uid) == 0
    cache.write(answers([1]))
    assert cache.index().uid.tolist() == [1]


def test_a_broken_file_is_named_and_what_to_do_with_it(tmp_path):
    cache = TeacherCache(str(tmp_path), "f")
    cache.write(answers([1]))
    (cache.path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet is no readable Parquet file.*delete it"):
        cache.index()


def test_files_are_plain_parquet_with_row_groups_of_a_few_rows(tmp_path):
    cache = TeacherCache(str(tmp_path), "f")
    rows = answers(list(range(10)))
    cache.write(rows)
    (path,) = cache.path.iterdir()
    assert pq.read_table(path).cast(TEACHER_OUTPUT_SCHEMA).equals(rows)
    metadata = pq.ParquetFile(path).metadata
    assert max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) == ROW_GROUP_ROWS
