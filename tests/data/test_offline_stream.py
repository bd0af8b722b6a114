"""Offline data as a Ray dataset: every row as often as its weight says, once per uid, through restarts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from prompt_helpers import write_lines

from raykd.config import Config
from raykd.data.dataset import KDDataset
from raykd.data.examples import decode_spans, example_from_row
from raykd.data.offline_stream import offline_dataset, plan_offline_epoch, prepare_offline
from raykd.data.readers import DataError
from raykd.types import Mark

NOTHING = np.empty(0, np.int64)


def rows(name, count):
    return [{"prompt": "<|im_start|>user\n?<|im_end|>\n", "teacher_text": f"{name} {i}"} for i in range(count)]


def read(config, offline_set, epoch, consumed=NOTHING):
    dataset = offline_dataset(config, offline_set, epoch, consumed)
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return [example_from_row(block, i) for block in blocks for i in range(block.num_rows)]


@pytest.mark.ray
def test_an_epoch_of_files_is_read_once_in_order_and_goes_on_after_a_restart(
    tmp_path, tiny_model_path, demo_tokenizer, ray_cluster
):
    bad = {"prompt": "p", "teacher_text": "x", "uid": 5, "topk_ids": [[1]], "topk_logprobs": [[9.0]]}
    a = write_lines(tmp_path / "a.jsonl", [*rows("a", 40), bad, b"{"])
    b = write_lines(tmp_path / "b.jsonl", rows("b", 10))
    held_out = write_lines(tmp_path / "held_out.jsonl", [*rows("h", 3), rows("a", 40)[7]])
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path), "seed": 3},
            "teacher": {"kind": "hf", "model": str(tiny_model_path), "device": "cpu", "top_k": 4},
            "student": {"model": str(tiny_model_path)},
            "data": {
                "offline": [{"path": str(a)}, {"path": str(b), "weight": 2}],
                "held_out": str(held_out),
                "max_held_out": 2,
                "fixed_order": True,
                "max_rejected_fraction": 0.1,
            },
        }
    )
    run = tmp_path / "run"
    run.mkdir()
    offline_set = prepare_offline(config, run)
    assert (offline_set.num_train, offline_set.num_held_out, offline_set.num_rejected) == (40 + 20, 4, 2)
    assert prepare_offline(config, run) == offline_set

    examples = read(config, offline_set, 0)
    texts = [decode_spans(example, demo_tokenizer)[Mark.RESPONSE][0].split("<")[0] for example in examples]
    assert [example.held_out for example in examples] == [True] * 2 + [False] * 59
    assert sorted(texts[2:]) == sorted([f"a {i}" for i in range(40) if i != 7] + 2 * [f"b {i}" for i in range(10)])
    uids = [example.uid for example in examples]
    assert len(set(uids)) == len(uids)
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [entry["reason"].split(":")[0] for entry in rejected[:2]] == ["malformed JSON", "duplicate"]
    assert rejected[2]["key"] == f"{a}:41"
    assert "no log-probabilities" in rejected[2]["reason"]
    assert rejected[2]["uid"] == 5

    consumed = np.array(uids[2:30])
    rest = read(config, offline_set, 0, consumed)
    assert [example.uid for example in rest] == uids[:2] + uids[30:]
    second = plan_offline_epoch(config, offline_set, 1, np.array(uids[2:]))
    assert second.num_rows == 2 + 60
    assert set(second["epoch_uid"].to_pylist()[2:]).isdisjoint(uids)
    plain = {example.uid: example for example in KDDataset([a, b], demo_tokenizer, max_rejected_fraction=0.1)}
    by_uid = {example.uid: example for example in examples}
    assert len(plain.keys() & by_uid.keys()) == 39 + 10
    assert all(repr(plain[uid]) == repr(by_uid[uid]) for uid in plain.keys() & by_uid.keys())

    write_lines(a, rows("a", 41))
    with pytest.raises(DataError, match="other rows than when this run began"):
        prepare_offline(config, run)


def test_prompts_or_offline_files_but_not_both_nor_neither():
    config = {"teacher": {"kind": "hf", "model": "m"}, "student": {"model": "m"}}
    Config.model_validate(config | {"data": {"offline": [{"path": "a"}]}, "loss": {"ce_truth": 1.0}})
    for data, found in (({"prompts": "p", "offline": [{"path": "a"}]}, "both"), ({}, "neither")):
        with pytest.raises(ValueError, match=f"found {found}, expected one of the two"):
            Config.model_validate(config | {"data": data})
