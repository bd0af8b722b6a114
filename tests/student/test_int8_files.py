"""INT8 on disk: what was trained is what is written, in the form that compressed-tensors writes and others read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raykd.stage_config import QuantizationConfig
from raykd.student import int8_arithmetic, int8_files
from raykd.student.int8_arithmetic import weight_codes
from raykd.student.int8_files import export_int8, int8_names, int8_section, is_int8, load_int8_reference
from raykd.student.quantization import prepare_int8
from tests.int8_model import ASYMMETRIC, SYMMETRIC, nll_of, text, trained_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The trained model in INT8, float32."""
    path = tmp_path_factory.mktemp("int8") / "export"
    export_int8(trained_model(), path, SYMMETRIC, dtype=torch.float32)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_in_the_file_are_those_of_the_last_forward_pass(tmp_path, monkeypatch, dtype):
    model = copy.deepcopy(trained_model())
    names = prepare_int8(model, SYMMETRIC)
    optimizer, ids, seen = torch.optim.AdamW(model.parameters(), lr=1e-3), text()[0][:2], []
    nll_of(model, ids).backward()
    optimizer.step()

    def record(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(weight_codes(weight))
        return seen[-1]

    monkeypatch.setattr(int8_arithmetic, "weight_codes", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        nll_of(model, ids)
    assert export_int8(model, tmp_path, SYMMETRIC, dtype=dtype) == names
    tensors = load_file(tmp_path / "model.safetensors")
    assert int8_names(tmp_path) == sorted(names)
    for name, (codes, scale) in zip(names, seen, strict=True):
        assert torch.equal(tensors[f"{name}.weight"], codes)
        assert torch.equal(tensors[f"{name}.weight_scale"], scale)
        assert codes.min() >= -127
        assert codes.abs().amax(dim=1).min() == 127
    others = {name: tensor.dtype for name, tensor in tensors.items() if name.rpartition(".")[0] not in names}
    assert set(others.values()) == {dtype}
    assert "lm_head.weight" not in others


def test_tensors_are_those_that_compressed_tensors_writes(folder, tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig as TheirConfig,
    )
    from compressed_tensors.quantization import (
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = copy.deepcopy(trained_model())
    config = TheirConfig(config_groups={"group_0": preset_name_to_scheme("W8A8", ["Linear"])}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight_scale.data = weight_codes(module.weight.data)[1]  # pyright: ignore
            module.quantization_status = QuantizationStatus.FROZEN  # pyright: ignore
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)

    ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    ours, theirs = (json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path))
    assert_part_of(ours, theirs)


def assert_part_of(ours: dict, theirs: dict) -> None:
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_part_of(value, theirs[key])
        else:
            assert value == theirs[key], key


def test_exporting_again_writes_the_same_bytes(folder, tmp_path):
    export_int8(trained_model(), tmp_path / "again", SYMMETRIC, dtype=torch.float32)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    dequantised = copy.deepcopy(trained_model())  # and what was written comes out as it went in
    tensors = load_file(folder / "model.safetensors")
    for name in int8_names(folder):
        weight = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"]
        dequantised.get_parameter(f"{name}.weight").data = weight
        assert torch.equal(weight_codes(weight)[0], tensors[f"{name}.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SYMMETRIC, ASYMMETRIC, QuantizationConfig(activation_shards=4, activation_grid="cuda")])
@torch.no_grad()
def test_the_reference_computes_what_training_computes(tmp_path, config, dtype):
    export_int8(trained_model(), tmp_path, config, dtype=dtype)
    trained_model().save_pretrained(tmp_path / "float")
    trained = Qwen3ForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    prepare_int8(trained, config)
    reference = load_int8_reference(tmp_path)
    assert reference.dtype == dtype
    assert not reference.training
    assert torch.equal(reference(text()[1][:2]).logits, trained(text()[1][:2]).logits)
    assert int8_section(tmp_path)["activation_shards"] == config.activation_shards


@torch.no_grad()
def test_biases_untied_heads_and_float_layers_are_written_too(tmp_path):
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)).eval()
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    config = QuantizationConfig(ignore=("down_proj",))
    export_int8(model, tmp_path, config, dtype=torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == ["model.layers.0.mlp.down_proj"]
    assert written["config_groups"]["group_0"]["targets"] == ["Linear", "re:.*lm_head"]  # vLLM's head is no Linear
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.int8
    prepare_int8(model, config)
    ids = torch.arange(64)[None]
    assert torch.equal(load_int8_reference(tmp_path)(ids).logits, model(ids).logits)


def test_size_is_one_byte_a_weight_and_four_a_row(folder, tmp_path):
    trained_model().save_pretrained(tmp_path)
    linears = [module.weight for module in trained_model().model.modules() if isinstance(module, torch.nn.Linear)]
    num_int8, num_rows = sum(weight.numel() for weight in linears), sum(len(weight) for weight in linears)
    rest = sum(parameter.numel() for parameter in trained_model().parameters()) - num_int8
    size = (folder / "model.safetensors").stat().st_size
    assert size == pytest.approx(num_int8 + 4 * num_rows + 4 * rest, rel=0.01)
    ratio = size / (tmp_path / "model.safetensors").stat().st_size
    print(f"INT8 is {ratio:.3f} of float32")
    assert ratio <= 0.45


def test_plain_transformers_load_and_generate(folder):
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = text()[1][:1, :16]
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert written.shape == (1, 24)


def test_folders_that_are_no_int8_export_or_were_changed_are_refused(folder, tmp_path):
    trained_model().save_pretrained(tmp_path)
    assert not is_int8(tmp_path)
    with pytest.raises(ValueError, match="found no INT8 model of raykd"):
        load_int8_reference(tmp_path)
    with pytest.raises(ValueError, match="found no config.json"):
        load_int8_reference(tmp_path / "nowhere")
    tensors, file = load_file(folder / "model.safetensors"), tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    for change, reason in ((-128, "up_proj.weight has the code -128"), (3, "the file was changed")):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][0, 0] = change
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=reason):
            load_int8_reference(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], left over \[\]"):
        load_int8_reference(tmp_path)


@torch.no_grad()
def test_large_models_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_files, "LARGEST_FILE", 8000)
    torch.manual_seed(0)
    model, ids = Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval(), torch.arange(64)[None]
    names = export_int8(model, tmp_path, SYMMETRIC, dtype=torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert int8_names(tmp_path) == sorted(names)
    prepare_int8(model, SYMMETRIC)
    assert torch.equal(load_int8_reference(tmp_path)(ids).logits, model(ids).logits)
