"""Offline data as a Ray dataset: every row as often as its weight says, once per uid, through restarts."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prompt_helpers import write_lines

from raykd.config import Config
from raykd.data.dataset import KDDataset
from raykd.data.examples import decode_spans, example_from_row
from raykd.data.offline_files import index_file
from raykd.data.offline_stream import (
    BLOCK_ROWS,
    OfflineReader,
    offline_dataset,
    offline_files,
    plan_offline_epoch,
    prepare_offline,
)
from raykd.data.readers import DataError
from raykd.data.sources import RowCounts
from raykd.data.stream import Rejects
from raykd.data.uids import rejected_uid
from raykd.types import Mark
from raykd.vocabulary import backend_of, student_tokenizer
from teacher_serving.identity import vocabulary_fingerprint
from tests.moved_ids import save_moved

NOTHING = np.empty(0, np.int64)


def rows(name, count):
    return [{"prompt": f"<|im_start|>user\n{name}{i}?<|im_end|>\n", "teacher_text": f"{name} {i}"} for i in range(count)]


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
    assert (offline_set.num_train, offline_set.num_held_out, offline_set.num_rejected) == (40 + 20, 4, 1)
    assert (offline_set.num_contaminated, offline_set.counts) == (1, RowCounts(60, 4 + 40 + 10 + 1 + 1, 1))
    assert prepare_offline(config, run) == offline_set

    examples = read(config, offline_set, 0)
    texts = [decode_spans(example, demo_tokenizer)[Mark.RESPONSE][0].split("<")[0] for example in examples]
    assert [example.held_out for example in examples] == [True] * 2 + [False] * 59
    assert sorted(texts[2:]) == sorted([f"a {i}" for i in range(40) if i != 7] + 2 * [f"b {i}" for i in range(10)])
    uids = [example.uid for example in examples]
    assert len(set(uids)) == len(uids)
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [entry["reason"].split(":")[0] for entry in rejected[:2]] == ["malformed JSON", "left out of training"]
    assert rejected[1]["line"] == 8
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


def test_rows_come_in_the_students_ids_whether_they_are_in_the_teachers_or_say_that_they_are_in_its_own(
    tmp_path, tiny_model_path
):
    """A file's header says so; texts are split into the tokens of the same vocabulary."""
    save_moved(tmp_path / "student", tiny_model_path, extra=("<x>",))
    student = student_tokenizer(tmp_path / "student", ["<new>"])
    own = vocabulary_fingerprint(backend_of(student))
    ids = student("four <new><x>", add_special_tokens=False)["input_ids"]
    given = {"prompt_ids": ids[:2], "output_ids": [*ids, student.eos_token_id]}
    spelled = {"prompt": "p", "teacher_text": "a <new> word"}
    teachers = write_lines(tmp_path / "teachers.jsonl", [*rows("a", 2), spelled])
    students = write_lines(
        tmp_path / "students.jsonl", [{"__header__": True, "vocabulary_fingerprint": own}, given, spelled]
    )
    config = Config.model_validate(
        {
            "teacher": {"kind": "hf", "model": str(tiny_model_path), "device": "cpu", "top_k": 4},
            "student": {"model": str(tmp_path / "student"), "new_tokens": {"<new>": ""}},
            "data": {"offline": [{"path": str(teachers)}, {"path": str(students)}]},
            "loss": {"ce_truth": 1.0},
        }
    )
    teachers_own = vocabulary_fingerprint(tiny_model_path)
    files = [index_file(path, teachers_own, own) for path in (teachers, students)]
    with pytest.raises(DataError, match=rf"of vocabulary {own}, expected {teachers_own}"):
        index_file(students, teachers_own)
    order = [(0, 0), (1, 1), (0, 2), (1, 0), (0, 1)]
    described = pa.table(
        {
            "file": [files[file].path for file, _ in order],
            "kind": ["jsonl"] * 5,
            "vocabulary": pa.array([files[file].vocabulary for file, _ in order], pa.string()),
            "position": pa.array([files[file].position[row] for file, row in order], pa.int64()),
            "key": [str(entry) for entry in order],
            "uid": range(5),
            "epoch_uid": range(5),
            "step": [0] * 5,
            "held_out": [False] * 5,
        }
    )
    rejects = Rejects(str(tmp_path / "rejected.jsonl"), num_rows=5, num_rejected=0, limit=0.0)
    examples = OfflineReader(config, rejects)(described)
    read = [example_from_row(examples, i) for i in range(examples.num_rows)]
    assert [example.uid for example in read] == list(range(5))
    texts = [decode_spans(example, student)[Mark.RESPONSE][0] for example in read]
    assert texts == [f"{text}<|im_end|>" for text in ("a 0", "a <new> word", "a <new> word", "four <new><x>", "a 1")]
    new = student.get_vocab()["<new>"]
    assert [new in example.input_ids for example in read] == [False, True, False, True, False]
    assert read[3].input_ids.tolist() == given["prompt_ids"] + given["output_ids"]


def offline_config(tmp_path, model, offline, **more):
    return Config.model_validate(
        {
            "run": {"dir": str(tmp_path), "seed": 3},
            "teacher": {"kind": "hf", "model": str(model), "device": "cpu", "top_k": 4} | more.pop("teacher", {}),
            "student": {"model": str(model)} | more.pop("student", {}),
            "data": {"offline": [{"path": str(path)} for path in offline], "fixed_order": True} | more.pop("data", {}),
        }
        | more
    )


def run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.ray
def test_beside_prompts_rows_have_uids_and_steps_of_the_mixture_and_no_held_out_rows(tmp_path, tiny_model_path, ray_cluster):
    path = write_lines(tmp_path / "a.jsonl", [{**row, "uid": uid} for uid, row in enumerate(rows("a", 10))])
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}"} for i in range(30)])
    alone = offline_config(tmp_path, tiny_model_path, [path], train={"sequences_per_step": 8})
    data = {"prompts": str(prompts), "held_out": str(prompts)}
    mixture = offline_config(tmp_path, tiny_model_path, [path], data=data, train={"sequences_per_step": 8})
    run = run_folder(tmp_path)
    (run / "rejected.jsonl").write_text("of the prompts\n")
    offline_set = prepare_offline(mixture, run)
    assert (offline_set.num_train, offline_set.num_held_out) == (10, 0)
    assert (run / "rejected.jsonl").read_text() == "of the prompts\n"
    beside = RowCounts(num_train=30, num_rows=33, num_rejected=3)
    by_itself = plan_offline_epoch(alone, offline_set, 1, NOTHING)
    mixed = plan_offline_epoch(mixture, offline_set, 1, NOTHING, beside)
    assert by_itself["step"].to_pylist() == [2] * 8 + [3] * 2
    assert mixed["step"].to_pylist() == [5] * 2 + [6] * 2 + [7] * 2 + [8] * 2 + [9] * 2, "two of eight rows of a step"
    assert mixed["position"].equals(by_itself["position"])
    for name in ("uid", "epoch_uid"):
        uids = mixed[name].to_numpy()
        assert not np.isin(uids, [*range(10), *by_itself[name].to_pylist()]).any(), "the prompts may have these uids"
        assert len(set(uids)) == 10
    consumed = mixed["epoch_uid"].to_numpy()[:4]
    assert plan_offline_epoch(mixture, offline_set, 1, consumed, beside).equals(mixed.slice(4))


@pytest.mark.ray
def test_reading_leads_a_slow_trainer_by_the_bound_and_the_blocks_in_flight_at_most(tmp_path, tiny_model_path, ray_cluster):
    blocks = 12
    bad = {"prompt": "p", "topk_ids": [[1]], "topk_logprobs": [[9.0]]}  # one in every block, so that blocks can be counted
    file = [row for n in range(blocks) for row in [bad | {"teacher_text": f"bad {n}"}, *rows(f"a{n}", BLOCK_ROWS - 1)]]
    path = write_lines(tmp_path / "a.jsonl", file)
    data = {"shuffle": False, "max_lead_tokens": 1, "max_rejected_fraction": 1.0}
    config = offline_config(tmp_path, tiny_model_path, [path], data=data, train={"sequences_per_step": 1})
    run = run_folder(tmp_path)
    shards: Any = offline_dataset(config, prepare_offline(config, run), 0, NOTHING).streaming_split(1, equal=False)
    leads = []
    for number, _ in enumerate(shards[0].iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0), 1):
        if number < 3:
            time.sleep(2.0)  # time in which an unbounded reader would be through with all blocks
        leads.append(len((run / "rejected.jsonl").read_text().splitlines()) - number)
    assert leads[-1] == 0, "all blocks come"
    assert max(leads) <= 5, leads  # four calls may wait at an actor


@pytest.mark.ray
def test_the_latent_curriculum_rewrites_offline_rows_by_the_step_that_they_are_for(
    tmp_path, tiny_model_path, demo_tokenizer, ray_cluster
):
    text = "Step 1: think.\nStep 2: think more.\nThe answer is 4."
    file = [{"prompt": "<|im_start|>user\n?<|im_end|>\n", "teacher_text": text, "id": i, "uid": i} for i in range(6)]
    path = write_lines(tmp_path / "a.jsonl", file)
    config = offline_config(
        tmp_path,
        tiny_model_path,
        [path],
        student={"new_tokens": {"<bot>": "", "<slot>": "", "<eot>": ""}},
        latent={"stages": [{"until_step": 1, "steps": 1, "slots": 2, "probability": 1.0}]},
        loss={"ce_teacher": 1.0},
        train={"sequences_per_step": 2},
    )
    examples = read(config, prepare_offline(config, run_folder(tmp_path)), 0)
    slots = [int(((example.marks & Mark.LATENT) != 0).sum()) for example in examples]
    assert slots == [2, 2, 0, 0, 0, 0]
    assert len(examples[0].input_ids) < len(examples[2].input_ids)


def test_teacher_states_are_of_the_layers_that_the_run_looks_at_or_the_reason_for_a_reject(
    tmp_path, tiny_model_path, demo_tokenizer
):
    length = len(demo_tokenizer(rows("a", 1)[0]["prompt"] + "a 0<|im_end|>", add_special_tokens=False)["input_ids"])
    (row,) = rows("a", 1)
    of_states = [row | {"uid": n, "teacher_hidden_states": np.full((n, length, 64), n).tolist()} for n in (1, 2)]
    path = write_lines(tmp_path / "a.jsonl", [row, *of_states])
    index = index_file(path)
    plan = pa.table(
        {
            "file": [str(path)] * 3, "kind": ["jsonl"] * 3, "position": index.position, "key": ["0", "1", "2"],
            "vocabulary": pa.nulls(3, pa.string()), "uid": [7, 8, 9], "epoch_uid": [7, 8, 9], "step": [0] * 3,
            "held_out": [False] * 3,
        }
    )  # fmt: skip

    def read_by(**teacher):
        rejects = Rejects(str(tmp_path / "rejected.jsonl"), num_rows=10, num_rejected=0, limit=0.1)
        table = OfflineReader(offline_config(tmp_path, tiny_model_path, [path], teacher=teacher), rejects)(plan)
        return dict(zip(table["uid"].to_pylist(), table["num_teacher_layers"].to_pylist(), strict=True))

    assert read_by() == {7: 0, 8: 0, 9: 0}, "no loss looks at them"
    assert read_by(hidden_layers=[0, 1]) == {7: 0, 9: 2}
    (entry,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["uid"] == 8
    assert "of 1 layers of width 64, expected 2 layers (teacher.hidden_layers) of width 64" in entry["reason"]


def test_loops_of_rows_that_name_no_tier_are_capped_by_that_of_the_run(tmp_path, tiny_model_path):
    loop = {"loop_index": 0, "max_loops": 3, "judge_score": 0.2}
    drafts = [row | {"metadata": loop | tier} for row, tier in zip(rows("a", 2), [{}, {"caws_tier": 3}], strict=True)]
    path = write_lines(tmp_path / "a.jsonl", drafts)
    plan = {"file": [str(path)] * 2, "kind": ["jsonl"] * 2, "position": index_file(path).position, "step": [0, 0]}
    plan |= {"key": ["a", "b"], "uid": [1, 2], "epoch_uid": [1, 2], "held_out": [False] * 2}
    plan |= {"vocabulary": pa.nulls(2, pa.string())}
    config = offline_config(tmp_path, tiny_model_path, [path], loss={"halt": 1.0, "caws_tier": 1})
    table = OfflineReader(config, Rejects(str(tmp_path / "rejected.jsonl"), 2, 0, 0.0))(pa.table(plan))
    assert table["halt_targets"].to_pylist() == [[1.0], [0.0]]


def test_files_that_are_not_there_are_named_with_their_option(tmp_path, tiny_model_path):
    there = write_lines(tmp_path / "a.jsonl", rows("a", 1))
    assert offline_files(offline_config(tmp_path, tiny_model_path, [there])) == [(str(there), 1.0, False)]
    with pytest.raises(DataError, match="data.offline: no file '.*nowhere.jsonl'"):
        offline_files(offline_config(tmp_path, tiny_model_path, [there, tmp_path / "nowhere.jsonl"]))
    held_out = {"held_out": str(tmp_path)}
    with pytest.raises(DataError, match=r"data.held_out \(without data.prompts\): no file"):
        offline_files(offline_config(tmp_path, tiny_model_path, [there], data=held_out))
    with_prompts = offline_config(tmp_path, tiny_model_path, [there], data=held_out | {"prompts": "p"})
    assert offline_files(with_prompts) == [(str(there), 1.0, False)], "then it is of the prompts"


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_pair_comes_whole_under_the_uid_of_its_pass_where_the_preference_is_trained(
    weight, tmp_path, tiny_model_path, demo_tokenizer
):
    prompt = "<|im_start|>user\n?<|im_end|>\n"
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"prompt": prompt, "teacher_text": "yes", "rejected_text": "no"}, {"prompt": prompt, "teacher_text": "alone"}],
    )
    losses = {"ce_truth": 1.0, "code_mode_preference": weight}
    config = offline_config(tmp_path, tiny_model_path, [path], loss=losses)
    plan = {"file": [str(path)] * 2, "kind": ["jsonl"] * 2, "position": index_file(path).position, "step": [0, 0]}
    plan |= {"key": ["a", "b"], "uid": [1, 2], "epoch_uid": [71, 72], "held_out": [True, False]}
    plan |= {"vocabulary": pa.nulls(2, pa.string())}
    table = OfflineReader(config, Rejects(str(tmp_path / "rejected.jsonl"), 2, 0, 0.0))(pa.table(plan))
    examples = [example_from_row(table, i) for i in range(table.num_rows)]
    texts = [decode_spans(example, demo_tokenizer)[Mark.RESPONSE][0].split("<")[0] for example in examples]
    if not weight:  # a rejected text that nothing looks at would only cost time
        assert (texts, [example.pair for example in examples]) == (["yes", "alone"], [0, 0])
        return
    assert texts == ["yes", "no", "alone"]
    assert [example.uid for example in examples] == [71, rejected_uid(71), 72]
    assert [example.pair for example in examples] == [rejected_uid(71), -rejected_uid(71), 0]
    assert [example.held_out for example in examples] == [True, True, False]
