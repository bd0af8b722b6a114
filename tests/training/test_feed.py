"""Several streams as one: every step has its share of each, nothing is torn apart, nothing is waited for before its turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data.examples import examples_to_table
from raykd.data.pairs import numbered
from raykd.training.feed import Feed, mixed
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source


def rows(first: int, count: int, *, held_out: bool = False, pairs: bool = False) -> pa.Table:
    """Rows of the uids `first`, `first + 1`, ...; of pairs each has two examples."""
    examples = []
    for uid in range(first, first + count):
        example = Example(
            uid=uid,
            source=Source.TEACHER,
            input_ids=np.array([1, 2], np.int32),
            marks=np.array([0, Mark.RESPONSE], np.uint16),
            topk_ids=np.empty((1, 0), np.int32),
            topk_logprobs=np.empty((1, 0), np.float16),
            log_tail=np.empty(0, np.float32),
        )
        examples += numbered((example,) * (1 + pairs), uid, held_out=held_out)
    return examples_to_table(examples)


def in_tables(table: pa.Table, sizes: list[int]) -> Iterator[pa.Table]:
    """The same rows in tables of these sizes, the last as large as it must be."""
    for size in sizes:
        yield table.slice(0, size)
        table = table.slice(size)
    if len(table):
        yield table


def uids(tables: Iterator[pa.Table]) -> list[int]:
    return pa.concat_tables([EXAMPLE_SCHEMA.empty_table(), *tables])["uid"].to_pylist()


@settings(max_examples=100, deadline=None)
@given(
    a=st.integers(1, 40),
    b=st.integers(1, 40),
    rows_per_step=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 7), max_size=9),
)
def test_every_row_comes_once_in_its_order_and_every_step_has_its_share_of_each(a, b, rows_per_step, sizes):
    streams = {"a": in_tables(rows(0, a), sizes), "b": in_tables(rows(100, b), sizes[::-1])}
    mixture = uids(mixed(streams, {"a": a, "b": b}, rows_per_step))
    assert [uid for uid in mixture if uid < 100] == list(range(a))
    assert [uid for uid in mixture if uid >= 100] == list(range(100, 100 + b))
    for start in range(0, a + b - rows_per_step + 1, rows_per_step):
        of_a = sum(uid < 100 for uid in mixture[start : start + rows_per_step])
        assert abs(of_a - rows_per_step * a / (a + b)) < 1, mixture


def test_when_one_is_dry_the_others_go_on():
    streams = {"a": iter([rows(0, 2)]), "b": iter([rows(100, 8)]), "c": iter([])}
    assert uids(mixed(streams, {"a": 4, "b": 4, "c": 4}, 3)) == [0, 100, 1, *range(101, 108)]


@pytest.mark.parametrize("steps_made", [0, 1, 2, 3, 7])
def test_after_a_restart_the_mixture_goes_on_as_without_it(steps_made):
    numbers = {"a": 23, "b": 41}
    whole = uids(mixed({"a": iter([rows(0, 23)]), "b": iter([rows(100, 41)])}, numbers, 5))
    done, rest = whole[: 5 * steps_made], whole[5 * steps_made :]
    of_a = sum(uid < 100 for uid in done)
    streams = {"a": iter([rows(of_a, 23 - of_a)]), "b": iter([rows(100 + len(done) - of_a, 41 - len(done) + of_a)])}
    assert uids(mixed(streams, numbers, 5, steps_made)) == rest


def test_no_more_is_waited_for_than_a_step_takes():
    asked = []

    def teacher() -> Iterator[pa.Table]:
        for uid in range(4):
            asked.append(uid)
            yield rows(uid, 1)

    mixture = mixed({"prompts": teacher(), "offline": iter([rows(100, 12)])}, {"prompts": 4, "offline": 12}, 4)
    feed = Feed(mixture, rows_per_step=4, max_tokens=100, pad_id=0)
    for step in range(4):
        assert sorted(feed.next_step().uid.tolist()) == [step, *range(100 + 3 * step, 103 + 3 * step)]
        assert asked == list(range(step + 1))
    assert not feed.next_step().batches


def test_pairs_count_as_one_row_and_stay_together_also_where_a_table_was_cut_between_them():
    pairs = rows(100, 6, pairs=True)
    streams = {"a": iter([rows(0, 6)]), "b": in_tables(pairs, [3, 2, 0, 4])}
    tables = list(mixed(streams, {"a": 6, "b": 6}, 2))
    pair = pa.concat_tables(tables)["pair"].to_numpy()
    (preferred,) = np.nonzero(pair > 0)
    assert len(preferred) == 6
    assert (pair[preferred + 1] == -pair[preferred]).all()
    feed = Feed(iter(tables), rows_per_step=2, max_tokens=100, pad_id=0)
    for step in range(6):
        assert feed.next_step().uid.tolist() == [step, 100 + step]


def test_held_out_rows_pass_in_front_of_the_row_behind_them():
    prompts = pa.concat_tables([rows(50, 3, held_out=True), rows(0, 4)])
    streams = {"prompts": in_tables(prompts, [2, 3]), "offline": iter([rows(100, 4)])}
    feed = Feed(mixed(streams, {"prompts": 4, "offline": 4}, 2), rows_per_step=2, max_tokens=100, pad_id=0)
    assert feed.next_step().uid.tolist() == [0, 100]
    assert uids(iter(feed.held_out)) == [50, 51, 52]
    assert [feed.next_step().uid.tolist() for _ in range(4)] == [[1, 101], [2, 102], [3, 103], []]
