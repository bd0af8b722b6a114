"""Scores on the teacher's text: the teacher itself is at no distance, under whatever ids, and with more tokens at little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from raykd.config import StudentConfig
from raykd.evaluation.models import ModelFiles, make_int8
from raykd.evaluation.token_scores import score_by_teacher, score_examples
from raykd.stage_config import QuantizationConfig
from raykd.student.model import load_student
from teacher_serving.config import HfTeacherConfig
from teacher_serving.connect import connect
from tests.moved_ids import save_moved

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def prompts(demo_tokenizer) -> pa.Table:
    texts = ["what is two?", "a longer question", "the third"]
    ids = [demo_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    empty = ["[]"] * len(texts)
    return pa.table(
        {
            "uid": pa.array(range(len(texts)), pa.int64()),
            "prompt_ids": pa.array(ids, pa.list_(pa.int32())),
            "messages_json": empty,
            "tools_json": empty,
        }
    )


@pytest.fixture(scope="module")
def teacher_rows(tiny_model_path: Path, demo_tokenizer, prompts: pa.Table) -> pa.Table:
    """Three texts as if the teacher had written them, one of them a call."""
    texts = ["Two.<|im_end|>", CALL, "The third is last.<|im_end|>"]
    ids = [demo_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    config = HfTeacherConfig(model=str(tiny_model_path), dtype="float32", device="cpu", top_k=16, max_model_len=128)
    sequences = prompts.select(["uid", "prompt_ids"]).append_column("output_ids", pa.array(ids, pa.list_(pa.int32())))
    return connect(config).score(sequences)


def scores_of(config: StudentConfig, teacher: Path, prompts: pa.Table, teacher_rows: pa.Table) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    return [dict(score) for score in score_examples(load_student(config, 0).eval(), tokenizer, prompts, teacher_rows)]


def assert_close(found: list[dict], expected: list[dict], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert np.allclose(one[name], other[name], atol=tolerance), name


def test_a_student_under_other_ids_is_judged_like_the_one_under_the_teachers(
    tmp_path, tiny_model_path, prompts, teacher_rows
):
    own = scores_of(StudentConfig(model=str(tiny_model_path)), tiny_model_path, prompts, teacher_rows)
    assert max(total / count for total, count in (score["kl"] for score in own)) < 1e-3  # half-precision scores
    assert all(total == count > 0 for total, count in (score["top1_agreement"] for score in own))
    assert ["tool_name_tokens" in score for score in own] == [False, True, False]
    save_moved(tmp_path / "moved", tiny_model_path, extra=())
    moved = scores_of(StudentConfig(model=str(tmp_path / "moved")), tiny_model_path, prompts, teacher_rows)
    assert_close(moved, own, 1e-4)


def test_a_student_with_more_tokens_than_its_teacher_is_judged_on_all_of_its_own(
    tmp_path, tiny_model_path, prompts, teacher_rows
):
    own = scores_of(StudentConfig(model=str(tiny_model_path)), tiny_model_path, prompts, teacher_rows)
    config = StudentConfig(model=str(tiny_model_path), new_tokens={"<bot>": "what", "<eot>": "", "<slot>": ""})
    grown = load_student(config, 0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    found = [dict(score) for score in score_examples(grown.eval(), tokenizer, prompts, teacher_rows)]
    for one, other in zip(found, own, strict=True):
        assert one["perplexity"][0] > other["perplexity"][0]  # the new tokens have some of the mass
        assert one["perplexity"][0] < other["perplexity"][0] + 0.5
        assert one["kl"][0] / one["kl"][1] < 0.02
    grown.save(tmp_path / "grown")
    for folder, expected in ((tmp_path / "grown", found), (tiny_model_path, own)):  # each as it is saved
        saved = score_by_teacher(config, str(folder), str(tiny_model_path), prompts, teacher_rows, num_threads=1)
        assert_close([dict(score) for score in saved], expected, 1e-5)


def test_accuracies_of_classes_add_up_to_those_of_the_arguments_and_leave_out_what_is_not_there(
    tiny_model_path, prompts, teacher_rows
):
    own = scores_of(StudentConfig(model=str(tiny_model_path)), tiny_model_path, prompts, teacher_rows)
    of_call = own[1]
    keys, values = of_call["argument_key_tokens"], of_call["argument_value_tokens"]
    assert 0 < keys[1] + values[1] < of_call["json_argument_tokens"][1]  # braces, colons and quotes too
    assert keys[0] + values[0] <= of_call["json_argument_tokens"][0]
    assert not {"claim_tokens", "integration_tokens"} & set().union(*own)


def test_an_int8_model_is_scored_with_the_arithmetic_that_it_was_trained_in(
    tmp_path, tiny_model_path, prompts, teacher_rows
):
    config, teacher = StudentConfig(model=str(tiny_model_path)), str(tiny_model_path)
    trained = ModelFiles(tiny_model_path, quantization=QuantizationConfig())
    exported = make_int8(config, trained, tmp_path / "int8")
    assert exported == ModelFiles(tmp_path / "int8")
    scores = score_by_teacher(config, str(exported.folder), teacher, prompts, teacher_rows, num_threads=1)
    own = scores_of(config, tiny_model_path, prompts, teacher_rows)
    kl = [sum(score["kl"][part] for score in scores) for part in (0, 1)]
    assert 1e-4 < kl[0] / kl[1] < 0.1  # of its float self
    assert [dict(score).keys() for score in scores] == [score.keys() for score in own]
