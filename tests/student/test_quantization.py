"""Which layers become INT8, that training them works alone and distributed, and that it recovers what INT8 costs."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raykd.config import StudentConfig
from raykd.stage_config import QuantizationConfig
from raykd.student import int8_arithmetic
from raykd.student.int8_arithmetic import ActivationGrid, weight_codes
from raykd.student.model import load_student
from raykd.student.quantization import Int8Linear, int8_layers, prepare_int8, set_quantized
from tests.conftest import needs_gpu
from tests.int8_model import (
    ASYMMETRIC,
    SYMMETRIC,
    kl_of,
    nll_of,
    on_symmetric_grid,
    outlier_model,
    recovered,
    recovered_model,
    text,
    trained_model,
)

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
}
NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
]


def small_model(*, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=tied))


def test_linear_layers_are_re_classed_in_place_and_switched():
    model, ids = small_model(), torch.arange(40)[None] % 64
    parameters, before = dict(model.named_parameters()), model(ids).logits
    assert prepare_int8(model, SYMMETRIC) == NAMES
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [name for name, module in model.named_modules() if isinstance(module, Int8Linear)] == NAMES
    int8 = model(ids).logits
    assert 0 < (int8 - before).abs().max() < 0.1 * before.abs().max()
    set_quantized(model, False)
    assert torch.equal(model(ids).logits, before)
    set_quantized(model, True)
    assert torch.equal(model(ids).logits, int8)


def test_what_a_policy_ignores_stays_in_float():
    names = prepare_int8(small_model(), QuantizationConfig(ignore=("lm_head", r"layers\.0\..*", "down_proj")))
    assert names == [name for name in NAMES if "layers.1" in name and "down" not in name]
    assert "lm_head" in prepare_int8(small_model(tied=False), QuantizationConfig(ignore=()))


def test_only_layers_whose_inputs_a_server_cuts_have_shards():
    grids = int8_layers(small_model(), QuantizationConfig(activation_shards=2, symmetric_activations=False))
    for name, grid in grids.items():
        shards = 2 if name.endswith(("o_proj", "down_proj")) else 1
        assert grid == ActivationGrid(symmetric=False, kind="cpu", shards=shards)


@pytest.mark.parametrize(
    ("ignore", "reason"),
    [
        (("lm_head", "gate"), r"'gate' matches no linear layer, expected the end of a name such as down_proj, gate_proj"),
        (("lm_head", "(model"), r"'\(model' is no regular expression"),
        ((".*",), r"matches all 15 linear layers, so that none would be INT8"),
        ((), r"lm_head shares its weight with the embedding.*add lm_head to quantization.ignore"),
        (
            ("lm_head", "k_proj"),
            r"keeps model.layers.0.self_attn.k_proj in float but not model.layers.0.self_attn.q_proj: vLLM",
        ),
        (("lm_head", r"layers\.1\.mlp\.up_proj"), r"vLLM computes gate_proj, up_proj as one"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(ignore, reason):
    with pytest.raises(ValueError, match=reason):
        prepare_int8(small_model(), QuantizationConfig(ignore=ignore))


def test_a_model_that_cannot_be_prepared_is_refused():
    model = small_model()
    with pytest.raises(
        ValueError, match="activation_shards=3 does not divide the 32 inputs of model.layers.0.self_attn.o_proj"
    ):
        prepare_int8(model, QuantizationConfig(activation_shards=3))
    prepare_int8(model, SYMMETRIC)
    with pytest.raises(ValueError, match="has INT8 layers already"):
        prepare_int8(model, SYMMETRIC)
    other: Any = small_model()
    other.model.layers[1].mlp.down_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 32)
    with pytest.raises(ValueError, match="down_proj is a NonDynamicallyQuantizableLinear"):
        prepare_int8(other, SYMMETRIC)


def test_biases_and_gradient_checkpointing_are_supported():
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    ids = torch.arange(40)[None] % 64
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    prepare_int8(model, SYMMETRIC)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))


def record_codes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What `weight_codes` gives from here on, in order."""
    seen = []

    def record(weight: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(weight_codes(weight))
        return seen[-1]

    monkeypatch.setattr(int8_arithmetic, "weight_codes", record)
    return seen


def test_under_autocast_codes_are_those_of_the_bfloat16_weights(monkeypatch):
    model, ids = small_model(), torch.arange(40)[None] % 64
    names = prepare_int8(model, SYMMETRIC)
    seen = record_codes(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
    hidden.float().sum().backward()
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    for weight, (codes, scale) in zip(weights, seen, strict=True):
        expected = weight_codes(weight.bfloat16())
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
    assert any(not torch.equal(codes, weight_codes(weight)[0]) for weight, (codes, _) in zip(weights, seen, strict=True))


def test_a_student_that_is_saved_and_loaded_has_the_same_codes(tmp_path, tiny_model_path):
    student = load_student(StudentConfig(model=str(tiny_model_path)), seed=0)
    names = prepare_int8(student.model, SYMMETRIC)
    ids = torch.arange(64)[None]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(3):
        student.model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.save(tmp_path)
    resumed = load_student(StudentConfig(model=str(tmp_path)), seed=0)
    assert prepare_int8(resumed.model, SYMMETRIC) == names
    for name in names:
        for a, b in zip(*(weight_codes(m.model.get_parameter(f"{name}.weight")) for m in (student, resumed)), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(student.model.eval()(ids).logits, resumed.model.eval()(ids).logits)


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_on_a_gpu_a_layer_computes_what_it_computes_on_the_cpu(in_bfloat16):
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 11, 32), torch.randn(3, 11, 64)
    results = []
    for device in ("cpu", "cuda"):
        model: Any = small_model()
        prepare_int8(model, SYMMETRIC)
        layer, own = model.model.layers[0].mlp.up_proj.to(device), x.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
            output = layer(own)
        output.backward(upstream.to(device, output.dtype))
        found: Any = (output.detach(), own.grad, layer.weight.grad)
        results.append([tensor.float().cpu() for tensor in found])
    (output, *gradients), (gpu_output, *gpu_gradients) = results
    assert torch.equal(gpu_output, output)
    for on_cpu, on_gpu in zip(gradients, gpu_gradients, strict=True):
        assert (on_gpu - on_cpu).norm() <= (1e-2 if in_bfloat16 else 1e-6) * on_cpu.norm()


@needs_gpu
def test_on_a_gpu_a_model_in_int8_learns_from_the_same_gradients_as_on_the_cpu():
    """Not to the last bit: attention rounds otherwise, and a value that lies between two codes may fall to either side."""
    results = []
    for device in ("cpu", "cuda"):
        model: Any = small_model()
        prepare_int8(model, SYMMETRIC)
        gradients_of(model.to(device), batch().to(device))
        results.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    on_cpu, on_gpu = results
    assert (on_gpu - on_cpu).norm() <= 0.05 * on_cpu.norm()
    assert len(on_gpu) == sum(p.numel() for p in small_model().parameters())


# --- several workers ------------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module, ids: Tensor) -> None:
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()


def batch() -> Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(3))


def check_rank(rank: int, folder: str) -> None:
    """A rank of two: gradients of DDP and FSDP2 on half of the batch each, beside those of one process on all of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = batch().chunk(2)[rank]
    alone = small_model()
    names = prepare_int8(alone, SYMMETRIC)
    gradients_of(alone, batch())
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}

    replicated = small_model()
    prepare_int8(replicated, SYMMETRIC)
    gradients_of(DistributedDataParallel(replicated), own)
    worst = {"ddp": relative(replicated, expected)}

    sharded = small_model()
    prepare_int8(sharded, SYMMETRIC)
    gradients_of(shard(sharded), own)
    worst["fsdp"] = relative(sharded, expected)

    mixed: Any = small_model()
    prepare_int8(mixed, SYMMETRIC)
    shard(mixed, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    patch = pytest.MonkeyPatch()
    seen = record_codes(patch)
    gradients_of(mixed, own)
    patch.undo()
    for name, (codes, _) in zip(names, seen, strict=True):
        master = mixed.get_parameter(f"{name}.weight").full_tensor()
        assert torch.equal(codes, weight_codes(master.bfloat16())[0]), f"{name}: other codes than those that are exported"
    worst["fsdp_bfloat16"] = relative(mixed, expected)
    if rank == 0:
        torch.save(worst, f"{folder}/worst.pt")
    dist.destroy_process_group()


def shard(model: Any, **options) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def relative(model: nn.Module, expected: dict[str, Tensor | None]) -> float:
    worst = 0.0
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        wanted = expected[name]
        assert gradient is not None
        assert wanted is not None
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        worst = max(worst, ((whole - wanted).abs().max() / wanted.abs().max()).item())
    return worst


@pytest.mark.slow
def test_gradients_of_ddp_and_fsdp_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(check_rank, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    worst = torch.load(Path(tmp_path) / "worst.pt")
    assert worst["ddp"] <= 1e-6
    assert worst["fsdp"] <= 1e-6
    assert worst["fsdp_bfloat16"] < 0.1


# --- what training in INT8 recovers ---------------------------------------------------------------------------------------


def int8_copy(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    copied = copy.deepcopy(model)
    prepare_int8(copied, SYMMETRIC)
    return copied


@torch.no_grad()
def held_out_kl(model: Qwen3ForCausalLM) -> float:
    return kl_of(model, trained_model(), text()[1][:32]).item()


@torch.no_grad()
def test_outliers_cost_something_in_int8_and_nothing_in_float():
    ids = text()[1][:2]
    assert torch.equal(outlier_model()(ids).logits, trained_model()(ids).logits)
    assert held_out_kl(int8_copy(outlier_model())) > 20 * held_out_kl(int8_copy(trained_model()))


@pytest.mark.slow
def test_training_against_the_own_float_self_recovers_most_of_what_int8_costs():
    after_training = held_out_kl(int8_copy(outlier_model()))

    def share(model: Qwen3ForCausalLM) -> float:
        return 1 - held_out_kl(model) / after_training

    started = time.process_time()
    matched = share(recovered_model())
    mismatched = share(on_symmetric_grid(recovered(ASYMMETRIC)))
    without_teacher = share(recovered(SYMMETRIC, teacher=False))
    print(f"recovered: {matched:.1%}, {mismatched:.1%}, {without_teacher:.1%} in {time.process_time() - started:.0f} s CPU")
    assert matched >= 0.65
    assert matched >= mismatched + 0.15
    assert matched >= without_teacher + 0.10  # by far: on the text alone the model goes on learning, away from itself
    assert nll_of(recovered_model(), text()[1][:32]) < nll_of(int8_copy(outlier_model()), text()[1][:32])
