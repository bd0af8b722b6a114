"""INT8 linear layers in a student: which ones, and how they are put in and out of use.

In:  a causal LM in float and a QuantizationConfig.
Out: the same model and parameters, its linear layers re-classed in place to `Int8Linear`; float again by a switch.

They compute in training what the server will compute (student/int8_arithmetic.py). Codes are those of the tensor that the
forward pass saw, under autocast the bfloat16 copy; neither checkpoints nor workers have more to agree on than the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raykd.stage_config import QuantizationConfig
from raykd.student.int8_arithmetic import ActivationGrid, Int8Matmul, activation_codes, int8_product

FUSED_IN_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one, which is INT8 or float as a whole."""


class Int8Linear(nn.Linear):
    """A linear layer in INT8 while `quantized`, else in float. Made by `prepare_int8`, never constructed."""

    grid: ActivationGrid
    quantized: bool

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., O]; under autocast in its type, as any linear layer."""
        if not self.quantized:
            return super().forward(input)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return Int8Matmul.apply(input.to(dtype), self.weight.to(dtype), bias, self.grid)  # pyright: ignore[reportReturnType]


class StoredInt8Linear(nn.Module):
    """A linear layer that computes from stored codes; inference only."""

    def __init__(self, out_features: int, in_features: int, bias: bool, dtype: torch.dtype, grid: ActivationGrid):
        super().__init__()
        self.grid = grid
        self.weight: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, 1))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., O] in the same type."""
        activations = activation_codes(input.flatten(0, -2), self.grid)
        output = int8_product(activations, self.weight, self.weight_scale, self.bias, self.grid, input.dtype)
        return output.view(*input.shape[:-1], -1)


def prepare_int8(model: PreTrainedModel, config: QuantizationConfig) -> list[str]:
    """Make the linear layers that the policy chooses INT8, in place; returns their names in the model's order.

    Before DDP or `fully_shard`; parameters stay the same objects, so an optimizer may be built before or after.
    Errors: ValueError as `int8_layers`, and when the model has INT8 layers already.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("the model has INT8 layers already, expected a float model: prepare it once")
    grids = int8_layers(model, config)
    for name, grid in grids.items():
        layer: Any = model.get_submodule(name)
        layer.__class__ = Int8Linear
        layer.grid, layer.quantized = grid, True
    return list(grids)


def set_quantized(model: nn.Module, enabled: bool) -> None:
    """Have the INT8 layers of a prepared model compute in INT8, or in float as if they had never been prepared."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.quantized = enabled


# --- the policy -----------------------------------------------------------------------------------------------------------


def int8_layers(model: PreTrainedModel, config: QuantizationConfig) -> dict[str, ActivationGrid]:
    """The linear layers that `config` makes INT8, by name in the model's order, each with its grid.

    Errors: ValueError when the policy chooses nothing or ignores something that is not there, when it chooses a tied LM
    head, a part of what vLLM computes as one, experts, or a layer that cannot be cut into the shards.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in config.ignore:
        if not any(_matches(pattern, name) for name in linears):
            raise ValueError(
                f"quantization.ignore: {pattern!r} matches no linear layer, expected the end of a name such as "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linears}))}; correct it, or leave it out"
            )
    chosen = {name: m for name, m in linears.items() if not any(_matches(p, name) for p in config.ignore)}
    if not chosen:
        raise ValueError(
            f"quantization.ignore={list(config.ignore)} matches all {len(linears)} linear layers, so that none would be "
            "INT8: ignore fewer"
        )
    _check_chosen(model, chosen, linears)
    row_parallel = row_parallel_layers(model) if config.activation_shards > 1 else set()
    grids = {}
    for name, layer in chosen.items():
        shards = config.activation_shards if name in row_parallel else 1
        if layer.in_features % shards:
            raise ValueError(
                f"quantization.activation_shards={shards} does not divide the {layer.in_features} inputs of {name}: set "
                "it to the tensor-parallel size of a server that can hold the model"
            )
        grids[name] = ActivationGrid(config.symmetric_activations, config.activation_grid, shards)
    return grids


def row_parallel_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers whose inputs a tensor-parallel server cuts into shards, such as down and output projections.

    Errors: ValueError when transformers has no such plan for the architecture.
    """
    plan: Mapping[str, str] = model.tp_plan
    patterns = [name.replace(".", r"\.").replace("*", r"\d+") for name, how in plan.items() if how.startswith("rowwise")]
    names = {name for name, _ in model.named_modules() if any(re.fullmatch(pattern, name) for pattern in patterns)}
    if not names:
        raise ValueError(
            f"quantization.activation_shards above 1: transformers says of no layer of {type(model).__name__} that a "
            "tensor-parallel server cuts its inputs; set activation_shards=1"
        )
    return names


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise ValueError(f"quantization.ignore: {pattern!r} is no regular expression ({error})") from error


def _check_chosen(model: nn.Module, chosen: Mapping[str, nn.Linear], linears: Mapping[str, nn.Linear]) -> None:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, layer in chosen.items():
        if id(layer.weight) in embeddings:
            raise ValueError(
                f"{name} shares its weight with the embedding, which stays in float: INT8 would untie the two and make the "
                f"model larger; add {name.rpartition('.')[2]} to quantization.ignore"
            )
        if type(layer) not in (nn.Linear, Int8Linear):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, expected a plain nn.Linear: its own forward pass would be lost; add "
                "it to quantization.ignore"
            )
        prefix, _, own = name.rpartition(".")
        for group in FUSED_IN_VLLM:
            siblings = {f"{prefix}.{other}" for other in group if own in group}
            if apart := sorted(siblings & (linears.keys() - chosen.keys())):
                raise ValueError(
                    f"quantization.ignore keeps {apart[0]} in float but not {name}: vLLM computes {', '.join(group)} as one "
                    "layer; ignore all of them, or none"
                )
    experts = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3]
    if experts:
        raise ValueError(
            f"{experts[0]} holds experts, which are no linear layers: most of a mixture of experts would stay in float; "
            "take a dense student"
        )
