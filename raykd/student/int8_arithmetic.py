"""The arithmetic of INT8 linear layers (W8A8), to the bit that of vLLM's kernels: in training, on disk and when served.

In:  activations, a weight in float or as codes, bias. Out: codes and scales; the product in the type of the activations.

    weights      s = max|w| / 127 per output row, codes round(w / s), found anew in every forward pass
    activations  s = max|x| / 127 per token (asymmetric: s = (max - min) / 255 and a zero point), dynamic
    product      int8 codes -> int32 -> float32, times the row's scale, times the token's scale, plus bias, rounded once
    backward     straight-through: the gradients of a float layer on the dequantised operands

There is nothing to calibrate and no state: scales come from the tensors at hand.

Shape letters: N tokens, K inputs, O outputs, S shards (1 but for row-parallel layers of a tensor-parallel server).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

LARGEST_CODE = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A row of zeros has the scale 0, which cannot divide; this one gives the same codes, zeros."""


@dataclass(frozen=True)
class ActivationGrid:
    """How activations become codes; the fields are those of QuantizationConfig."""

    symmetric: bool = True
    kind: Literal["cpu", "cuda"] = "cpu"
    shards: int = 1


class Activations(NamedTuple):
    """Quantised activations: x is about (codes - zero_point) * scale."""

    codes: Tensor  # [N, S, K/S] int8
    scale: Tensor  # [N, S, 1] float32
    zero_point: Tensor  # [N, S, 1] float32, whole numbers; all 0 on a symmetric grid


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, K] int8 and scales [O, 1] float32 of a weight [O, K] of any float type: what is trained on and exported.

    Codes lie in [-127, 127] and nothing is clipped.
    """
    values = weight.float()
    scale = _divide(values.abs().amax(dim=1, keepdim=True), LARGEST_CODE).clamp_min(SMALLEST_SCALE)
    return (values / scale).round().to(torch.int8), scale


def activation_codes(x: Tensor, grid: ActivationGrid) -> Activations:
    """Quantise activations x [N, K] of any float type; every token and shard has its own scale.

    All in float32 and by a reciprocal, as the kernels do it: other ways differ in up to 14 % of the codes. A row with one
    value throughout has no range and becomes 0 on an asymmetric grid, in vLLM too.
    """
    values = x.float().unflatten(1, (grid.shards, -1))
    if grid.symmetric:
        largest = values.abs().amax(dim=2, keepdim=True)
        scale = _divide(largest, LARGEST_CODE)
        inverse = 1 / scale if grid.kind == "cpu" else torch.full_like(largest, LARGEST_CODE) / largest
        inverse = inverse.masked_fill(scale == 0, 0.0)
        codes = values.mul(inverse).round().clamp(-LARGEST_CODE - 1, LARGEST_CODE)
        return Activations(codes.to(torch.int8), scale, torch.zeros_like(scale))
    low, high = values.aminmax(dim=2, keepdim=True)
    scale = _divide(high - low, 255)
    empty = scale == 0
    inverse = (1 / scale).masked_fill(empty, 0.0)
    zero_point = (-128 - low / scale).masked_fill(empty, 0.0).round()
    if grid.kind == "cpu":  # a fused multiply-add, rounded once: exact in float64
        codes = (values.double() * inverse.double() + zero_point.double()).float().round()
    else:
        codes = (values * inverse).round() + zero_point
    codes = codes.masked_fill(empty, 0.0).clamp(-LARGEST_CODE - 1, LARGEST_CODE)
    return Activations(codes.to(torch.int8), scale, zero_point)


def int8_product(
    activations: Activations,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: ActivationGrid,
    dtype: torch.dtype,
) -> Tensor:
    """Output [N, O] of a linear layer in `dtype`, from codes [O, K] and scale [O, 1] of its weight and a bias [O].

    A tensor-parallel server computes the product of every shard in `dtype` and adds them up; the first has the bias.
    """
    output = None
    for shard, columns in enumerate(codes.chunk(grid.shards, dim=1)):
        own = Activations(*(part[:, shard].contiguous() for part in activations))
        product = _shard_product(own, columns, scale, bias if shard == 0 else None, grid).to(dtype)
        output = product if output is None else output + product
    assert output is not None, "a layer has at least one shard"
    return output


def _shard_product(own: Activations, codes: Tensor, scale: Tensor, bias: Tensor | None, grid: ActivationGrid) -> Tensor:
    """[N, O] float32. The order of multiplications and roundings is the kernel's; float64 stands in for its fused ones."""
    product = _int_matmul(own.codes, codes)
    if grid.symmetric:
        return _multiply_add(product.float() * scale.T, own.scale, bias)
    column_sums = codes.sum(dim=1, dtype=torch.int32)
    if grid.kind == "cuda":
        return _multiply_add((product - own.zero_point.int() * column_sums).float() * scale.T, own.scale, bias)
    correction = (column_sums.float() * scale[:, 0]) * (own.scale * own.zero_point)
    output = _multiply_add(product.float() * scale.T, own.scale, -correction)
    return output if bias is None else output + bias.float()


def _divide(values: Tensor, number: int) -> Tensor:
    """values / number, rounded once, as kernels divide: by a plain number PyTorch multiplies on CUDA with its reciprocal,
    and a plain number it multiplies with the reciprocal of the tensor."""
    return values / torch.full_like(values, number)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * b + c in float32, rounded once."""
    return a * b if c is None else (a.double() * b.double() + c.double()).float()


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] times the transpose of b [O, K], int8 -> int32 [N, O], exact."""
    if not a.is_cuda:
        return torch._int_mm(a, b.T)
    num_rows, num_outputs = len(a), len(b)  # the CUDA kernel wants more than 16 rows and multiples of 8 elsewhere
    a = nn.functional.pad(a, (0, -a.shape[1] % 8, 0, max(0, 32 - num_rows)))
    b = nn.functional.pad(b, (0, -b.shape[1] % 8, 0, -num_outputs % 8))
    return torch._int_mm(a, b.T)[:num_rows, :num_outputs]


class Int8Matmul(torch.autograd.Function):
    """Keeps codes and scales for the backward pass, one byte an element: less than a layer in bfloat16 keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, grid: ActivationGrid) -> Tensor:
        activations = activation_codes(x.reshape(-1, x.shape[-1]), grid)
        codes, scale = weight_codes(weight)
        ctx.save_for_backward(*activations, codes, scale)
        return int8_product(activations, codes, scale, bias, grid, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x_codes, x_scale, zero_point, codes, scale = ctx.saved_tensors
        rows, of_x, of_weight, of_bias = gradient.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ (codes * scale).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = rows.T @ ((x_codes - zero_point) * x_scale).flatten(1).to(gradient.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_x, of_weight, of_bias, None
