"""The first tokens of a turn: open a call where one follows, and do not where none does.

In:  marks and sources of a batch; log-probabilities of the ids that open a call (`data/call_openings.py`) at the first token
     of each turn, and of the written tokens.
Out: TokenLoss in nats. A ramp over the first steps is a schedule of the loss's weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import Mark, Source, TokenLoss


class TurnStarts(NamedTuple):
    """Where the turns begin, and each of the N response tokens within its turn."""

    first: Tensor  # int64 [F] first token of each turn, as an index into the N response tokens
    has_call: Tensor  # bool [N] the token's turn holds a tool call
    index_in_turn: Tensor  # int64 [N] 0 at the first token; -1 at <bot> and <eot>, which surround latent slots


def turn_starts(marks: Tensor, response_index: Tensor) -> TurnStarts:
    """The assistant's turns, from marks [B, T] and the flattened positions [N] of the response tokens.

    A turn is a run of response tokens; latent slots do not end it, and a latent span is a preamble of it.
    """
    flat = marks.flatten()
    # Column 0 holds neither a response token nor a slot: what stands before is of the same sequence, and a slot after is.
    before, after = flat[response_index - 1], flat[(response_index + 1).clamp(max=len(flat) - 1)]
    begins = (before & int(Mark.RESPONSE | Mark.LATENT)) == 0
    turn = begins.long().cumsum(0) - 1
    # At most N turns: no need to ask the device how many.
    calls = torch.zeros_like(turn).index_add(0, turn, ((flat[response_index] & int(Mark.TOOL_NAME)) != 0).long())
    spoken = ((before | after) & int(Mark.LATENT)) == 0
    spoken_before = spoken.long().cumsum(0) - spoken.long()
    at_start = torch.zeros_like(turn).index_add(0, turn, spoken_before * begins)
    index_in_turn = (spoken_before - at_start[turn]).masked_fill(~spoken, -1)
    return TurnStarts((index_in_turn == 0).nonzero()[:, 0], calls[turn] > 0, index_in_turn)


class EarlyCallWeights(NamedTuple):
    """What `early_tool_call_loss` looks at, from the batch alone; `count` is its count."""

    first: Tensor  # int64 [F] first token of each turn, as an index into the N response tokens
    has_call: Tensor  # bool [F]
    prior: Tensor  # float32 [F]
    ce: Tensor  # float32 [N]

    @property
    def count(self) -> Tensor:
        return self.prior.sum() + self.ce.sum()


def early_tool_call_weight(
    marks: Tensor,
    response_index: Tensor,
    source: Tensor,
    *,
    num_tokens: int = 25,
    ce_weight: float = 0.2,
    prior_weight: float = 1.0,
) -> EarlyCallWeights:
    """Weights of the first `num_tokens` tokens of turns with a call, and of the first token of every turn.

    Args:
        marks: [B, T] bits of Mark.
        response_index: [N] position of each response token in the flattened [B * T].
        source: [N] Source of the token's sequence; text that the student wrote is left out.
    """
    starts = turn_starts(marks, response_index)
    kept = source != Source.STUDENT
    early = starts.has_call & kept & (starts.index_in_turn >= 0) & (starts.index_in_turn < num_tokens)
    first = starts.first
    return EarlyCallWeights(first, starts.has_call[first], kept[first].float() * prior_weight, early.float() * ce_weight)


def opening_loss(opening_logprobs: Tensor, has_call: Tensor, weight: Tensor) -> TokenLoss:
    """-log of the mass m on call openings where a call follows, -log(1 - m) where none does (ours).

    Args:
        opening_logprobs: [F, S] student log-probabilities of the S ids that open a call, at the first token of each turn.
        has_call: [F] bool.
        weight: [F].
    """
    log_mass = opening_logprobs.masked_fill((weight == 0)[:, None], -1.0).logsumexp(dim=1)
    # The other branch gets a harmless value: its gradient times 0 must not be NaN.
    wanted = -log_mass.masked_fill(~has_call, -1.0)
    unwanted = -log1mexp(log_mass.masked_fill(has_call, -1.0))
    return masked_sum(torch.where(has_call, wanted, unwanted), weight)


def early_tool_call_loss(opening_logprobs: Tensor, target_logprobs: Tensor, weights: EarlyCallWeights) -> TokenLoss:
    """`opening_loss` at the first token of each turn and cross-entropy on the first tokens of turns with a call (ours).

    Args:
        opening_logprobs: [F, S] student log-probabilities of the ids that open a call, at `weights.first`, nats.
        target_logprobs: [N] of the written tokens.
        weights: of `early_tool_call_weight`.
    """
    prior = opening_loss(opening_logprobs, weights.has_call, weights.prior)
    ce = masked_sum(-target_logprobs, weights.ce)
    return TokenLoss(sum=prior.sum + ce.sum, count=prior.count + ce.count)
