"""Held-out prompts: one hash whatever the form of a row, and what has it is left out of training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_helpers import write_lines

from raykd.config import Config
from raykd.data.examples import examples_to_table
from raykd.data.held_out import NO_PROMPT, hash_of_ids, leave_out, prompt_hashes
from raykd.data.offline_files import index_file
from raykd.data.offline_rows import RowReader
from raykd.data.offline_stream import plan_offline_epoch, prepare_offline
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.readers import DataError
from raykd.data.sources import RowCounts, prepare_prompts
from raykd.types import Example
from raykd.vocabulary import student_tokenizer
from tests.moved_ids import save_moved

FORMS = ["text", "messages", "recorded", "tokens", "rows in Parquet", "teacher output", "examples", "the student's tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_has_the_same_hash_in_every_form_of_a_file(form, tmp_path, tiny_model_path, demo_tokenizer):
    messages = [{"role": "user", "content": "Wie  warm\nist es?"}]
    prompt = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = demo_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokenizer, answer = demo_tokenizer, "21 Grad."
    if form == "the student's tokens":
        save_moved(tmp_path / "student", tiny_model_path, extra=("<x>",))
        tokenizer = student_tokenizer(tmp_path / "student", ["<new>"])
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    row = {
        "text": {"prompt": prompt, "teacher_text": answer},
        "messages": {"messages": messages, "teacher_text": answer},
        "rows in Parquet": {"messages": messages, "teacher_text": answer},
        "recorded": {"messages": [*messages, {"role": "assistant", "content": answer}]},
    }.get(form, {"prompt_ids": ids, "output_ids": ids[:3]})
    other = {"prompt": prompt.replace("warm", "kalt"), "teacher_text": answer}
    if form in ("teacher output", "examples"):
        path, reader = tmp_path / "a.parquet", RowReader(demo_tokenizer)
        examples = [example for read in reader.examples([row, other]) for example in read if isinstance(example, Example)]
        firsts = [int(np.argmax(example.marks != 0)) for example in examples]
        parts = [(e.input_ids[:first], e.input_ids[first:]) for e, first in zip(examples, firsts, strict=True)]
        columns = {"uid": [1, 2], "prompt_ids": [a for a, _ in parts], "output_ids": [b for _, b in parts]}
        table = examples_to_table(examples) if form == "examples" else pa.table(columns | {"finish_reason": ["stop"] * 2})
        pq.write_table(table, path)
    elif form == "rows in Parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([row | {"prompt": None}, other | {"messages": None}]), path)
    else:
        path = write_lines(tmp_path / "a.jsonl", [row, other])
    index = index_file(path)
    same, different = prompt_hashes(index.path, index.kind, index.position, tokenizer)
    assert prompt_hashes(index.path, index.kind, index.position[1:], tokenizer).tolist() == [different]
    assert same == hash_of_ids(np.array(demo_tokenizer(prompt, add_special_tokens=False)["input_ids"]), demo_tokenizer)
    assert different not in (same, NO_PROMPT)


def test_a_row_without_a_prompt_to_compare_is_not_held_out(tmp_path, demo_tokenizer):
    bad = [{"prompt_ids": [99_999], "output_ids": [5]}, {"messages": [{"role": "king"}], "teacher_text": "x", "uid": 7}]
    index = index_file(write_lines(tmp_path / "a.jsonl", [*bad, {"prompt": "p", "teacher_text": "t"}]))
    hashes = prompt_hashes(index.path, index.kind, index.position, demo_tokenizer)
    assert (hashes == NO_PROMPT).tolist() == [True, True, False]
    (kept,), left_out = leave_out([index], [hashes], hashes)
    assert kept.line.tolist() == [1, 2]
    assert [reject.line for reject in left_out] == [3]


def config_of(tmp_path, model, **data):
    return Config.model_validate(
        {
            "run": {"dir": str(tmp_path)},
            "teacher": {"kind": "hf", "model": str(model), "device": "cpu", "top_k": 4},
            "student": {"model": str(model)},
            "data": {"offline": [{"path": str(tmp_path / "answered.jsonl")}]} | data,
        }
    )


@pytest.mark.ray
def test_rows_whose_prompt_is_held_out_are_left_out_and_told(tmp_path, tiny_model_path, ray_cluster):
    questions = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    answered = write_lines(tmp_path / "answered.jsonl", [row | {"teacher_text": "yes"} for row in questions])
    prompts_file = write_lines(tmp_path / "prompts.jsonl", questions[:3])
    held_out = write_lines(tmp_path / "held_out.jsonl", questions[2:5])
    config = config_of(tmp_path, tiny_model_path, prompts=str(prompts_file), held_out=str(held_out))
    run = tmp_path / "run"
    prompts = prepare_prompts(config, run)
    load_tokenizer.cache_clear()
    offline_set = prepare_offline(config, run, prompts)
    assert load_tokenizer.cache_info().currsize == 0, "the prompts are read in a task"
    for part in (run / "prompts").glob("held_out-*.parquet"):
        part.unlink()
    assert prepare_offline(config, run, prompts) == offline_set, "without reading a prompt"
    with pytest.raises(FileNotFoundError):
        prepare_offline(config, run, replace(prompts, fingerprint="of other prompts"))
    assert (offline_set.num_train, offline_set.num_contaminated, offline_set.num_rejected) == (3, 3, 0)
    assert offline_set.counts == RowCounts(3, 6, 0)
    told = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in told if entry["file"] == str(answered)] == [3, 4, 5]
    plan = plan_offline_epoch(config, offline_set, 0, np.empty(0, np.int64))
    assert sorted(key.rsplit(":", 1)[1] for key in plan["key"].to_pylist()) == ["1", "2", "6"]

    others = write_lines(tmp_path / "others.jsonl", [row | {"teacher_text": "no"} for row in questions])
    with pytest.raises(DataError, match="no row to train on: 6 have a prompt that is held out as well, 0 are unusable"):
        prepare_offline(config_of(tmp_path, tiny_model_path, held_out=str(others)), tmp_path / "alone")
