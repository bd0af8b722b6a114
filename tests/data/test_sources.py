"""From the user's files to prepared prompts: formats, shards, bad rows, what is counted and what is refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_helpers import conversation, prepare, shards_of, write_lines

from raykd.config import Config
from raykd.data.readers import DataError, find_files, read_rows
from raykd.data.sources import PromptSet, prepare_prompts

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "description": "none"}}}]


def all_rows(path: Path, shard_bytes: int = 1 << 20) -> list[tuple[Any, ...]]:
    return [tuple(row) for shard in shards_of(path, shard_bytes) for row in read_rows(shard)]


# --- formats ---


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.one_of(st.just(b""), st.text(max_size=30).map(lambda t: json.dumps({"t": t}).encode())), max_size=20),
    shard_bytes=st.integers(1, 200),
    ends_with_newline=st.booleans(),
)
def test_wherever_a_file_is_cut_every_row_comes_once_with_its_line(tmp_path_factory, lines, shard_bytes, ends_with_newline):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ends_with_newline else b""))
    expected = [(number, json.loads(line), None) for number, line in enumerate(lines, 1) if line.strip()]
    if path.stat().st_size:
        assert all_rows(path, shard_bytes) == expected


def test_parquet_arrow_datasets_and_folders_give_the_same_rows_as_jsonl(tmp_path):
    rows = [conversation(f"q{i}", id=f"r{i}") for i in range(7)]
    rows[0]["tools"] = TOOLS  # the first row, from which pyarrow takes the columns
    write_lines(tmp_path / "lines" / "a.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    (tmp_path / "both" / "deep").mkdir(parents=True)
    pq.write_table(table.slice(0, 4), tmp_path / "both" / "a.parquet", row_group_size=2)
    write_lines(tmp_path / "both" / "deep" / "b.jsonl", rows[4:])
    saved = tmp_path / "saved"
    saved.mkdir()
    with pa.OSFile(str(saved / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))

    expected = [row for _, row, _ in all_rows(tmp_path / "lines")]
    assert [row for _, row, _ in all_rows(tmp_path / "both", shard_bytes=1)] == expected
    assert [row for _, row, _ in all_rows(saved, shard_bytes=1)] == expected
    assert [line for line, _, _ in all_rows(saved, shard_bytes=1)] == list(range(1, 8))


def test_keys_that_other_rows_bring_into_a_struct_column_do_not_appear(tmp_path):
    calls = [{"function": {"name": "a", "arguments": {"x": 1}}}, {"function": {"name": "b", "arguments": {"y": "z"}}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row, _ in all_rows(tmp_path / "a.parquet")] == rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nothing there"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.mkdir(), "no .jsonl"),
        (lambda path: (path.mkdir(), (path / "dataset_dict.json").write_text('{"splits": ["train"]}')), "expected one of"),
    ],
)
def test_a_path_without_rows_is_refused(tmp_path, make, message):
    path = tmp_path / "prompts.jsonl"
    make(path)
    with pytest.raises(DataError, match=message):
        find_files(path, "data.prompts")


@pytest.fixture
def without_rights() -> Iterator[Path]:
    """A folder for all, in the eyes of a user who is not root."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        os.seteuid(user)


def lose_rights() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("name", ["a.jsonl", "deep/a.jsonl"])
def test_what_may_not_be_read_is_named_and_not_left_out(without_rights, name):
    write_lines(without_rights / "ok.jsonl", [conversation("x")])
    locked = write_lines(without_rights / name, [conversation("x")])
    (locked if "/" not in name else locked.parent).chmod(0)
    lose_rights()
    for path in (without_rights, locked):
        with pytest.raises(DataError, match=rf"data\.prompts=.*cannot be read: .*Permission denied.*{locked.parent.name}"):
            find_files(path, "data.prompts")


def test_a_link_to_nowhere_and_a_dataset_without_its_description_are_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is not there though"):
        find_files(tmp_path, "data.prompts")
    for name, content in (("state.json", "{"), ("state.json", "[]"), ("dataset_dict.json", "{}")):
        folder = tmp_path / (name + content)
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=f"{name} has no .* as a Hugging Face dataset has"):
            find_files(folder, "data.prompts")


def test_a_parquet_row_with_invalid_utf8_is_rejected_alone(tmp_path):
    """Arrow does not look: whoever wrote bytes into a column of strings gets them back as they are."""
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    rows = all_rows(tmp_path / "a.parquet")
    assert [(line, row) for line, row, _ in rows] == [(1, {"prompt": "a"}), (2, {}), (3, {"prompt": "b"})]
    assert rows[1][2].startswith("invalid UTF-8")
    assert rows[0][2] is rows[2][2] is None


def test_an_unknown_format_and_a_broken_parquet_file_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"unknown format '\.csv'"):
        find_files(tmp_path / "a.csv", "data.prompts")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        shards_of(tmp_path / "a.parquet")


# --- rows ---


TURN = {"role": "assistant", "content": "fine"}


@pytest.mark.parametrize(
    ("row", "completions", "reason"),
    [
        (b'{"messages": [', "teacher", "malformed JSON"),
        (b'{"messages": "\xff"}', "teacher", "invalid UTF-8: byte 0xff"),
        (b"[1]", "teacher", "expected an object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "teacher", "surrogate"),
        (b"[" * 100_000, "teacher", "nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", "teacher", "malformed JSON: Exceeds the limit"),
        (conversation("hi", id="\ud800"), "teacher", "`id` holds an unpaired surrogate"),
        (conversation("hi", tools=[{"name": "f", "description": "\ud800"}]), "teacher", "tools holds an unpaired surrogate"),
        ({"text": "hi"}, "teacher", "messages"),
        ({"messages": 3}, "teacher", "`messages` is"),
        ({"messages": [{"role": "user", "content": "a"}], "id": [1]}, "teacher", "`id` is a list"),
        (conversation("hi"), "recorded", "assistant"),
        (
            conversation("hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": 7}}}]),
            "teacher",
            "schema",
        ),
        (conversation("word " * 300), "teacher", "expected at most 200"),
        (conversation("hi", caws_tier=4), "teacher", "caws_tier is 4, expected a whole number from 1 to 3"),
        (conversation("hi", metadata={"caws_tier": "2"}), "teacher", "caws_tier is '2', expected a whole number"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_reason_and_the_others_are_kept(
    tmp_path, tiny_model_path, row, completions, reason
):
    good = {"messages": [{"role": "user", "content": "hi"}, TURN]}
    result = prepare(tmp_path, [good, row, good], tiny_model_path, completions=completions)
    assert result.line.tolist() == [1, 3]
    ((file, line, found),) = result.rejected
    assert (file, line) == (str(tmp_path / "in" / "a.jsonl"), 2)
    assert reason in found


def test_a_long_prompt_can_lose_its_beginning_instead_and_is_counted(tmp_path, tiny_model_path):
    rows = [conversation("word " * 300 + "end"), conversation("short")]
    result = prepare(tmp_path, rows, tiny_model_path, on_long_prompt="truncate_left")
    assert (result.num_truncated, result.num_tokens[0], result.rejected) == (1, 200, [])


def test_the_uid_follows_the_row_not_its_place_and_changes_with_what_the_teacher_is_given(tmp_path, tiny_model_path):
    rows = [conversation("a", id="x"), conversation("b", id=7), conversation("c")]
    first = prepare(tmp_path / "1", rows, tiny_model_path)
    moved = prepare(tmp_path / "2", [rows[1], rows[0], rows[2]], tiny_model_path)
    assert (first.uid >= 0).all()
    assert first.uid[[1, 0, 2]].tolist() == moved.uid.tolist()
    edited = prepare(tmp_path / "3", [conversation("A", id="x"), *rows[1:]], tiny_model_path)
    assert (edited.uid == first.uid).tolist() == [False, True, True]
    answered = [{"messages": [*row["messages"], TURN]} | ({"id": row["id"]} if "id" in row else {}) for row in rows]
    recorded = prepare(tmp_path / "4", answered, tiny_model_path, completions="recorded")
    assert not np.isin(recorded.uid, first.uid).any()


def test_part_files_hold_the_rows_the_result_speaks_of(tmp_path, tiny_model_path):
    result = prepare(tmp_path, [conversation(f"q{i}", id=f"r{i}") for i in range(300)], tiny_model_path)
    parts = [pq.read_table(tmp_path / f"train-0-{part:05d}.parquet") for part in range(2)]
    assert [part.num_rows for part in parts] == [256, 44]
    for i in (0, 255, 256, 299):
        row = parts[result.part[i]].slice(int(result.row[i]), 1).to_pylist()[0]
        assert (row["key"], row["uid"], len(row["prompt_ids"])) == (f"r{i}", result.uid[i], result.num_tokens[i])
        assert (row["recorded_ids"], row["held_out"]) == (None, False)


# --- the whole ---


def test_the_tier_that_a_row_names_is_in_its_prompt(tmp_path, tiny_model_path):
    named = [{"caws_tier": 3}, {"metadata": {"caws_tier": 1}}, {"caws_tier": None, "metadata": "as you like"}, {}]
    prepare(tmp_path, [conversation("hi", **tier) for tier in named], tiny_model_path)
    assert pq.read_table(tmp_path / "train-0-00000.parquet")["caws_tier"].to_pylist() == [3, 1, 0, 0]


def test_a_row_is_for_the_teacher_that_it_names_or_for_one_by_the_weights(tmp_path, tiny_model_path):
    """Who answers it is part of the uid, so that no cache gives one teacher's answer for another's."""
    rows = [conversation("same", id=number) for number in range(30)]
    named = [{**rows[0], "teacher_id": "code"}, {**rows[1], "teacher_id": "art"}, {**rows[2], "teacher_id": 3}, *rows[3:]]

    def prepared(rows: list, name: str, **rules: Any) -> tuple[Any, pa.Table]:
        result = prepare(tmp_path / name, rows, tiny_model_path, **rules)
        return result, pq.read_table(tmp_path / name / "train-0-00000.parquet")

    several = {"teachers": (("code", 1.0), ("math", 1.0))}
    result, table = prepared(named, "named", **several)
    assert [(reject.line, reject.reason) for reject in result.rejected] == [
        (2, "`teacher_id` is 'art'; expected one of teacher.teachers: code, math"),
        (3, "`teacher_id` is 3; expected one of teacher.teachers: code, math"),
    ]
    who = {row["key"]: (row["for_teacher"], row["uid"]) for row in table.to_pylist()}
    assert who["0"][0] == "code"
    assert {name for name, _ in who.values()} == {"code", "math"}
    for rules in ({"teachers": (("code", 1.0), ("math", 9.0))}, {**several, "teacher_seed": 1}):
        _, again = prepared(named, "again", **rules)
        for row in again.to_pylist():
            name, uid = who[row["key"]]
            assert (row["for_teacher"] == name) == (row["uid"] == uid)
    _, alone = prepared(named, "alone")  # one teacher takes no notice
    assert alone["for_teacher"].null_count == 30
    assert not set(alone["uid"].to_pylist()) & {uid for _, uid in who.values()}


def test_a_parquet_file_without_rows_is_refused(tmp_path, tiny_model_path):
    pq.ParquetWriter(tmp_path / "train.parquet", pa.schema([("prompt", pa.string())])).close()
    config = config_for(tmp_path, tiny_model_path, prompts=str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match=r"train\.parquet has no row; expected at least one"):
        prepare_prompts(config, tmp_path / "run")


def config_for(tmp_path: Path, model: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "run", "dir": str(tmp_path)},
            "teacher": {
                "kind": "hf",
                "model": str(model),
                "device": "cpu",
                "max_model_len": 200,
                "sampling": {"max_tokens": 16},
            },
            "student": {"model": str(model)},
            "data": {"prompts": str(tmp_path / "train.jsonl"), **data},
        }
    )


def rejected_reasons(prompt_set: PromptSet) -> list[str]:
    path = Path(prompt_set.folder).parent / "rejected.jsonl"
    return [json.loads(line)["reason"] for line in path.read_text().splitlines()]


@pytest.mark.ray
def test_prompts_are_counted_told_apart_and_prepared_once(tmp_path, tiny_model_path, ray_cluster):
    rows = [conversation(f"q{i}", id=f"r{i}") for i in range(98)]
    write_lines(tmp_path / "train.jsonl", [*rows, conversation("again", id="r0"), b"{"])
    write_lines(tmp_path / "held.jsonl", [conversation("q5"), conversation("other")])
    config = config_for(tmp_path, tiny_model_path, held_out=str(tmp_path / "held.jsonl"), max_rejected_fraction=0.02)
    prompt_set = prepare_prompts(config, tmp_path / "run")

    counts = (prompt_set.num_train, prompt_set.num_held_out, prompt_set.num_rejected, prompt_set.num_contaminated)
    assert counts == (97, 2, 2, 1)
    assert [reason.split(":")[0] for reason in rejected_reasons(prompt_set)] == [
        "malformed JSON",
        "duplicate id",
        "left out of training",
    ]
    train = prompt_set.read(held_out=False)
    assert set(train["key"].to_pylist()) == {row["id"] for row in rows} - {"r5"}
    assert train["uid"].to_pylist() == [
        uid for uid, held in zip(*(prompt_set.index()[n].to_pylist() for n in ("uid", "held_out")), strict=True) if not held
    ]
    assert prompt_set.num_tokens == sum(len(ids) for ids in train["prompt_ids"].to_pylist())
    held_out = prompt_set.read(held_out=True, limit=1)
    assert json.loads(held_out["messages_json"][0].as_py())[0]["content"] == "q5"

    index = Path(prompt_set.folder) / "index.parquet"
    written = index.stat().st_mtime_ns
    assert prepare_prompts(config, tmp_path / "run") == prompt_set
    assert index.stat().st_mtime_ns == written, "nothing changed, so nothing is prepared again"
    write_lines(tmp_path / "train.jsonl", rows[:20])
    assert prepare_prompts(config, tmp_path / "run").num_train == 19


@pytest.mark.ray
def test_too_many_bad_rows_no_prompt_left_or_no_room_for_one_stop_the_run(tmp_path, tiny_model_path, ray_cluster):
    write_lines(tmp_path / "train.jsonl", [conversation(f"q{i}") for i in range(9)] + [b"{"])
    with pytest.raises(DataError, match=r"1 of 10 rows are unusable.*max_rejected_fraction=0.05"):
        prepare_prompts(config_for(tmp_path, tiny_model_path, max_rejected_fraction=0.05), tmp_path / "run")
    assert (tmp_path / "run" / "rejected.jsonl").read_text().count("\n") == 1
    write_lines(tmp_path / "train.jsonl", [b"", b" "])
    with pytest.raises(DataError, match="no prompt to train on: 0 rows"):
        prepare_prompts(config_for(tmp_path, tiny_model_path), tmp_path / "run")
    write_lines(tmp_path / "train.jsonl", [conversation("q")])
    with pytest.raises(DataError, match="no prompt to train on: 2 rows"):
        prepare_prompts(config_for(tmp_path, tiny_model_path, held_out=str(tmp_path / "train.jsonl")), tmp_path / "run")
    config = config_for(tmp_path, tiny_model_path)
    greedy = config.teacher.model_copy(update={"sampling": config.teacher.sampling.model_copy(update={"max_tokens": 200})})
    with pytest.raises(DataError, match="fills the teacher's whole context of 200"):
        prepare_prompts(config.model_copy(update={"teacher": greedy}), tmp_path / "run")
