"""The teacher without a model: payload of the real size, the same in every run, after the time that an engine would take."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.arrow import ListColumn
from teacher_serving.config import HfTeacherConfig, SimulatedTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.identity import describe
from teacher_serving.simulated import Places, SimulatedTeacher
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, Teacher

TOP_K = 8


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A model without its weights."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def teacher_of(folder: Path, **options) -> Teacher:
    at_once = {"tokens_per_s": 1e12, "top_k": TOP_K, "response_tokens": 60, "sampling": {"max_tokens": 100}}
    return connect(SimulatedTeacherConfig.model_validate({"model": str(folder), **at_once, **options}))


def prompts(count: int, length: int = 10) -> pa.Table:
    return pa.table(
        {
            "uid": pa.array(range(count), pa.int64()),
            "prompt_ids": pa.array([np.arange(length, dtype=np.int32)] * count, pa.list_(pa.int32())),
        }
    )


def test_answers_have_the_schema_and_sizes_of_a_real_teachers(folder: Path, demo_tokenizer):
    teacher = teacher_of(folder, hidden_layers=[0, 1])
    table = teacher.generate(prompts(200))
    assert isinstance(teacher, SimulatedTeacher)
    assert table.schema == TEACHER_OUTPUT_SCHEMA
    lengths = ListColumn.of(table, "output_ids").lengths
    assert lengths.min() >= 1
    assert lengths.max() == 100, "sampling.max_tokens cuts the longest"
    assert 45 < lengths.mean() < 65, "the mean asked for is 60, before the cut"
    for name, per_row in {
        "topk_ids": lengths * TOP_K,
        "topk_logprobs": lengths * TOP_K,
        "log_tail": lengths,
        "sampled_logprob": lengths,
        "hidden_states": 2 * 64 * (lengths + 10),
    }.items():
        assert np.array_equal(table[name].combine_chunks().value_lengths().to_numpy(), per_row), name
    cut = lengths == 100
    assert table["finish_reason"].to_pylist() == ["length" if is_cut else "stop" for is_cut in cut]
    longest_whole = int(np.argmax(np.where(cut, 0, lengths)))
    text = demo_tokenizer.decode(table["output_ids"][longest_whole].as_py())
    assert json.loads(text.partition("<tool_call>")[2].partition("</tool_call>")[0])["name"] == "look_up"
    assert text.endswith(demo_tokenizer.eos_token)


@pytest.mark.parametrize("top_k", [1, 8, 256])
def test_scores_are_a_distribution_with_the_text_itself_on_rank_one(folder: Path, top_k: int):
    table = teacher_of(folder, top_k=top_k).generate(prompts(20))
    output = table["output_ids"].combine_chunks().flatten().to_numpy()
    ids, logprobs = (
        table[name].combine_chunks().flatten().to_numpy().reshape(-1, top_k) for name in ("topk_ids", "topk_logprobs")
    )
    assert np.array_equal(ids[:, 0], output)
    assert all(len(np.unique(row)) == top_k for row in ids), "K different ids"
    assert ids.min() >= 0
    assert ids.max() < describe(SimulatedTeacherConfig(model=str(folder))).vocab_size
    assert (np.diff(logprobs.astype(np.float32), axis=1) <= 0).all(), "rank order"
    tail = table["log_tail"].combine_chunks().flatten().to_numpy()
    whole = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail)
    assert np.allclose(whole, 1.0, atol=5e-3), "up to what half precision rounds"


def test_an_answer_depends_on_the_prompt_and_the_seed_alone(folder: Path):
    first, other = teacher_of(folder), teacher_of(folder)
    alone = pa.concat_tables([first.generate(prompts(5).slice(row, 1)) for row in range(5)])
    assert alone.equals(other.generate(prompts(5)))
    assert not alone.equals(teacher_of(folder, sampling={"max_tokens": 100, "seed": 1}).generate(prompts(5)))
    lengths = ListColumn.of(alone, "output_ids").lengths
    assert len(set(lengths.tolist())) > 1


def test_given_text_is_scored_and_rows_that_no_engine_takes_are_error_rows(folder: Path):
    teacher = teacher_of(folder, max_model_len=32)
    given = prompts(3).append_column("output_ids", pa.array([[5, 6, 7], [8], [2] * 30], pa.list_(pa.int32())))
    table = teacher.score(given)
    assert table["output_ids"].to_pylist() == [[5, 6, 7], [8], []]
    assert table["finish_reason"].to_pylist()[:2] == ["given", "given"]
    assert "error: 40 tokens are needed" in table["finish_reason"][2].as_py()
    too_long = teacher.generate(prompts(1, length=32))
    assert "error: 33 tokens are needed" in too_long["finish_reason"][0].as_py()


def test_answers_are_not_mixed_with_those_of_the_real_teacher(tiny_model_path: Path):
    common = {"model": str(tiny_model_path), "top_k": TOP_K}
    simulated = describe(SimulatedTeacherConfig.model_validate(common))
    assert simulated.fingerprint != describe(HfTeacherConfig.model_validate(common)).fingerprint
    longer = describe(SimulatedTeacherConfig.model_validate(common | {"response_tokens": 100}))
    faster = describe(SimulatedTeacherConfig.model_validate(common | {"tokens_per_s": 1.0}))
    assert longer.fingerprint != simulated.fingerprint == faster.fingerprint


def test_an_engine_makes_its_rate_while_its_places_are_taken():
    places = Places(num_places=4, tokens_per_s=100.0)  # 25 tokens a second for each sequence
    assert places.take(0.0, [25, 50]) == 2.0
    assert places.take(0.0, [100, 25]) == 4.0, "two places were left"
    # Free at 1, 1, 2, 4: each text waits for a place.
    assert places.take(0.5, [25, 25, 25]) == 3.0
    assert places.take(10.0, [50]) == 12.0
    assert Places(4, float("inf")).take(7.0, [1000]) == 7.0


def test_calls_of_several_threads_share_one_engine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    # 20 places at 1 token a second each: the first call's answers take as many seconds as the longest has tokens.
    teacher = teacher_of(folder, tokens_per_s=20.0, max_num_seqs=20)
    calls = [threading.Thread(target=teacher.generate, args=(prompts(20),)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    longest = ListColumn.of(teacher.generate(prompts(20)), "output_ids").lengths.max()
    assert sorted(slept)[0] == pytest.approx(longest, abs=5)
    assert sorted(slept)[1] > longest + 10, "the second call waits for places"
