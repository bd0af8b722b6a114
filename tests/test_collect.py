"""Collecting: the teacher alone, into the cache that training reads, and only what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from raykd.collect import collect, export_jsonl, main
from raykd.config import Config
from raykd.data.dataset import KDDataset
from raykd.data.examples import example_from_row
from raykd.data.sources import prepare_prompts
from raykd.data.stream import example_stream, teacher_cache


def unexpected(dataset):
    raise AssertionError("a teacher was asked for although everything is cached")


@pytest.mark.ray
def test_what_is_collected_is_not_asked_again_by_collecting_nor_by_training(tmp_path, tiny_model_path, ray_cluster):
    rows = [{"messages": [{"role": "user", "content": f"what is {i}?"}]} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"kind": "hf", "model": str(tiny_model_path), "device": "cpu", "top_k": 4, "batch_size": 4}
    config = Config.model_validate(
        {
            "run": {"name": "run", "dir": str(tmp_path)},
            "teacher": {**teacher, "sampling": {"max_tokens": 5}},
            "student": {"model": str(tiny_model_path)},
            "data": {"prompts": str(tmp_path / "train.jsonl")},
        }
    )
    prompt_set = prepare_prompts(config, tmp_path / "run")
    cache = teacher_cache(config, prompt_set)

    first = collect(config, prompt_set)
    assert (first.num_cached, first.num_rows, first.num_failed) == (0, 10, 0)
    assert 10 <= first.num_tokens <= 50
    assert first.teacher_seconds > 0
    assert len(cache.index().uid) == 10

    lost = next(cache.path.glob("*.parquet"))
    lost.unlink()
    left = len(cache.index().uid)
    second = collect(config, prompt_set)
    assert (second.num_cached, second.num_rows) == (left, 10 - left)

    third = collect(config, prompt_set, unexpected)
    assert (third.num_cached, third.num_rows) == (10, 0)
    examples = example_stream(config, prompt_set, 0, np.empty(0, np.int64), unexpected)
    assert sorted(row["uid"] for row in examples.select_columns(["uid"]).iter_rows()) == cache.index().uid.tolist()

    assert export_jsonl(config, prompt_set, str(tmp_path / "all.jsonl")) == 10
    streamed = {e.uid: e for block in examples.iter_batches(batch_format="pyarrow") for e in rows_of(block)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    offline = list(KDDataset([tmp_path / "all.jsonl"], tokenizer, strict=True))
    assert len(offline) == 10
    assert all(repr(example) == repr(streamed[example.uid]) for example in offline)


def rows_of(block):
    return [example_from_row(block, index) for index in range(block.num_rows)]


def test_spans_are_added_by_a_command_of_its_own(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "p", "teacher_text": '{"name": "f", "arguments": {}}'}) + "\n[]\n")
    assert main(["--add-process-targets", str(file)]) == 0
    assert "1 of 2 rows got spans, 1 cannot" in capsys.readouterr().out
    header, row, other = (tmp_path / "a.targets.jsonl").read_text().splitlines()
    assert json.loads(header)["__header__"]["dataset_fingerprint"]
    assert json.loads(row)["spans"]["tool_name"] == [[10, 11]]
    assert other == "[]"
