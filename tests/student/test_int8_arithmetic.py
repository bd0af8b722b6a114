"""The arithmetic of INT8 layers: by hand, against vLLM's own CPU kernels, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raykd.student.int8_arithmetic import (
    ActivationGrid,
    Activations,
    Int8Matmul,
    activation_codes,
    int8_product,
    weight_codes,
)
from tests.conftest import needs_gpu
from tests.int8_model import text, trained_model

GRIDS = [ActivationGrid(symmetric, kind) for symmetric in (True, False) for kind in ("cpu", "cuda")]
GPU_SIZES = [(8, 8), (16, 16), (24, 40), (7, 9), (1, 1), (100, 33), (33, 100), (320, 128), (1024, 3072)]
"""Inputs and outputs of a layer: what the kernel takes as it is, and what has to be padded for it."""


def test_codes_of_a_weight_by_hand():
    codes, scale = weight_codes(torch.tensor([[12.7, -6.35, 0.049], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.25]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 32]]  # 63.5 and 31.75: half to even
    assert scale[0].item() == pytest.approx(0.1)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32


def test_codes_of_activations_by_hand():
    x = torch.tensor([[25.4, -10.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = activation_codes(x, ActivationGrid())
    assert found.codes[:, 0].tolist() == [[127, -50, 0, 5], [0, 0, 0, 0]]
    assert found.scale.flatten().tolist() == pytest.approx([0.2, 0.0])
    x = torch.tensor([[-1.0, 24.5, 0.0, 9.96], [3.0, 3.0, 3.0, 3.0]])  # scale 0.1, zero point -128 + 10
    found = activation_codes(x, ActivationGrid(symmetric=False))
    assert found.codes[:, 0].tolist() == [[-128, 127, -118, -18], [0, 0, 0, 0]]
    assert found.zero_point.flatten().tolist() == [-118, 0]


def test_the_grid_of_cuda_multiplies_by_the_reciprocal_of_another_number():
    """Of these rows some have values between the two."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    largest = x.float().abs().amax(1, keepdim=True)
    cpu, cuda = (activation_codes(x, ActivationGrid(kind=kind)) for kind in ("cpu", "cuda"))
    assert torch.equal(cpu.codes[:, 0], (x.float() * (1 / (largest / 127))).round().char())
    assert torch.equal(cuda.codes[:, 0], (x.float() * (torch.full_like(largest, 127) / largest)).round().char())
    differing = (cpu.codes != cuda.codes).float().mean().item()
    assert 1e-4 < differing < 2e-3


def test_scales_and_reciprocals_are_rounded_once_as_the_kernels_round_them():
    """127 / x by PyTorch's own operator is 127 * (1 / x), which differs in the last bit for a quarter of the numbers."""
    x = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    x, largest = torch.cat([x, x / 3, x / 7], dim=1), x.double()
    inverse = (127 / largest).float()
    assert (inverse != 127 / x[:, :1]).any()
    found = activation_codes(x, ActivationGrid(kind="cuda"))
    assert torch.equal(found.scale[:, 0], (largest / 127).float())
    assert torch.equal(found.codes[:, 0], (x * inverse).round().char())


def kernel(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Output and activation codes of vLLM's CPU kernels, called as CPUInt8ScaledMMLinearKernel calls them."""
    from vllm import _custom_ops as ops

    weight = codes.T
    adjustment = weight.sum(dim=0, keepdim=True, dtype=torch.float32) * scale.squeeze()
    handler = ops.create_onednn_scaled_mm(weight, scale, x.dtype, True, not symmetric, 32)
    x_codes, x_scale, zero_point = ops.onednn_scaled_int8_quant(x, None, None, symmetric)
    output = torch.empty(len(x), len(codes), dtype=x.dtype)
    ops.onednn_scaled_mm(handler, x_codes, output, x_scale, zero_point, None if symmetric else adjustment, bias)
    return output, x_codes


def same_as_the_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *, symmetric: bool) -> None:
    grid, (codes, scale) = ActivationGrid(symmetric), weight_codes(weight)
    activations = activation_codes(x, grid)
    output, x_codes = kernel(x, codes, scale, bias, symmetric=symmetric)
    has_range = activations.scale[:, 0, 0] > 0
    assert torch.equal(activations.codes[has_range, 0], x_codes[has_range])
    assert torch.equal(int8_product(activations, codes, scale, bias, grid, x.dtype), output)


@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 33, 64])
def test_a_layer_computes_what_vllms_kernel_computes_to_the_bit(dtype, symmetric, num_tokens):
    torch.manual_seed(num_tokens)
    for num_inputs, num_outputs in ((128, 320), (320, 128), (1024, 3072)):
        x = (torch.randn(num_tokens, num_inputs) * torch.randn(num_inputs).exp()).to(dtype)
        if num_tokens > 1:
            x[2], x[3], x[4] = 0.0, 1.5, x[4].abs() + 1  # no range; one sign
        weight, bias = torch.randn(num_outputs, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype)
        same_as_the_kernel(x, weight, None, symmetric=symmetric)
        same_as_the_kernel(x, weight, bias, symmetric=symmetric)


@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_does_on_the_activations_of_a_trained_model(dtype, symmetric):
    seen: list[tuple[Any, Tensor]] = []
    layers = [module for module in trained_model().model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0]))) for layer in layers]
    with torch.no_grad():
        trained_model()(text()[1][:1])
        for hook in hooks:
            hook.remove()
        assert len(seen) == 28
        for layer, x in seen:
            same_as_the_kernel(x[0].to(dtype), layer.weight.to(dtype), None, symmetric=symmetric)


def dequantised(activations: Activations) -> Tensor:
    return ((activations.codes - activations.zero_point) * activations.scale).flatten(1)


@pytest.mark.parametrize("grid", [*GRIDS, ActivationGrid(shards=4), ActivationGrid(False, shards=2)])
def test_values_are_those_of_a_float_layer_on_the_dequantised_operands(grid):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(33, 64), torch.randn(48, 64), torch.randn(48)
    activations, (codes, scale) = activation_codes(x, grid), weight_codes(weight)
    assert (dequantised(activations) - x).abs().max() <= activations.scale.max() * (0.5001 if grid.symmetric else 1.0001)
    expected = dequantised(activations).double() @ (codes * scale).double().T + bias
    found = int8_product(activations, codes, scale, bias, grid, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("grid", [*GRIDS, ActivationGrid(shards=4)])
def test_gradients_are_those_of_a_float_layer_on_the_dequantised_operands(grid):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 64), (48, 64), (48,)))
    upstream = torch.randn(2, 5, 48)
    output = Int8Matmul.apply(x, weight, bias, grid)
    output.backward(upstream)
    codes, scale = weight_codes(weight.detach())
    seen = dequantised(activation_codes(x.detach().flatten(0, 1), grid)).view(2, 5, 64).requires_grad_()
    plain_weight, plain_bias = (codes * scale).requires_grad_(), bias.detach().clone().requires_grad_()
    nn.functional.linear(seen, plain_weight, plain_bias).backward(upstream)
    for found, expected in ((x, seen), (weight, plain_weight), (bias, plain_bias)):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_shards_are_layers_of_their_own_that_are_added_up():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    codes, scale = weight_codes(weight)  # of whole rows: the file knows no shards
    grid, one = ActivationGrid(shards=2), ActivationGrid()
    halves = [
        int8_product(activation_codes(x[:, half], one), codes[:, half], scale, own_bias, one, x.dtype)
        for half, own_bias in ((slice(0, 32), bias), (slice(32, 64), None))
    ]
    assert torch.equal(int8_product(activation_codes(x, grid), codes, scale, bias, grid, x.dtype), halves[0] + halves[1])


def test_one_byte_an_element_is_kept_for_the_backward_pass():
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(256, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Int8Matmul.apply(x, weight, None, ActivationGrid())
    scales = 4 * (64 + 64 + 256)  # float32: scale and zero point of tokens, scale of rows
    assert sum(tensor.nbytes for tensor in kept) == 64 * 128 + 256 * 128 + scales


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@needs_gpu
def test_on_a_gpu_the_integers_are_those_of_the_cpu_for_all_sizes():
    """With scales of 1 the product is the integer itself: at most 1024 * 128 * 128, exact in float32."""
    generator = torch.Generator().manual_seed(0)
    for num_inputs, num_outputs in GPU_SIZES:
        b = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator).char()
        one = torch.ones(num_outputs, 1)
        for num_rows in range(1, 41):
            a = torch.randint(-128, 128, (num_rows, 1, num_inputs), generator=generator).char()
            activations = Activations(a, torch.ones(num_rows, 1, 1), torch.zeros(num_rows, 1, 1))
            expected = int8_product(activations, b, one, None, ActivationGrid(), torch.float32)
            moved = Activations(*(part.cuda() for part in activations))
            found = int8_product(moved, b.cuda(), one.cuda(), None, ActivationGrid(), torch.float32)
            assert torch.equal(found.cpu(), expected), (num_rows, num_inputs, num_outputs)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [*GRIDS, ActivationGrid(shards=4), ActivationGrid(False, shards=2)])
def test_on_a_gpu_codes_scales_and_outputs_are_those_of_the_cpu_to_the_bit(grid, dtype):
    torch.manual_seed(0)
    x = (torch.randn(300, 256) * torch.randn(256).exp()).to(dtype)
    x[2], x[3], x[4] = 0.0, 1.5, x[4].abs() + 1  # no range; one sign
    weight, bias = torch.randn(320, 256).to(dtype), torch.randn(320).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        activations, (codes, scale) = activation_codes(x.to(device), grid), weight_codes(weight.to(device))
        output = int8_product(activations, codes, scale, bias.to(device), grid, dtype)
        results.append([part.cpu() for part in (*activations, codes, scale, output)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


@needs_gpu
@pytest.mark.parametrize("grid", [*GRIDS, ActivationGrid(shards=4)])
def test_on_a_gpu_gradients_pass_straight_through_as_on_the_cpu(grid):
    torch.manual_seed(0)
    leaves, upstream = (torch.randn(2, 5, 64), torch.randn(48, 64), torch.randn(48)), torch.randn(2, 5, 48)
    results = []
    for device in ("cpu", "cuda"):
        x, weight, bias = (leaf.to(device, copy=True).requires_grad_() for leaf in leaves)
        Int8Matmul.apply(x, weight, bias, grid).backward(upstream.to(device))
        results.append([leaf.grad for leaf in (x, weight, bias)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-5, rtol=1e-5)
