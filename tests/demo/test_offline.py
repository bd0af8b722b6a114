"""The demo's rows that hold their responses: every kind becomes an example with what its losses look at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raykd.data.curriculum import find_steps
from raykd.data.examples import Wanted
from raykd.data.offline_rows import RowReader
from raykd.demo.corpus import generate
from raykd.demo.offline import MAX_LOOPS, WISHES, generate_rows, main
from raykd.types import Mark, Source

WANTED = Wanted(losses=frozenset({"halt", "self_evaluation", "code_mode_preference"}), caws_tier=3)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(generate_rows(60, 3, "train"))


@pytest.fixture(scope="module")
def read(rows, demo_tokenizer):
    reader = RowReader(demo_tokenizer, max_tokens=640, wanted=WANTED)
    return reader.examples(rows)


def test_every_row_is_an_example_within_the_demos_context(rows, read):
    assert len(rows) == 60
    assert [row for row in read if isinstance(row, str)] == []


def test_a_third_are_pairs_that_prefer_code(read):
    for preferred, rejected in read[::3]:
        assert (preferred.marks & Mark.CODE_MODE).any()
        assert (rejected.marks & Mark.DIRECT_TOOL).any()
        assert preferred.pair == -rejected.pair > 0


def test_a_third_are_refinements_that_go_on_until_they_are_right_twice_or_at_the_cap(rows, read):
    halting = 0
    for row, (example,) in zip(rows[1::3], read[1::3], strict=True):
        scores = [message["judge_score"] for message in row["messages"] if "loop" in message]
        assert len(example.halt_targets) == len(scores) <= MAX_LOOPS
        right_twice = len(scores) > 1 and min(scores[-2:]) > 0.9
        assert right_twice or len(scores) == MAX_LOOPS
        assert example.halt_targets.tolist() == [0.0] * (len(scores) - 1) + [1.0], scores
        assert example.source == Source.STUDENT
        assert example.quality == np.float32(scores[-1])
        halting += len(scores) < MAX_LOOPS
    assert 0 < halting < 20, "some end before the cap, and some there"


def test_a_third_reason_in_two_steps_before_they_call(rows, read):
    for row, (example,) in zip(rows[2::3], read[2::3], strict=True):
        assert len(find_steps(row["messages"][-1]["content"])) == 2
        assert example.num_calls == 1
        assert example.source == Source.GOLD


def test_sides_share_no_request_with_the_prompts_of_the_other_side():
    def requests(rows):
        messages = (message for row in rows for message in row["messages"] if message["role"] == "user")
        return {message["content"].removeprefix("Think first. ") for message in messages} - set(WISHES)

    held_out = requests(generate_rows(30, 3, "held_out"))
    assert not held_out & requests(generate_rows(60, 3, "train"))
    assert not held_out & requests(generate(200, 0, "train"))


def test_the_file_is_the_rows(tmp_path, rows):
    main(["--out", str(tmp_path / "x" / "rows.jsonl"), "--rows", "60", "--seed", "3"])
    assert [json.loads(line) for line in (tmp_path / "x" / "rows.jsonl").open()] == rows
