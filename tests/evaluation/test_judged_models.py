"""What may be judged: folders are looked at before anything loads, and loaded as they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from raykd.config import Config, StudentConfig
from raykd.evaluation.models import ModelFiles, check_model, heads_of, load_judged, load_with_heads, make_int8, weight_bytes
from raykd.sample_config import LatentConfig
from raykd.stage_config import QuantizationConfig
from raykd.student.heads import make_heads, save_heads
from raykd.student.int8_files import OWN_SECTION
from raykd.student.latent import LatentSpans
from raykd.student.model import load_student
from tests.conftest import DEMO_TEACHER


@pytest.fixture
def config(tiny_model_path) -> Config:
    model = str(tiny_model_path)
    return Config.model_validate(
        {"teacher": {"kind": "hf", "model": model}, "student": {"model": model}, "data": {"prompts": "none"}}
    )


@pytest.fixture
def int8(config, tiny_model_path, tmp_path) -> ModelFiles:
    return make_int8(config.student, ModelFiles(tiny_model_path, quantization=QuantizationConfig()), tmp_path / "int8")


def test_float_and_int8_folders_are_taken_as_they_are(config, tiny_model_path, int8):
    check_model(config, "a", ModelFiles(tiny_model_path))
    check_model(config, "b", int8)
    assert weight_bytes(int8.folder) < 0.65 * weight_bytes(tiny_model_path)
    model = load_judged(config.student, int8.folder)
    assert model.head_weight.dtype == torch.float32
    assert not model.training
    text = torch.arange(8)[None]
    float_hidden = load_judged(config.student, tiny_model_path)(text).hidden
    difference = (model(text).hidden - float_hidden).abs().max().item()
    assert 0 < difference < 0.2 * float_hidden.abs().max().item()


def test_int8_of_a_run_in_bfloat16_is_made_from_the_weights_that_its_forward_pass_saw(config, tiny_model_path, tmp_path):
    files = ModelFiles(tiny_model_path, quantization=QuantizationConfig(), precision="bfloat16")
    made = make_int8(config.student, files, tmp_path / "made")
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_judged(config.student, made.folder).head_weight.dtype == torch.bfloat16


def test_what_cannot_be_judged_is_refused_with_the_reason(config, tmp_path, int8):
    with pytest.raises(ValueError, match="that name is taken"):
        check_model(config, "teacher", int8)
    with pytest.raises(ValueError, match=r"'x': found no Hugging Face model in .*nowhere, expected config.json"):
        check_model(config, "x", ModelFiles(tmp_path / "nowhere"))
    written = json.loads((int8.folder / "config.json").read_text())
    of_others = {name: value for name, value in written.items() if name != OWN_SECTION}
    for changed in (written | {"quantization_config": {"quant_method": "awq", "format": "gemm"}}, of_others):
        (int8.folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"quantised by .* in the form .*; expected float weights, or INT8"):
            check_model(config, "x", int8)


def test_heads_are_those_that_are_judged_and_come_with_the_models_thoughts(config, tmp_path):
    student = load_student(
        StudentConfig(model=str(DEMO_TEACHER), layers=(0, 1), new_tokens={"<bot>": "", "<eot>": "", "<slot>": ""}), 0
    )
    student.save(tmp_path / "student")
    heads = make_heads(128, {"halt": 1.0, "intermediate_layer": 1.0}, {0: (128, 64)}, seed=3)
    save_heads(heads, tmp_path / "heads.safetensors")
    latent = LatentConfig.model_validate({"stages": [{"steps": 2, "slots": 3, "probability": 1.0}]})
    files = ModelFiles(tmp_path / "student", tmp_path / "heads.safetensors", latent=latent)
    assert heads_of(files) == {"halt"}
    loaded = load_with_heads(config.student, files)
    assert list(loaded.heads) == ["halt"]
    assert all(
        torch.equal(value, heads["halt"].state_dict()[name]) for name, value in loaded.heads["halt"].state_dict().items()
    )
    ids = loaded.tokenizer.get_vocab()
    assert loaded.latent == LatentSpans(ids["<bot>"], ids["<slot>"], num_slots=6, loops=0)
    save_file({"projections.0.weight": torch.zeros(2, 2)}, tmp_path / "projections.safetensors")
    assert heads_of(ModelFiles(tmp_path / "student", tmp_path / "projections.safetensors")) == set()
    assert heads_of(ModelFiles(tmp_path / "student")) == set()
