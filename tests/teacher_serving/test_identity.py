"""Fingerprints follow content, and what cannot work is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher_serving import identity
from teacher_serving.config import HfTeacherConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.identity import describe, vocabulary_fingerprint


@pytest.fixture
def model(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "copy"))


def fingerprint(model: Path, **options) -> str:
    return describe(VllmTeacherConfig(model=str(model), **options)).fingerprint


def change_one_weight(model: Path) -> None:
    file = model / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    middle = weights[name].numel() // 2
    weights[name].view(-1)[middle] += 1.0
    save_file(weights, file, metadata={"format": "pt"})


def test_a_copy_is_the_same_teacher_under_another_name(tiny_model_path: Path, model: Path):
    original, copy = (describe(VllmTeacherConfig(model=str(path))) for path in (tiny_model_path, model))
    assert original.fingerprint == copy.fingerprint
    assert original.vocabulary_fingerprint == copy.vocabulary_fingerprint
    assert (original.teacher_id, copy.teacher_id) == ("tiny", "copy")
    assert describe(HfTeacherConfig(model=str(model))) == copy  # the engine is not part of who it is


@pytest.mark.parametrize("whole_file_bytes", [identity.WHOLE_FILE_BYTES, 0])
def test_one_changed_weight_is_another_teacher(model: Path, monkeypatch: pytest.MonkeyPatch, whole_file_bytes: int):
    monkeypatch.setattr(identity, "WHOLE_FILE_BYTES", whole_file_bytes)  # 0: as a file too large to be read whole
    before = fingerprint(model)
    assert fingerprint(model) == before
    change_one_weight(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"sampling": SamplingConfig(temperature=0.7)},
        {"sampling": SamplingConfig(seed=1)},
        {"sampling": SamplingConfig(max_tokens=7)},
        {"max_model_len": 100},
        {"weight_version": "1"},
    ],
)
def test_what_changes_the_answers_changes_the_fingerprint(tiny_model_path: Path, options: dict):
    assert fingerprint(tiny_model_path, **options) != fingerprint(tiny_model_path)


def test_what_leaves_the_answers_alone_leaves_the_fingerprint(tiny_model_path: Path):
    assert fingerprint(tiny_model_path, batch_size=3, num_cpus=2, teacher_id="other") == fingerprint(tiny_model_path)


def test_a_chat_template_belongs_to_the_teacher_but_not_to_the_vocabulary(model: Path):
    teacher, vocabulary = fingerprint(model), vocabulary_fingerprint(model)
    with (model / "chat_template.jinja").open("a") as file:
        file.write("{# changed #}")
    assert fingerprint(model) != teacher
    assert vocabulary_fingerprint(model) == vocabulary


def test_one_exchanged_token_is_another_vocabulary(model: Path):
    before = vocabulary_fingerprint(model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokens = tokenizer["model"]["vocab"]
    first, second = list(tokens)[300:302]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    path.write_text(json.dumps(tokenizer))
    assert vocabulary_fingerprint(model) != before


def test_what_the_files_do_not_allow_is_refused(model: Path):
    info = describe(VllmTeacherConfig(model=str(model)))
    assert info.max_model_len == 2048
    assert describe(VllmTeacherConfig(model=str(model), max_model_len=100)).max_model_len == 100
    with pytest.raises(ValueError, match="4096.*2048"):
        fingerprint(model, max_model_len=4096)
    with pytest.raises(ValueError, match="no model folder"):
        fingerprint(model / "nowhere")
    with pytest.raises(ValueError, match="stop_token_ids .-1, 10000000. are outside"):
        fingerprint(model, sampling=SamplingConfig(stop_token_ids=(3, -1, 10_000_000)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(ValueError, match="top_k=64 is larger than the vocabulary.* 50"):
        fingerprint(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        vocabulary_fingerprint(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        fingerprint(model, top_k=5)


def test_states_of_an_architecture_that_vllm_cannot_hand_out_are_refused(model: Path):
    config = json.loads((model / "config.json").read_text())
    assert fingerprint(model, hidden_layers=(1,)) != fingerprint(model)
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"states of \['GemmaForCausalLM'\].*only those of .*Qwen3ForCausalLM.*kind: hf"):
        fingerprint(model, hidden_layers=(1,))
    assert describe(HfTeacherConfig(model=str(model), hidden_layers=(1,))).vocab_size == config["vocab_size"]
    assert fingerprint(model)


def test_end_of_sequence_tokens_come_from_the_generation_config_first(model: Path):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert describe(VllmTeacherConfig(model=str(model))).eos_token_ids == (3, 4)
    (model / "generation_config.json").unlink()
    eos = json.loads((model / "config.json").read_text())["eos_token_id"]
    assert describe(VllmTeacherConfig(model=str(model))).eos_token_ids == (eos,)


def test_key_value_bytes_are_those_of_the_model(tiny_model_path: Path):
    assert identity.kv_bytes_per_token(tiny_model_path, torch.float32.itemsize) == 2 * 2 * 1 * 32 * 4


def test_the_cache_on_the_cpu_has_room_for_the_states_of_the_tokens_it_holds(tiny_model_path: Path):
    configs = [VllmTeacherConfig(model=str(tiny_model_path), hidden_layers=layers) for layers in ((), (0, 1))]
    plain, with_states = (identity.cpu_kv_cache_bytes(config, describe(config)) for config in configs)
    assert with_states / plain == 1 + (2 * 64) / (2 * 2 * 1 * 32)  # a token's states / its keys and values
