"""Slots whose input is the student's own hidden state: latent spans in continuous mode.

In:  a Hugging Face causal model, input_ids, where the slots are.
Out: inputs_embeds in which every slot holds the hidden state of the position before it, for the forward pass proper.

Source: Hao et al., 2024 (Coconut), where the slots are filled one by one. Here each pass fills all slots of the batch from
the states of the pass before: after `loops` passes the first `loops` slots of every span are exactly what one by one would
give, value and gradient alike, and those behind them have been refined so many times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def fill_slots(
    model: PreTrainedModel, input_ids: Tensor, is_slot: Tensor, *, loops: int = 1, width: int | None = None
) -> Tensor:
    """inputs_embeds [B, T, H] for the forward pass proper, after `loops` forward passes that fill the slots.

    Args:
        input_ids: int64 [B, T], padded on the right; no attention mask is needed (student/model.py says why).
        is_slot: bool [B, T], LATENT tokens; never column 0. Any number of spans in a row.
        loops: passes; 0 leaves the learned embedding of the slot token, which is what all slots start from.
        width: the slots are in the columns before this one, so the passes look no further. None: T.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    filled, before = embeddings, slice(0, width)
    for _ in range(loops):
        hidden = model.base_model(inputs_embeds=filled[:, before], use_cache=False).last_hidden_state
        states = torch.nn.functional.pad(hidden, (0, 0, 1, embeddings.shape[1] - hidden.shape[1]))[:, :-1]
        filled = torch.where(is_slot[..., None], states.to(embeddings.dtype), embeddings)
    return filled


def next_embeddings(model: PreTrainedModel, token_ids: Tensor, is_slot: Tensor, last_hidden: Tensor) -> Tensor:
    """inputs_embeds [B, 1, H] of the next position when generating with a cache, where slots are filled one by one.

    Args:
        token_ids: int64 [B], the token that comes next in each row; its id does not matter where it is a slot.
        is_slot: bool [B].
        last_hidden: [B, H], hidden state of the last position, after the final norm.
    """
    embeddings = model.get_input_embeddings()(token_ids)
    return torch.where(is_slot[:, None], last_hidden.to(embeddings.dtype), embeddings)[:, None]
