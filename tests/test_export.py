"""Exports of checkpoints and plain models: what is in the folder, and everything that is refused before work."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd import export
from raykd.config import Config, StudentConfig
from raykd.evaluation.serving_report import Floor, ServingReport
from raykd.export import main
from raykd.stage_config import QuantizationConfig
from raykd.student.heads import make_heads, save_heads
from raykd.student.int8_files import int8_names, int8_section, load_int8_reference
from raykd.student.model import load_student
from raykd.student.quantization import prepare_int8
from raykd.training.checkpoint import Snapshot, save_checkpoint
from tests.conftest import DEMO_TEACHER
from tests.evaluation.synthetic import write_run
from tests.int8_model import trained_model
from tests.training.tiny_run import make_config

IDS = torch.arange(48)[None]


def save_run(run: Path, config: Config, *, step: int = 3) -> Path:
    """A checkpoint of the tiny student with a halt head."""
    student = load_student(StudentConfig(model=config.student.model), config.run.seed)
    student.heads = make_heads(student.hidden_size, {"halt": 1.0})
    state = {"step": step, "config": config.model_dump(mode="json")}
    rng = [{"torch": torch.zeros(1)}]
    snapshot = Snapshot(student, tensors=None, optimizer={}, ledger=np.empty(0, np.int64), rng=rng, state=state)
    return save_checkpoint(run, snapshot, keep=2)


def qat_config(student_path: Path, **quantization) -> Config:
    return make_config(student_path, train={"precision": "bfloat16"}, stage="qat", quantization=quantization)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_path) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("runs")
    configs = {
        "kd": make_config(tiny_model_path),
        "qat": qat_config(tiny_model_path, symmetric_activations=False, ignore=("lm_head", "down_proj")),
        "waiting": qat_config(tiny_model_path, start_step=3),
    }
    for name, config in configs.items():
        save_run(path / name, config)
    write_run(path / "kd", configs["kd"])
    return {name: path / name for name in configs}


def run_export(source: Path, out: Path, *words: str) -> dict:
    """The manifest of an export, its hashes checked."""
    main(["--from", str(source), "--out", str(out), *words])
    manifest = json.loads((out / "manifest.json").read_text())
    files = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    for name, file in manifest["files"].items():
        assert file == {
            "bytes": (out / name).stat().st_size,
            "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
        }
    return manifest


@torch.no_grad()
def test_a_student_of_stage_qat_is_exported_in_int8_as_it_was_trained(runs, tmp_path):
    manifest = run_export(runs["qat"], tmp_path / "out")
    assert (manifest["format"], manifest["dtype"], manifest["source"]) == ("int8", "bfloat16", "qat/checkpoint-3")
    checkpoint = runs["qat"] / "checkpoints" / "checkpoint-3"
    assert manifest["checkpoint_sha256"] == hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    assert manifest["int8"] == int8_section(tmp_path / "out") | {"num_layers": 12}
    assert not any("down_proj" in name for name in int8_names(tmp_path / "out"))
    trained: Any = AutoModelForCausalLM.from_pretrained(checkpoint / "student", dtype=torch.bfloat16)
    prepare_int8(trained, QuantizationConfig(symmetric_activations=False, ignore=("lm_head", "down_proj")))
    reference: Any = load_int8_reference(tmp_path / "out")
    assert torch.equal(reference(IDS).logits, trained(IDS).logits)


def test_a_float_student_is_exported_in_the_type_its_config_names(runs, tmp_path):
    manifest = run_export(runs["kd"], tmp_path / "out")
    assert (manifest["format"], manifest["int8"]) == ("float32", None)
    own = AutoModelForCausalLM.from_pretrained(runs["kd"] / "checkpoints" / "checkpoint-3" / "student").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, own[name])
    run_export(runs["kd"] / "checkpoints" / "checkpoint-3", tmp_path / "small", "--format", "bf16", "--heads", "drop")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, own["model.embed_tokens.weight"].bfloat16())
    assert run_export(runs["waiting"], tmp_path / "waiting")["format"] == "float32"  # no step was made in INT8 yet


def test_heads_are_kept_or_dropped_and_no_server_takes_them_for_the_model(runs, tmp_path):
    run_export(runs["kd"], tmp_path / "kept")
    run_export(runs["kd"], tmp_path / "dropped", "--heads", "drop")
    assert load_file(tmp_path / "kept" / "heads.safetensors").keys() == {"halt.weight", "halt.bias"}
    index = json.loads((tmp_path / "kept" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == dict.fromkeys(load_file(tmp_path / "kept" / "model.safetensors"), "model.safetensors")
    assert not {"heads.safetensors", "model.safetensors.index.json"} & {
        path.name for path in (tmp_path / "dropped").iterdir()
    }


def test_a_float_student_is_quantised_as_it_is_if_asked_to(runs, tmp_path, tiny_model_path):
    words = ("--format", "int8", "quantization.activation_grid=cuda", "quantization.ignore=[lm_head, mlp.*]")
    manifest = run_export(runs["kd"], tmp_path / "out", *words)
    assert manifest["int8"]["activation_grid"] == "cuda"
    assert manifest["dtype"] == "float32"
    assert {name.rpartition(".")[2] for name in int8_names(tmp_path / "out")} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert run_export(tiny_model_path, tmp_path / "plain", "--format", "int8")["int8"]["num_layers"] == 14


def test_the_tokenizer_and_its_template_go_along(runs, tmp_path, demo_tokenizer):
    run_export(runs["kd"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Wie wird das Wetter?"}]
    expected = demo_tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.get_vocab() == demo_tokenizer.get_vocab()


def test_a_tokenizer_of_several_templates_brings_a_folder_that_the_manifest_lists(tmp_path, tiny_model_path):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    manifest = run_export(tmp_path / "model", tmp_path / "out")
    assert "additional_chat_templates/tool_use.jinja" in manifest["files"]


def test_a_model_that_does_not_say_its_context_is_checked_on_sequences_of_the_usual_length(tmp_path, tiny_model_path):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said, unsaid = (export._sequences(export.find_source(model)) for model in (tiny_model_path, tmp_path / "model"))
    assert [len(row) for row in unsaid] == [256] * 32
    np.testing.assert_array_equal(unsaid, said)


def test_the_model_card_says_what_it_is_and_how_good_it_was(runs, tmp_path):
    run_export(runs["kd"], tmp_path / "float")
    card = (tmp_path / "float" / "README.md").read_text()
    assert "Distilled by run run, stage kd, step 3." in card
    assert "vllm serve float" in card
    assert "|  | teacher | student |" in card
    assert "| exact calls | 100.0 %" in card
    assert "INT8" not in card
    assert all(line.count(" | ") == 2 for line in card.splitlines() if line.startswith("| ") and "teacher \\|\\|" in line)
    run_export(runs["qat"], tmp_path / "int8")
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "trained in INT8." in card
    assert "12 linear layers W8A8" in card
    assert "tensor_parallel_size=1" in card
    assert "Blackwell" in card
    assert "## Evaluation" not in card


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--format", "bf16", "quantization.ignore=[lm_head]"), "quantization.ignore has no effect with --format bf16"),
        (("--format", "int8", "quantization.smoothing=0.5"), "quantization.smoothing: found no such option of an export"),
        (("--format", "int8", "quantization.activation_grid=tpu"), "quantization.activation_grid: found 'tpu'"),
        (("--format", "int8", "quantization.ignore=[]"), "lm_head shares its weight with the embedding"),
        (("--format", "int8", "quantization.activation_shards=7"), "activation_shards=7 does not divide the 64 inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_work(runs, tmp_path, words, reason, monkeypatch):
    monkeypatch.setattr(export, "load_student", lambda *_args, **_kwargs: pytest.fail("work began"))
    with pytest.raises(ValueError, match=reason):
        run_export(runs["kd"], tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_none_and_folders_that_are_there_are_refused(runs, tmp_path, tiny_model_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="it exists already and nothing is overwritten"):
        run_export(runs["kd"], tmp_path / "there")
    with pytest.raises(ValueError, match="found neither checkpoints nor a config.json"):
        run_export(tmp_path / "nowhere", tmp_path / "out")
    run_export(tiny_model_path, tmp_path / "int8", "--format", "int8")
    with pytest.raises(ValueError, match="it is quantised already"):
        run_export(tmp_path / "int8", tmp_path / "out")
    with pytest.raises(SystemExit):
        run_export(runs["kd"], tmp_path / "out", "train.epochs=3")
    damaged = save_run(tmp_path / "damaged", make_config(tiny_model_path))
    weights = damaged / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="is damaged: student/model.safetensors has other contents"):
        run_export(tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_optimizer_is_not_even_looked_at(tmp_path, tiny_model_path):
    checkpoint = save_run(tmp_path / "run", make_config(tiny_model_path))
    (checkpoint / "optimizer.safetensors").unlink()
    run_export(checkpoint, tmp_path / "out")


def test_settings_other_than_those_trained_with_and_the_wrong_gpu_are_warned_of(runs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with caplog.at_level(logging.WARNING, "raykd"):
        run_export(runs["qat"], tmp_path / "out", "quantization.symmetric_activations=true")
    assert "with other settings it is not served as trained" in caplog.text
    assert "Blackwell" in caplog.text


def test_what_is_not_served_as_trained_is_not_handed_out(runs, tmp_path, monkeypatch):
    layers = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    report = ServingReport("bfloat16", 100, 0.2, 0.3, 0.4, 2.0, 0.01, 0.9, layers, [], ["K"], Floor(0.01, 0.02))
    monkeypatch.setattr(export, "check_serving", lambda *_args, **_kwargs: report)
    monkeypatch.setattr(export, "_start_ray", lambda _config: None)
    with pytest.raises(
        ValueError, match=r"not served as trained.*found 0.2, expected at most 0.06; .*found 0.01, expected at"
    ):
        run_export(runs["qat"], tmp_path / "out", "--check")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_check_serves_the_folder_with_its_heads_and_reports(tmp_path, ray_cluster):
    trained_model().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(DEMO_TEACHER).save_pretrained(tmp_path / "model")
    save_heads(make_heads(128, {"halt": 1.0}), tmp_path / "model" / "heads.safetensors")  # a server would not know them
    manifest = run_export(tmp_path / "model", tmp_path / "out", "--format", "int8", "--check")
    assert manifest["serving"]["num_tokens"] >= 2000
    assert manifest["serving"]["mean"] <= 1e-3
    assert manifest["serving"]["kernels"] == ["CPUInt8ScaledMMLinearKernel"]
    assert "| greedy tokens that are the reference's | " in (tmp_path / "out" / "README.md").read_text()
