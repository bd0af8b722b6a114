"""Outliers in the activations of a small model, as large ones have them: what INT8 has something to lose on.

In:  a Llama-like model, a factor (a power of two). Out: the same function, to the bit, with other weights.

A norm's gain (or the up projection's rows) is multiplied in a few columns and the columns of the layers that read it are
divided by as much: the inverse of what raykd/student/smoothing.py does.
"""

from typing import Any, TypeVar

import torch

NUM_CHANNELS = 4
"""Of the inputs of every layer."""
M = TypeVar("M", bound=torch.nn.Module)


@torch.no_grad()
def add_outliers(model: M, factor: float) -> M:
    """Have NUM_CHANNELS channels of every linear layer's inputs stick out by `factor`, in place; returns the model."""
    generator = torch.Generator().manual_seed(1)
    decoder: Any = model
    for layer in decoder.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for gain, readers in (
            (layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj.weight, (mlp.down_proj,)),
        ):
            channels = torch.randperm(len(gain), generator=generator)[:NUM_CHANNELS]
            gain[channels] *= factor
            for reader in readers:
                reader.weight[:, channels] /= factor
    return model
