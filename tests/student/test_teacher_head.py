"""raykd/student/teacher_head.py: the norm and head read from a folder give the whole model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from raykd.student.teacher_head import load_teacher_head

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def save(model: PreTrainedModel, folder: Path, **options) -> Path:
    for parameter in model.parameters():  # also the norms and biases, which start at 1 and 0
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return folder


def logits_and_state(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.eval(model)
    stack = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    seen: list[torch.Tensor] = []
    stack[-1].register_forward_hook(lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 5, 9, 2]])).logits
    return logits, seen[0]


def assert_whole(folder: Path) -> None:
    logits, state = logits_and_state(folder)
    norm, weight, bias = load_teacher_head(folder)
    ours = torch.nn.functional.linear(norm(state), weight, bias)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert not any(tensor.requires_grad for tensor in (weight, *norm.parameters()))


def test_tied_qwen3(tiny_model_path: Path):
    assert_whole(tiny_model_path)


def test_untied_llama_in_many_files(tmp_path: Path):
    folder = save(LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)), tmp_path, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_whole(folder)


def test_gpt2_and_a_head_with_bias(tmp_path: Path):
    assert_whole(save(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), tmp_path / "gpt2"))
    phi = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
    assert_whole(save(PhiForCausalLM(PhiConfig(**phi)), tmp_path / "phi"))


def test_logits_that_are_soft_capped_are_refused(tmp_path: Path):
    folder = save(Gemma2ForCausalLM(Gemma2Config(**SMALL)), tmp_path)
    with pytest.raises(ValueError, match=r"makes its logits in another way.*topk_tail"):
        load_teacher_head(folder)


def test_a_missing_tensor_is_named(tmp_path: Path):
    save(LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)), tmp_path, max_shard_size="2KB")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"lm_head\.weight.*complete checkpoint"):
        load_teacher_head(tmp_path)
