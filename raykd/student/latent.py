"""Latent spans: how a student thinks without words, and in continuous mode the states that its slots are filled with.

In:  a Hugging Face causal model, input_ids, where the slots are.
Out: inputs_embeds in which every slot holds the hidden state of the position before it, for the forward pass proper.

Source: Hao et al., 2024 (Coconut), where the slots are filled one by one. Here each pass fills all slots of the batch from
the states of the pass before: after `loops` passes the first `loops` slots of a row are exactly what one by one would give,
value and gradient alike, and those behind them have been refined so many times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LatentSpans:
    """The spans of a student that was trained with a latent curriculum."""

    begin_id: int  # <bot>: the student's own decision to think
    slot_id: int
    num_slots: int  # that follow it when the student writes, whatever it would say there
    loops: int  # passes that fill the slots in training; 0: slots have their learned embedding (mask mode)


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
