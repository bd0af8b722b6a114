"""Collecting: the teacher alone, into the cache that training reads, and only what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from raykd.collect import collect, export_jsonl, export_parquet, main
from raykd.config import Config
from raykd.data.dataset import KDDataset
from raykd.data.examples import example_from_row
from raykd.data.offline_stream import offline_dataset, prepare_offline
from raykd.data.readers import DataError
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


CHAT = [
    {"role": "user", "content": "what is 6 times 7?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "times", "arguments": {"a": 6, "b": 7}}}]},
    {"role": "tool", "content": '{"product": 42.5}'},
    {"role": "assistant", "content": "It is 42.5."},
]
TOOLS = [{"type": "function", "function": {"name": "times", "parameters": {"type": "object"}}}]


@pytest.mark.ray
@pytest.mark.parametrize("completions", ["teacher", "recorded"])
def test_files_of_what_was_collected_give_the_examples_of_the_stream_bit_for_bit(
    completions, tmp_path, tiny_model_path, demo_tokenizer, ray_cluster
):
    """Also where the teacher's head has rows that are no tokens, and with its hidden states."""
    padded = tmp_path / "padded"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    head = model.resize_token_embeddings(len(demo_tokenizer) + 600, mean_resizing=False).weight.data
    head[-600:] = 0.5 * head[:600]  # likelier than most, and never the likeliest
    model.save_pretrained(padded)
    demo_tokenizer.save_pretrained(padded)
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, *CHAT], "tools": TOOLS} for n in range(3)]
    rows[0]["caws_tier"] = 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"kind": "hf", "model": str(padded), "device": "cpu", "top_k": 200, "batch_size": 2, "hidden_layers": [0, 1]}
    base = {"run": {"name": "run", "dir": str(tmp_path)}, "student": {"model": str(padded)}}
    base |= {"teacher": teacher | {"sampling": {"max_tokens": 5, "temperature": 0}}, "loss": {"kd": 1.0, "tool_choice": 1.0}}
    prompts = {"prompts": str(tmp_path / "train.jsonl"), "completions": completions, "max_rejected_fraction": 0.5}
    config = Config.model_validate(base | {"data": prompts})
    prompt_set = prepare_prompts(config, tmp_path / "run")
    collect(config, prompt_set)
    stream = example_stream(config, prompt_set, 0, np.empty(0, np.int64), unexpected)
    streamed = {e.uid: e for block in stream.iter_batches(batch_format="pyarrow") for e in rows_of(block)}
    assert streamed
    assert sorted(example.caws_tier for example in streamed.values()) == [0, 0, 3]
    assert any((example.topk_logprobs == -np.inf).any() for example in streamed.values()), "some ids were padding"
    for name, export in (("all.jsonl", export_jsonl), ("all.parquet", export_parquet)):
        assert export(config, prompt_set, str(tmp_path / name)) == 3
        data = {"offline": [{"path": str(tmp_path / name)}], "max_rejected_fraction": 0.5}
        alone = Config.model_validate(base | {"data": data})
        run = tmp_path / name.replace(".", "_")
        run.mkdir()
        dataset = offline_dataset(alone, prepare_offline(alone, run), 0, np.empty(0, np.int64))
        read = {e.uid: e for block in dataset.iter_batches(batch_format="pyarrow") for e in rows_of(block)}
        assert read.keys() == streamed.keys()
        for uid, example in read.items():
            for column, value in vars(streamed[uid]).items():
                found, expected = np.asarray(getattr(example, column)), np.asarray(value)
                assert found.dtype == expected.dtype, column
                assert np.array_equal(found, expected, equal_nan=found.dtype.kind == "f"), column
    with pytest.raises(DataError, match="vocabulary"):
        KDDataset([tmp_path / "all.parquet"], demo_tokenizer, vocabulary_fingerprint="another")


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
