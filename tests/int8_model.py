"""A small model that is worth quantising: trained for seconds on Python source, alone and with outliers in its activations.

The demo teacher is no such model: seven layers deep and sure of nearly every token, one flipped code moves all later ones.
"""

from __future__ import annotations

import _pydecimal
import argparse
import copy
import functools
import inspect
import subprocess
import tarfile
import typing
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from raykd.demo.outliers import add_outliers
from raykd.stage_config import QuantizationConfig
from raykd.student.int8_arithmetic import ActivationGrid
from raykd.student.quantization import Int8Linear, prepare_int8
from tests.conftest import DEMO_TEACHER

LENGTH = 128
OUTLIER = 128.0
"""A power of two: multiplying by it and dividing by it cost no bit."""
SYMMETRIC, ASYMMETRIC = QuantizationConfig(), QuantizationConfig(symmetric_activations=False)


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """Rows [R, LENGTH] of token ids: training and held out."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TEACHER)
    source = "".join(inspect.getsource(module) for module in (argparse, _pydecimal, tarfile, typing, subprocess))
    ids = torch.tensor(tokenizer(source, verbose=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[:-100], rows[-100:]


@torch.enable_grad()
def learn(model: Qwen3ForCausalLM, loss_of: Callable[[Tensor], Tensor], *, steps: int, rate: float, size: tuple) -> None:
    """AdamW on `steps` random batches of `size` tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    rows, _ = text()
    for step in range(steps):
        batch = rows[torch.randint(0, len(rows), (size[0],))][:, : size[1]]
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10)
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def logits_of(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def nll_of(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def kl_of(model: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """KL(teacher || model) over the vocabulary, nats a token."""
    with torch.no_grad():
        wanted = logits_of(teacher, ids).log_softmax(-1)
    return (wanted.exp() * (wanted - logits_of(model, ids).log_softmax(-1))).sum(-1).mean()


@functools.cache
def trained_model() -> Qwen3ForCausalLM:
    """4 layers, 0.84 M parameters, tied embeddings, about 2.9 nats a token. Shared: copy it before you change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=1152,
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
        )
        learn(model, lambda ids: nll_of(model, ids), steps=120, rate=5e-3, size=(8, LENGTH))
    return model.eval()


@functools.cache
def outlier_model() -> Qwen3ForCausalLM:
    """The same function to the bit, with activations as large models have them: 4 channels of every input stick out."""
    return add_outliers(copy.deepcopy(trained_model()), OUTLIER)


def recovered(config: QuantizationConfig, *, teacher: bool = True) -> Qwen3ForCausalLM:
    """The model with outliers after 120 steps of training in INT8, against its own float self or, without, on the text."""
    model = copy.deepcopy(outlier_model())
    prepare_int8(model, config)
    own = trained_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss_of = (lambda ids: kl_of(model, own, ids)) if teacher else (lambda ids: nll_of(model, ids))
        learn(model, loss_of, steps=120, rate=3e-4, size=(4, LENGTH // 2))
    return model


@functools.cache
def recovered_model() -> Qwen3ForCausalLM:
    """With the grid that it is served on. Shared."""
    return recovered(SYMMETRIC)


def on_symmetric_grid(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.grid = ActivationGrid()
    return model
