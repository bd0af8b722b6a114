"""Collecting: the teacher alone, into the cache that training reads, and only what is missing."""

from __future__ import annotations

import json
from typing import Any

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
from raykd.training.preflight import contact_teacher
from teacher_serving.identity import describe
from tests.completion_server import completion, completion_server


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


@pytest.mark.ray
@pytest.mark.long
def test_several_teachers_answer_each_its_own_prompts_and_keep_to_them(tmp_path, tiny_model_path, ray_cluster):
    rows = [{"id": n, "prompt": f"what is {n}?"} for n in range(12)]
    for row, name in zip(rows, ("math", "code", "code", "physics"), strict=False):
        row["teacher_id"] = name
    file = tmp_path / "train.jsonl"
    with completion_server() as math, completion_server() as code:
        code.answer = lambda body: completion(finish_reason="stop")
        at = {
            name: {"kind": "http", "address": server.address, "model": "tiny"}
            for name, server in {"math": math, "code": code}.items()
        }
        settings = {
            "run": {"name": "run", "dir": str(tmp_path)},
            "teacher": {
                "kind": "several",
                "teachers": at | {"code": at["code"] | {"weight": 3}},
                "tokenizer": str(tiny_model_path),
                "top_k": 3,
                "batch_size": 4,
                "sampling": {"max_tokens": 8},
            },
            "student": {"model": str(tiny_model_path)},
            "data": {"prompts": str(file), "max_rejected_fraction": 0.5},
        }

        def collected() -> tuple[Any, dict[str, str]]:
            """What a collection amounts to, and who answered each row of the cache, by its key."""
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            config = Config.model_validate(settings)
            prompt_set = prepare_prompts(config, tmp_path / "run")
            result = collect(config, prompt_set)
            cache, prompts = teacher_cache(config, prompt_set), prompt_set.read(held_out=False)
            files, places = cache.index().lookup(prompts["uid"].to_numpy())
            answers = cache.read([cache.index().files[place] for place in files], places)
            assert answers["teacher_id"].equals(prompts["for_teacher"])
            assert answers["finish_reason"].to_pylist() == [
                "length" if name == "math" else "stop" for name in answers["teacher_id"].to_pylist()
            ]
            return result, dict(zip(prompts["key"].to_pylist(), answers["teacher_id"].to_pylist(), strict=True))

        def num_asked() -> tuple[int, int]:
            return tuple(sum(body["max_tokens"] > 1 for body in server.asked) for server in (math, code))  # type: ignore[return-value]

        first, who = collected()
        assert (first.num_cached, first.num_rows, first.num_failed) == (0, 11, 0)
        assert (who["0"], who["1"], who["2"], "3" in who) == ("math", "code", "code", False)
        assert "`teacher_id` is 'physics'" in (tmp_path / "run" / "rejected.jsonl").read_text()
        names = list(who.values())
        assert num_asked() == (names.count("math"), names.count("code"))
        rows[0]["teacher_id"], rows[3]["teacher_id"] = "code", "math"  # another teacher's answer is not theirs
        second, again = collected()
        assert (second.num_cached, second.num_rows) == (10, 2)
        assert again == who | {"0": "code", "3": "math"}
        assert num_asked() == (names.count("math") + 1, names.count("code") + 1)


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


@pytest.mark.ray
def test_a_teacher_behind_an_api_is_paid_for_every_prompt_once_and_stops_with_its_budget(
    tmp_path, tiny_model_path, ray_cluster, monkeypatch, caplog
):
    monkeypatch.setenv("TEACHER_KEY", "sk-a-secret")  # the actors' processes are older than it
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"what is {i}?"}) + "\n" for i in range(12)))
    with completion_server() as server:
        teacher = {
            "kind": "http",
            "address": server.address,
            "model": "tiny",
            "tokenizer": str(tiny_model_path),
            "api_key_env": "TEACHER_KEY",
            "top_k": 3,
            "max_model_len": 64,
            "batch_size": 2,
            "sampling": {"max_tokens": 8},
        }

        def configured(max_tokens: int | None) -> Config:
            return Config.model_validate(
                {
                    "run": {"name": "run", "dir": str(tmp_path)},
                    "teacher": {**teacher, "budget": {"max_tokens": max_tokens}},
                    "student": {"model": str(tiny_model_path)},
                    "data": {"prompts": str(tmp_path / "train.jsonl")},
                }
            )

        config = configured(60)
        prompt_set = prepare_prompts(config, tmp_path / "run")
        with pytest.raises(DataError, match=r"some prompts were not asked: .*teacher.budget.max_tokens=60.*rows answered"):
            collect(config, prompt_set)
        cache = teacher_cache(config, prompt_set)
        ledger = (cache.path / "spent.txt").read_bytes().splitlines()
        kept = len(cache.index().uid)
        assert 0 < kept == len(ledger) < 12
        assert not (tmp_path / "run" / "rejected.jsonl").read_bytes()
        rest = collect(configured(None), prompt_set)
        assert (rest.num_cached, rest.num_rows, rest.num_failed) == (kept, 12 - kept, 0)
        asked = [tuple(body["prompt"]) for body in server.asked if body["max_tokens"] > 1]
        assert len(asked) == len(set(asked)) == 12
        assert set(server.keys) == {"Bearer sk-a-secret"}
    assert contact_teacher(config, describe(config.teacher)).startswith("cannot be asked now; there are answers in ")
    assert "does not answer" in caplog.text
    assert "sk-a-secret" not in caplog.text
