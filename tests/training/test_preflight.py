"""raykd/training/preflight.py: what cannot work is refused with a reason before anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raykd.cli import load_config
from raykd.config import Config
from raykd.training.preflight import check, check_resources, num_steps, print_summary


@pytest.fixture
def base(tmp_path: Path, tiny_model_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hello"}) + "\n")
    return [
        "teacher.kind=hf",
        f"teacher.model={tiny_model_path}",
        f"student.model={tiny_model_path}",
        f"data.prompts={prompts}",
        f"run.dir={tmp_path / 'runs'}",
    ]


def configured(base: list[str], *overrides: str) -> Config:
    return load_config([], [*base, *overrides])


def test_a_run_that_can_work_passes_and_is_counted(base: list[str]):
    plan = check(configured(base))
    assert plan.teacher.vocab_size == plan.student_vocab_size
    assert plan.num_student_parameters > 0
    check_resources(configured(base), {"CPU": 8})


def test_other_vocabularies_are_refused_with_both_fingerprints(base: list[str], tiny_model_path: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_path, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="have different vocabularies") as error:
        check(configured(base, f"student.model={other}"))
    assert check(configured(base)).teacher.vocabulary_fingerprint in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kd_support=full", "teacher.hidden_layers=[0]"], r"kd_support=full.*add 1 to teacher\.hidden_layers"),
        (["loss.intermediate_layer=1", "teacher.hidden_layers=[5]"], r"hidden_layers=\[5\].*has 2 layers"),
        (["loss.intermediate_layer=1", "teacher.hidden_layers=[1]", "loss.layer_map={0: 0}"], "layer_map compares with"),
    ],
)
def test_hidden_layers_that_a_loss_needs_are_checked(base: list[str], overrides: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        check(configured(base, *overrides))
    check(configured(base, "loss.kd_support=full", "loss.intermediate_layer=1", "teacher.hidden_layers=[0, 1]"))


def test_an_lm_head_smaller_than_the_tokenizer_is_refused(base: list[str], tiny_model_path: Path, tmp_path: Path):
    other = tmp_path / "narrow"
    shutil.copytree(tiny_model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="LM head has 100 rows"):
        check(configured(base, f"student.model={other}"))


def test_a_student_with_a_shorter_context_than_the_teacher_is_refused(
    base: list[str], tiny_model_path: Path, tmp_path: Path
):
    other = tmp_path / "short"
    shutil.copytree(tiny_model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(ValueError, match="teacher.max_model_len=64"):
        check(configured(base, f"student.model={other}"))
    check(configured(base, f"student.model={other}", "teacher.max_model_len=64"))


def test_missing_prompts_and_models_are_named(base: list[str]):
    with pytest.raises(ValueError, match="data.prompts=/nowhere: nothing there"):
        check(configured(base, "data.prompts=/nowhere"))
    with pytest.raises(ValueError, match="data.held_out=/nowhere: nothing there"):
        check(configured(base, "data.held_out=/nowhere"))
    with pytest.raises(ValueError, match="/nowhere"):
        check(configured(base, "teacher.model=/nowhere"))
    with pytest.raises(ValueError, match="student.model"):
        check(configured(base, "student.model=/nowhere", "student.tokenizer=/nowhere"))


def test_an_empty_prompt_file_is_refused_before_anything_starts(base: list[str], tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"data\.prompts: .*empty\.jsonl is empty"):
        check(configured(base, f"data.prompts={tmp_path / 'empty.jsonl'}"))


def test_a_k_larger_than_the_vocabulary_is_refused_though_the_head_has_padding_rows(
    base: list[str], student_path: Path, tmp_path: Path
):
    padded = tmp_path / "padded"
    shutil.copytree(student_path, padded)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 128, "max_position_embeddings": 64}))
    models = [f"teacher.model={padded}", f"student.model={padded}", "student.random_weights=true"]
    with pytest.raises(ValueError, match="top_k=100 is more than the vocabulary's 64 tokens"):
        check(configured(base, *models, "teacher.top_k=100"))
    assert check(configured(base, *models, "teacher.top_k=64")).student_vocab_size == 128
    with pytest.raises(ValueError, match="top_k=200 is larger than the vocabulary of .*: 128 tokens"):
        check(configured(base, *models, "teacher.top_k=200"))


def test_more_than_the_cluster_has_is_refused_with_the_arithmetic(base: list[str]):
    with pytest.raises(ValueError, match="reserves 7.25 CPUs .* the cluster has 4"):
        check_resources(configured(base, "train.num_workers=6"), {"CPU": 4})
    with pytest.raises(ValueError, match="reserves 2 GPUs .* the cluster has 0"):
        check_resources(configured(base, "train.num_workers=2", "train.use_gpu=true"), {"CPU": 64})
    with pytest.raises(ValueError, match="reserves 4 GPUs .*teachers 4.* the cluster has 1"):
        check_resources(configured(base, "teacher.num_replicas=4"), {"CPU": 64, "GPU": 1})


def test_collecting_needs_no_room_for_train_workers(base: list[str]):
    config = configured(base, "train.num_workers=6")
    check_resources(config, {"CPU": 4}, with_workers=False)
    with pytest.raises(ValueError, match="reserves 1.25 CPUs .workers 0,.* the cluster has 1"):
        check_resources(config, {"CPU": 1}, with_workers=False)


def test_too_little_disk_is_refused(base: list[str], monkeypatch: pytest.MonkeyPatch):
    nearly_full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    with pytest.raises(ValueError, match="GiB free"):
        check(configured(base))


@pytest.mark.parametrize(
    ("overrides", "steps"), [([], 4), (["train.epochs=2"], 8), (["train.epochs=2", "train.max_steps=5"], 5)]
)
def test_the_number_of_steps_follows_from_prompts_and_epochs(base: list[str], overrides: list[str], steps: int):
    assert num_steps(configured(base, "train.sequences_per_step=32", *overrides), num_prompts=100) == steps


def test_the_summary_shows_config_arithmetic_and_resources(base: list[str], capsys: pytest.CaptureFixture[str]):
    config = configured(base, "train.num_workers=2", "loss.tool_name=0.5")
    print_summary(config, check(config), num_prompts=100, cluster={"CPU": 8})
    text = capsys.readouterr().out
    for word in ("sequences_per_step: 32", "32 sequences = 2 workers x 16", "4 = 1 epochs x 4", "0.5 x tool_name", "CPUs"):
        assert word in text
