"""INT8 on disk: a Hugging Face folder that vLLM serves, written with the codes that training computed with, and read back.

In:  a model (float weights), the policy, the type of the forward pass. Out: safetensors and config.json in the form
     `int-quantized` of compressed-tensors: `<layer>.weight` int8 [O, K], `<layer>.weight_scale` float32 [O, 1], all else in
     that type. Or: such a folder. Out: a model whose linear layers compute from these codes as vLLM does.

That model is the judge of accuracy. Plain transformers load the folder too, but quantise activations on another grid: on
symmetric exports their log-probabilities are 40 times further from vLLM's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from raykd.stage_config import QuantizationConfig
from raykd.student.int8_arithmetic import ActivationGrid, weight_codes
from raykd.student.quantization import StoredInt8Linear, int8_layers, row_parallel_layers

SCALE = "weight_scale"
OWN_SECTION = "raykd_int8"
"""Section of config.json with what compressed-tensors has no field for; other readers pass over it."""
LARGEST_FILE = "5GB"
FORM_VERSION = "0.17.0"
"""Version of compressed-tensors whose form this is; tests compare with it byte by byte."""


def export_int8(model: PreTrainedModel, folder: Path, config: QuantizationConfig, *, dtype: torch.dtype) -> list[str]:
    """Write `model` in INT8 into `folder`, without tokenizer; returns the names of the INT8 layers.

    `dtype` is that of the forward pass: codes are those of the weights rounded to it, which an autocast or FSDP forward saw.
    A tied LM head is left out of the file. Errors: ValueError as `int8_layers`.
    """
    grids = int8_layers(model, config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _untied(model).items():
        layer, _, own = name.rpartition(".")
        seen = tensor.detach().cpu().to(dtype) if tensor.is_floating_point() else tensor.detach().cpu()
        if layer in grids and own == "weight":
            codes, scale = weight_codes(seen)
            assert codes.min() > -128, f"{name}: found the code -128, expected -127 to 127"
            tensors |= {name: codes, f"{layer}.{SCALE}": scale}
        else:
            tensors[name] = seen.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=LARGEST_FILE, metadata={"format": "pt"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    floats = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in grids]
    written = _read_config(folder) | {
        "architectures": model.config.architectures or [type(model).__name__],  # a model that was never saved has none
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": _compressed_tensors_form(config, floats, head_is_int8="lm_head" in grids),
        OWN_SECTION: {
            "activation_grid": config.activation_grid,
            "activation_shards": config.activation_shards,
            "forward_dtype": str(dtype).removeprefix("torch."),
            "codes_sha256": codes_checksum(tensors),
        },
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return list(grids)


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, of tensors that share their memory the first: safetensors would refuse the others."""
    found: dict[int, str] = {}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if found.setdefault(tensor.data_ptr(), name) == name}


def _compressed_tensors_form(config: QuantizationConfig, floats: list[str], *, head_is_int8: bool) -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "format": "int-quantized",
        # vLLM's LM head is no Linear and must be named.
        "targets": ["Linear", *(["re:.*lm_head"] if head_is_int8 else [])],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "symmetric": config.symmetric_activations, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "version": FORM_VERSION,
        "config_groups": {"group_0": group},
        "ignore": floats,
        "kv_cache_scheme": None,
    }


def codes_checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all codes and scales, by name: equal for two exports that compute the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        layer, _, own = name.rpartition(".")
        if own == SCALE or (f"{layer}.{SCALE}" in tensors and own == "weight"):
            digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------------


def is_int8(folder: Path) -> bool:
    """Whether a Hugging Face folder holds INT8 weights in the form that is written here."""
    form = _read_config(folder).get("quantization_config") or {}
    return form.get("format") == "int-quantized"


def int8_section(folder: Path) -> dict[str, Any]:
    """What an INT8 folder says of itself: activation_grid, activation_shards, forward_dtype, codes_sha256.

    Errors: ValueError when it is no INT8 export of raykd.
    """
    written = _read_config(folder)
    if not is_int8(folder) or OWN_SECTION not in written:
        raise ValueError(
            f"{folder}: found no INT8 model of raykd, expected quantization_config (format int-quantized) and {OWN_SECTION} "
            "in config.json; write one with python -m raykd.export --format int8"
        )
    return written[OWN_SECTION]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; heads may lie beside them."""
    return sorted(folder.glob("model*.safetensors"))


def int8_names(folder: Path) -> list[str]:
    """Names of the layers that a folder holds in INT8; none in a float one."""
    names = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names += list(tensors.keys())
    return sorted(name.removesuffix(f".{SCALE}") for name in names if name.endswith(f".{SCALE}"))


def load_int8_reference(folder: Path) -> PreTrainedModel:
    """The model in an INT8 folder, on the CPU, for inference: exactly the arithmetic that was trained, on the stored codes.

    Errors: ValueError when the folder is no INT8 export of raykd, when codes or scales are not those that were written, and
    when tensors are missing or left over.
    """
    own, written = int8_section(folder), _read_config(folder)
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    _check_codes(folder, tensors, own["codes_sha256"])
    architecture: Any = AutoConfig.from_pretrained(folder)
    del architecture.quantization_config  # transformers would put its own layers in
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, written["dtype"]))
    form = written["quantization_config"]["config_groups"]["group_0"]
    row_parallel = row_parallel_layers(model) if own["activation_shards"] > 1 else set()
    for name in (key.removesuffix(f".{SCALE}") for key in tensors if key.endswith(f".{SCALE}")):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}, expected a linear layer"
        shards = own["activation_shards"] if name in row_parallel else 1
        grid = ActivationGrid(form["input_activations"]["symmetric"], own["activation_grid"], shards)
        stored = StoredInt8Linear(layer.out_features, layer.in_features, layer.bias is not None, model.dtype, grid)
        model.set_submodule(name, stored)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{folder} does not hold exactly the weights of {type(model).__name__}: missing "
            f"{sorted(set(missing) - tied)[:5]}, left over {sorted(unexpected)[:5]}; export it again"
        )
    return model.eval()


def _check_codes(folder: Path, tensors: Mapping[str, Tensor], expected: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 and tensor.min() == -128:
            raise ValueError(f"{folder}: {name} has the code -128, expected -127 to 127: it was written on another grid")
    if (found := codes_checksum(tensors)) != expected:
        raise ValueError(
            f"{folder}: codes and scales have sha256 {found}, config.json says {expected}: the file was changed; export it "
            "again"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: found no config.json, expected a Hugging Face model folder")
    return json.loads(path.read_text(encoding="utf-8"))
