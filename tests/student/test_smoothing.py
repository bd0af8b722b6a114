import copy
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from raykd.student.quantization import prepare_int8, set_quantized
from raykd.student.smoothing import activation_maxima, smooth
from tests.int8_model import SYMMETRIC, kl_of, outlier_model, text, trained_model

READERS = {
    "input_layernorm": ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}


@torch.no_grad()
def test_the_range_behind_a_norm_is_measured_with_the_layers_that_read_it():
    model: Any = trained_model()
    ids = text()[1]
    seen = []
    hook = model.model.layers[1].input_layernorm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with activation_maxima(model) as maxima:
        model(ids[:2])
        model(ids[2:4])
    hook.remove()
    model(ids[4:6])  # not measured any more
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for norm, readers in READERS.items():
            assert maxima[f"{prefix}.{norm}"].linears == {f"{prefix}.{reader}" for reader in readers}
    assert not maxima["model.layers.1.self_attn.q_norm"].linears
    assert torch.equal(maxima["model.layers.1.input_layernorm"].largest, torch.cat(seen[:2]).abs().amax(dim=(0, 1)))


@torch.no_grad()
def test_smoothing_keeps_the_function_and_evens_out_the_ranges():
    model, ids = copy.deepcopy(outlier_model()), text()[1][:8]
    before = model(ids).logits
    names = prepare_int8(model, SYMMETRIC)
    unsmoothed = kl_of(model, trained_model(), ids)
    set_quantized(model, False)
    with activation_maxima(model) as maxima:
        model(ids)
    folded = smooth(model, maxima, 0.5)
    assert folded == [f"model.layers.{layer}.{norm}" for layer in range(4) for norm in READERS]
    torch.testing.assert_close(model(ids).logits, before, atol=2e-4, rtol=0)
    with activation_maxima(model) as after:
        model(ids)
    for name in folded:  # of alpha = 0.5 the ranges of activations and of weights become the same
        weights = torch.cat([model.get_parameter(f"{linear}.weight") for linear in sorted(after[name].linears)])
        torch.testing.assert_close(after[name].largest, weights.abs().amax(dim=0), atol=0, rtol=1e-3)
    set_quantized(model, True)
    assert len(names) == 28
    assert kl_of(model, trained_model(), ids) < 0.9 * unsmoothed  # outliers inside the MLP have no norm to go to


def test_norms_of_another_formula_and_models_without_any_are_refused():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Gemma2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    prepare_int8(model, SYMMETRIC)
    with torch.no_grad(), activation_maxima(model) as maxima:
        model(torch.arange(40)[None])
    with pytest.raises(ValueError, match=r"smoothing=0.5 changes what Gemma2ForCausalLM computes .*set smoothing=0"):
        smooth(model, maxima, 0.5)
    with pytest.raises(ValueError, match="no INT8 layer reads the output of a norm"):
        smooth(model, {}, 0.5)
