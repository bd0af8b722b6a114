"""SmoothQuant (Xiao et al., 2023): moves the range of activations into weights, before a student is trained in INT8.

In:  a prepared model, the largest activations behind each of its norms, alpha. Out: the same function, other weights.

A norm's gain is divided by a factor per column and the columns of the linear layers behind it are multiplied by the same:
columns that stick out of the activations, and would widen the grid of their whole token, do so less. Serving costs the same.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raykd.student.quantization import Int8Linear, set_quantized

SAME = 1e-3
"""By how much, relative to the largest, logits may differ after smoothing."""


@dataclass
class NormOutput:
    """What was seen behind a norm."""

    largest: Tensor  # [K] largest |value| of every column
    linears: set[str] = field(default_factory=set)  # names of the linear layers that read it


@contextlib.contextmanager
def activation_maxima(model: nn.Module) -> Iterator[dict[str, NormOutput]]:
    """Within: what each norm puts out in every forward pass of `model`, by its name, and which linear layers read it."""
    found: dict[str, NormOutput] = {}
    last: dict[str, weakref.ref[Tensor]] = {}

    def after_norm(name: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            largest = output.detach().float().abs().flatten(0, -2).amax(dim=0)
            seen = found.setdefault(name, NormOutput(largest))
            seen.largest = torch.maximum(seen.largest, largest)
            last[name] = weakref.ref(output)

        return hook

    def before_linear(name: str):
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for norm, output in last.items():
                if output() is inputs[0]:
                    found[norm].linears.add(name)

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(before_linear(name)).remove)
            elif type(module).__name__.endswith("Norm"):
                stack.callback(module.register_forward_hook(after_norm(name)).remove)
        yield found


@torch.no_grad()
def smooth(model: PreTrainedModel, maxima: Mapping[str, NormOutput], alpha: float) -> list[str]:
    """Fold the range of activations into the weights, in place; returns the names of the norms with INT8 layers behind them.

    Every factor is max|x|^alpha / max|w|^(1 - alpha) of its column. `maxima` must be the same on all workers. The function
    stays the same up to the rounding of floats. Errors: ValueError when it does not, because a norm has another formula
    than gain * x, or when there is no such norm.
    """
    before = _probe(model)
    folded = []
    for name, output in maxima.items():
        norm, linears = model.get_submodule(name), [model.get_submodule(linear) for linear in sorted(output.linears)]
        if not any(isinstance(linear, Int8Linear) for linear in linears):
            continue
        weights = [linear.get_parameter("weight") for linear in linears]
        of_weights = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
        largest = output.largest.to(of_weights)
        factor = largest**alpha / of_weights ** (1 - alpha)
        factor = torch.where((largest > 0) & (of_weights > 0), factor, 1.0)
        for weight in weights:
            weight *= factor
        for parameter in norm.parameters():  # gain, and bias if it has one
            parameter /= factor
        folded.append(name)
    if not folded:
        raise ValueError("quantization.smoothing: no INT8 layer reads the output of a norm directly; set smoothing=0")
    after = _probe(model)
    if not (after - before).abs().max() <= SAME * before.abs().max():
        raise ValueError(
            f"quantization.smoothing={alpha:g} changes what {type(model).__name__} computes (logits up to "
            f"{before.abs().max().item():.3g} differ by {(after - before).abs().max().item():.3g}): its norms are no "
            "gain * x, or something else reads them; set smoothing=0"
        )
    return folded


def _probe(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens, in float."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    states = [layer.quantized for layer in layers]
    set_quantized(model, False)
    logits = model(input_ids=torch.arange(8, device=model.device)[None], use_cache=False).logits
    for layer, state in zip(layers, states, strict=True):
        layer.quantized = state
    return logits
