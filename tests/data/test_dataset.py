"""Offline files: the stream's examples from every form, headers, mixtures that a restart goes on with."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from offline_helpers import CALL, CHAT, PROMPT, ROW, TOOLS, only, same, teacher_rows
from prompt_helpers import write_lines
from torch.utils.data import DataLoader

from raykd.data.collate import collate_kd_batch
from raykd.data.dataset import KDDataset, epoch_order
from raykd.data.examples import build_examples, decode_spans, example_from_row, examples_to_table
from raykd.data.import_logits import import_packed_logits
from raykd.data.offline_files import take_batches
from raykd.data.offline_rows import RowReader
from raykd.data.offline_write import JsonlWriter, add_process_targets, offline_rows
from raykd.data.readers import DataError
from raykd.types import Mark, Source
from tests.conftest import DEMO_TEACHER

SCORES = {"top_k": 1, "topk_ids": [5] * 21, "topk_logprobs": [-1.0] * 20 + [-math.inf], "log_tail": [-0.5] * 20 + [0.0]}
DECISION = {"marks": [0] * 12 + [Mark.RESPONSE] * 20 + [Mark.RESPONSE | Mark.DECISION]}
SETS = {"set_position": [20], "set_kind": [0], "set_sizes": [2], "set_ids": [7, 8]}


@pytest.mark.parametrize("form", ["jsonl", "teacher output", "examples"])
def test_files_of_every_form_give_the_streams_examples(form, tmp_path, demo_tokenizer):
    rows = teacher_rows(demo_tokenizer)
    built = build_examples(rows, demo_tokenizer).examples
    path = tmp_path / ("a.jsonl" if form == "jsonl" else "a.parquet")
    if form == "jsonl":
        with JsonlWriter(path, {}) as writer:
            for row in offline_rows(rows, demo_tokenizer):
                writer.write(row)
    else:
        pq.write_table(rows if form == "teacher output" else built, path, row_group_size=2)
    examples = list(KDDataset([path], demo_tokenizer, shuffle=False, strict=True))
    assert len(examples) == 3
    for index, example in enumerate(examples):
        same(example, example_from_row(built, index))
    assert examples[1].source is Source.TEACHER
    assert examples[2].source is Source.GOLD
    assert decode_spans(examples[1], demo_tokenizer)[Mark.INTEGRATION] == ["21,5"]


PEAK = """
import sys
import numpy as np, pyarrow as pa
from raykd.data.offline_files import read_examples
from raykd.data.offline_rows import RowReader
from raykd.data.prompt_rows import load_tokenizer
reader = RowReader(load_tokenizer(sys.argv[2]))
found = read_examples(sys.argv[1], "teacher", np.array(eval(sys.argv[3])), reader)
print([example.uid for (example,) in found], pa.default_memory_pool().max_memory())
"""


def test_of_a_giant_row_group_few_rows_are_in_memory_and_come_in_the_order_asked(tmp_path, demo_tokenizer):
    table = pa.concat_tables([teacher_rows(demo_tokenizer)] * 400)
    uids = np.arange(1200) * 7
    table = table.set_column(table.schema.get_field_index("uid"), "uid", pa.array(uids))
    ballast = pa.array(np.random.default_rng(0).integers(0, 2**31, 1200 * 5000, np.int32))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(1201, dtype=np.int32) * 5000), ballast)
    path = str(tmp_path / "a.parquet")
    pq.write_table(table.append_column("ballast", lists), path, row_group_size=700)
    positions = [1199, 3, 704, 0, 3, 31, 32, 699, 700]
    command = [sys.executable, "-c", PEAK, path, str(DEMO_TEACHER), str(positions)]  # the peak is that of a process
    read, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.rsplit(maxsplit=1)
    assert read == str(uids[positions].tolist())
    assert int(peak) < 12_000_000, "the first group alone has 14 MB"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"marks": [1]}, "`marks` has 1 entries"),
        ({"marks": [0] * 33}, "no token is marked"),
        ({"marks": [1] * 33}, "the first token is a response"),
        ({"input_ids": [99_999] * 33}, "`input_ids` holds ids"),
        ({"input_ids": [5] * 32 + [None]}, "`input_ids` holds null"),
        ({"topk_ids": [1]}, "1 top-k ids"),
        ({"source": 3}, "`source` is 3, expected one of 0 (gold), 1 (teacher), 2 (student)"),
        ({"caws_tier": 4}, "`caws_tier` is 4, expected 0 (none) or one of 1, 2, 3"),
        ({"halt_targets": [0.5]}, "`halt_targets` has 1 entries, expected 0: one for each token marked as decision"),
        (
            {"sampled_logprobs": [-0.5] * 3},
            "`sampled_logprobs` has 3 entries, expected none, or one for each of 21",
        ),
        ({"set_position": [20, 21]}, "`set_kind` has 0 entries, `set_position` 2"),
        (SETS | {"set_position": [2]}, "`set_position` names token 2 of 33, which is no response token"),
        (SETS | {"set_position": [33]}, "`set_position` names token 33 of 33"),
        (SETS | {"set_sizes": [2, 1]}, "`set_sizes` has 2 entries, `set_position` 1"),
        (SETS | {"set_ids": [7]}, "`set_ids` has 1 entries, expected the sum of `set_sizes` [2], all >= 1"),
        (SETS | {"set_kind": [3]}, "`set_kind` holds 3 to 3, expected 0 to 2"),
        (SETS | {"set_ids": [7, 99_999]}, "`set_ids` holds ids from 7 to 99999"),
        ({"grammar_position": [20], "grammar_row": [0]}, "`grammar_masks` has 0 words, expected 1 masks x "),
        ({"grammar_position": [20]}, "`grammar_row` has 0 entries, `grammar_position` 1"),
        ({"grammar_position": [20], "grammar_row": [-1]}, "`grammar_row` holds -1"),
        ({"grammar_position": [-1], "grammar_row": [0]}, "`grammar_position` names token -1"),
        (
            {"teacher_hidden": [1.0], "num_teacher_layers": 2},
            "`teacher_hidden` has 1 values, expected a multiple of 2 layers",
        ),
        (SCORES | {"topk_logprobs": [-1.0] * 20 + [math.nan]}, "`topk_logprobs` holds nan, expected log-probabilities"),
        (SCORES | {"topk_logprobs": [-1.0] * 20 + [0.5]}, "`topk_logprobs` holds 0.5, expected log-probabilities"),
        (SCORES | {"log_tail": [-1.0] * 20 + [math.nan]}, "`log_tail` holds nan, expected log-probabilities"),
        (SCORES | {"log_tail": [-1.0] * 20 + [3.0]}, "`log_tail` holds 3, expected log-probabilities"),
        ({"sampled_logprobs": [-0.5] * 20 + [2.0]}, "`sampled_logprobs` holds 2, expected log-probabilities"),
        ({"sampled_logprobs": [-0.5] * 20 + [-math.inf]}, "`sampled_logprobs` holds -inf, expected log-probabilities"),
        ({"quality": 1.5}, "`quality` holds 1.5, expected numbers from 0 to 1, NaN where it is unknown"),
        ({"tool_name_weight": -1.0}, "`tool_name_weight` is -1, expected a finite number from 0 on"),
        ({"tool_name_weight": math.nan}, "`tool_name_weight` is nan, expected a finite number from 0 on"),
        (DECISION | {"halt_targets": [-0.5]}, "`halt_targets` holds -0.5, expected numbers from 0 to 1"),
        (
            {"input_ids": pa.array([["a"] * 33])},
            "a.parquet: column `input_ids` is list<element: string>, expected list<item: int32>",
        ),
        ({"uid": pa.array(["a"])}, "a.parquet: column `uid` is string, expected int64"),
        (
            {"input_ids": pa.array([[2**40] * 33])},
            "a.parquet: column `input_ids` does not fit list<item: int32>: Integer value 1099511627776 not in range",
        ),
    ],
)
def test_a_bad_stored_example_is_rejected(columns, reason, tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    assert len(example.input_ids) == 33
    table = examples_to_table([example])
    for column, value in columns.items():
        place, kind = table.schema.get_field_index(column), table.schema.field(column).type
        table = table.set_column(place, column, value if isinstance(value, pa.Array) else pa.array([value], kind))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=re.escape(reason)):
        list(KDDataset([tmp_path / "a.parquet"], demo_tokenizer, strict=True))


def test_stored_probabilities_may_be_missing_or_unknown_and_columns_of_a_wider_type(tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    table = examples_to_table([example])
    for column, value in (SCORES | DECISION | {"halt_targets": [math.nan]}).items():
        place, kind = table.schema.get_field_index(column), table.schema.field(column).type
        wider = pa.large_list(pa.float64()) if column == "log_tail" else pa.int64() if column == "top_k" else kind
        table = table.set_column(place, column, pa.array([value], wider))
    pq.write_table(table, tmp_path / "a.parquet")
    (again,) = KDDataset([tmp_path / "a.parquet"], demo_tokenizer, strict=True)
    assert again.topk_logprobs[:, 0].tolist() == SCORES["topk_logprobs"]
    assert again.log_tail.tolist() == SCORES["log_tail"]


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("topk_logprobs", math.nan, "nan"),
        ("topk_logprobs", 1.0, "1"),
        ("log_tail", math.nan, "nan"),
        ("log_tail", 0.25, "0.25"),
    ],
)
def test_stored_teacher_output_with_scores_that_are_no_log_probabilities_is_rejected(
    column, value, reason, tmp_path, demo_tokenizer
):
    rows = teacher_rows(demo_tokenizer)
    scores = rows[column].to_pylist()
    scores[1][2] = value
    place, kind = rows.schema.get_field_index(column), rows.schema.field(column).type
    pq.write_table(rows.set_column(place, column, pa.array(scores, kind)), tmp_path / "a.parquet")
    dataset = KDDataset([tmp_path / "a.parquet"], demo_tokenizer, max_rejected_fraction=1.0)
    assert len(list(dataset)) == 2
    (reject,) = dataset.rejected
    assert reject.reason == f"`{column}` holds {reason}, expected log-probabilities: at most 0, -inf where there is none"


def test_nothing_behind_the_last_wanted_row_of_a_file_is_read(tmp_path):
    """The pages of its second half are broken."""
    path = tmp_path / "a.parquet"
    values = np.random.default_rng(0).integers(0, 2**62, 20_000)
    pq.write_table(pa.table({"value": values}), path, use_dictionary=False, data_page_size=1024, compression="none")
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    broken = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    broken[middle : chunk.data_page_offset + chunk.total_compressed_size] = b"\xff" * (chunk.total_compressed_size // 2)
    path.write_bytes(broken)
    with pq.ParquetFile(path) as file:
        read = take_batches(file, str(path), np.array([3, 40, 41]))
        assert [value for batch in read for value in batch["value"].to_pylist()] == values[[3, 40, 41]].tolist()
        with pytest.raises(OSError, match="deserialize"):
            list(take_batches(file, str(path), np.array([3, 19_000])))


def test_a_stored_example_with_targets_of_every_kind_comes_back_and_null_is_the_default(tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    marks = example.marks.copy()
    marks[-1] |= Mark.DECISION
    width = -(-len(demo_tokenizer) // 32)
    full = replace(
        example,
        marks=marks,
        halt_targets=np.array([0.5], np.float32),
        sampled_logprobs=np.full(21, -0.5, np.float32),
        set_position=np.array([20], np.int32),
        set_kind=np.array([1], np.int8),
        set_sizes=np.array([2], np.int32),
        set_ids=np.array([7, 8], np.int32),
        grammar_position=np.array([20, 21], np.int32),
        grammar_row=np.array([1, 0], np.int32),
        grammar_masks=np.full((2, width), -1, np.int32),
        teacher_hidden=np.ones((2, 33, 4), np.float16),
    )
    table = examples_to_table([full, replace(example, uid=5)])
    for name in ("set_ids", "quality"):
        nulls = pa.array([table[name][0].as_py(), None], table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, nulls)
    pq.write_table(table, tmp_path / "a.parquet")
    one, other = KDDataset([tmp_path / "a.parquet"], demo_tokenizer, strict=True, shuffle=False)
    same(one, full)
    same(other, replace(example, uid=5))


def test_stored_examples_of_an_older_form_get_the_defaults_of_new_columns(tmp_path, demo_tokenizer):
    example = only(tmp_path, ROW, demo_tokenizer)
    table = examples_to_table([example]).drop_columns(["quality", "set_ids", "pair", "grammar_masks", "tool_name_weight"])
    pq.write_table(table, tmp_path / "a.parquet")
    (again,) = KDDataset([tmp_path / "a.parquet"], demo_tokenizer)
    same(again, example)


def test_the_header_is_optional_and_its_fingerprint_is_checked(tmp_path, demo_tokenizer):
    path = tmp_path / "a.jsonl"
    with JsonlWriter(path, {"seed": 3, "vocabulary_fingerprint": "v1"}) as writer:
        writer.write(ROW)
        writer.write({"prompt": PROMPT, "teacher_text": "good"})
    lines = path.read_bytes().splitlines(keepends=True)
    dataset = KDDataset([path], demo_tokenizer, strict=True, vocabulary_fingerprint="v1")
    assert dataset.index.files[0].header["seed"] == 3
    assert len(list(dataset)) == 2
    with pytest.raises(DataError, match=r"vocabulary v1, expected v2"):
        KDDataset([path], demo_tokenizer, vocabulary_fingerprint="v2")
    path.write_bytes(b"\n" + b"".join(lines))  # a blank line before it is none
    assert KDDataset([path], demo_tokenizer, strict=True).fingerprint == dataset.fingerprint
    path.write_bytes(b"".join(lines).replace(b"good", b"evil"))
    with pytest.raises(DataError, match="the file was changed after it was written"):
        KDDataset([path], demo_tokenizer)
    path.write_bytes(b"".join(lines[1:]))
    assert len(list(KDDataset([path], demo_tokenizer, strict=True))) == 2
    flat = {"__header__": True, "dataset_sha256": dataset.index.files[0].fingerprint}
    path.write_bytes(json.dumps(flat).encode() + b"\n" + b"".join(lines[1:]))
    assert KDDataset([path], demo_tokenizer, strict=True).fingerprint == dataset.fingerprint


def test_an_aborted_file_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), JsonlWriter(tmp_path / "a.jsonl", {}) as writer:
        writer.write({"x": 1 // 0})
    assert list(tmp_path.iterdir()) == []


def numbered(tmp_path, name, count):
    rows = [{"prompt": PROMPT, "teacher_text": f"{name} {i}"} for i in range(count)]
    return str(write_lines(tmp_path / f"{name}.jsonl", rows))


def test_a_mixture_gives_every_file_its_weight_and_every_row_its_turn(tmp_path, demo_tokenizer):
    weights = {numbered(tmp_path, "a", 40): 1.0, numbered(tmp_path, "b", 8): 2.5, numbered(tmp_path, "c", 40): 0.25}
    index = KDDataset(weights, demo_tokenizer, seed=3).index
    uids, times = [], np.zeros(88, int)
    for epoch in range(4):
        rows, uid = epoch_order(index, 3, epoch)
        assert np.bincount(index.file[rows]).tolist() == [40, 20, 10]
        assert not np.array_equal(rows, np.sort(rows))
        uids += uid.tolist()
        times += np.bincount(rows, minlength=88)
    assert len(set(uids)) == len(uids)  # what a ledger needs: every time it comes, a row has a uid of its own
    assert times.tolist() == [4] * 40 + [10] * 8 + [1] * 40
    again, _ = epoch_order(index, 3, 3)
    np.testing.assert_array_equal(again, rows)
    other, _ = epoch_order(index, 4, 3)
    assert not np.array_equal(other, rows)


def text_of(example, tokenizer):
    return decode_spans(example, tokenizer)[Mark.RESPONSE][0]


def test_ranks_and_workers_share_the_rows_and_a_restart_reads_the_rest(tmp_path, demo_tokenizer):
    files = {numbered(tmp_path, "a", 70): 1.0, numbered(tmp_path, "b", 10): 2.0}
    make = partial(KDDataset, files, demo_tokenizer, seed=1)
    whole = [example.uid for example in make()]
    assert len(whole) == 90
    assert whole != [example.uid for example in make(shuffle=False)]
    halves = [[example.uid for example in make(rank=rank, world_size=2)] for rank in (0, 1)]
    assert [halves[i % 2][i // 2] for i in range(90)] == whole

    dataset = make()
    iterator = iter(dataset)
    first = [next(iterator).uid for _ in range(41)]
    rest = make()
    rest.set_epoch(0, start=dataset.position)
    assert first + [example.uid for example in rest] == whole
    rest.set_epoch(0, consumed_uids=first)
    assert first + [example.uid for example in rest] == whole
    rest.set_epoch(1)
    second = list(rest)
    assert {example.uid for example in second}.isdisjoint(whole)
    assert {text_of(e, demo_tokenizer) for e in second} == {text_of(e, demo_tokenizer) for e in make()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_data_loader_gives_batches(num_workers, tmp_path, demo_tokenizer):
    dataset = KDDataset([numbered(tmp_path, "a", 21)], demo_tokenizer, seed=1)
    collate = partial(collate_kd_batch, pad_id=0)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collate)
    batches = list(loader)
    uids = [uid for batch in batches for uid in batch.uid.tolist()]
    assert sorted(uids) == sorted(example.uid for example in dataset)
    assert all(batch.input_ids.shape[0] <= 4 and len(batch.response_index) for batch in batches)


def test_added_targets_are_what_reading_without_them_finds(tmp_path, demo_tokenizer):
    rows = [ROW, {"messages": CHAT[:3], "tools": TOOLS, "teacher_text": "Es sind  21,5 Grad."}, b"{", ROW | {"tools": TOOLS}]
    rows[-1] = rows[-1] | {"teacher_text": f"Also: {CALL}", "spans": None}
    path = write_lines(tmp_path / "a.jsonl", [{"__header__": {"seed": 5}}, *rows])
    added = add_process_targets(path)
    assert (added.num_rows, added.num_added, [line for line, _ in added.reasons]) == (4, 3, [4])
    lines = [json.loads(line) for line in Path(added.file).read_text().splitlines() if line != "{"]
    assert lines[0]["__header__"]["seed"] == 5
    assert lines[1]["teacher_text"][slice(*lines[1]["spans"]["tool_name"][0])] == "get_weather"
    read_all = partial(KDDataset, tokenizer=demo_tokenizer, shuffle=False, max_rejected_fraction=0.5)
    for one, other in zip(read_all([added.file]), read_all([path]), strict=True):
        same(one, other)

    lines[1]["spans"]["tool_name"] = [[0, 3]]  # what somebody corrects counts
    example = only(tmp_path, lines[1], demo_tokenizer)
    assert decode_spans(example, demo_tokenizer)[Mark.TOOL_NAME] == ["<tool_call>"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_packed_logits_of_others_become_examples(suffix, tmp_path, demo_tokenizer):
    ids = [np.array(demo_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("one two", PROMPT + CALL)]
    lengths, prompts = np.array([len(part) for part in ids]), np.array([1, 6])
    flat = np.concatenate(ids)
    topk = np.stack([np.roll(flat, -1), np.roll(flat, -2)], axis=1).astype(np.int32)  # row t is of token t + 1
    logprobs = np.log(np.tile(np.array([0.6, 0.3], np.float32), (len(flat), 1)))
    arrays = {"input_ids": flat.astype(np.int32), "topk_ids": topk, "topk_logprobs": logprobs}
    arrays |= {"sequence_lengths": lengths, "prompt_lengths": prompts}
    path = tmp_path / f"a{suffix}"
    save(path, arrays)
    reader = RowReader(demo_tokenizer)
    examples = import_packed_logits(path, reader, "t")
    for example, part, prompt in zip(examples, ids, prompts, strict=True):
        assert example.input_ids.tolist() == part.tolist()
        assert np.flatnonzero(example.marks & Mark.RESPONSE).tolist() == list(range(prompt, len(part)))
        assert example.topk_ids[:, 0].tolist() == part[prompt:].tolist()
        np.testing.assert_allclose(np.exp(example.log_tail), 0.1, rtol=1e-3)
    assert decode_spans(examples[1], demo_tokenizer)[Mark.TOOL_NAME] == ["get_weather"]
    for change, match in (
        ({"topk_ids": topk[:-1]}, "topk_ids has shape"),
        ({"topk_ids": topk + 99_999}, "expected 0 to"),
        ({"topk_logprobs": -logprobs}, "no log-probabilities"),
        ({"sequence_lengths": lengths - 1}, "add up to"),
    ):
        save(path, arrays | change)
        with pytest.raises(DataError, match=match):
            import_packed_logits(path, reader)


def save(path, arrays):
    from safetensors.numpy import save_file

    contiguous: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    np.savez(path, **contiguous) if path.suffix == ".npz" else save_file(contiguous, path)
