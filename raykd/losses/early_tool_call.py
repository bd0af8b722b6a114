"""The first tokens of a turn: open a call where one follows, and do not where none does.

In:  a batch's turns; log-probabilities of the ids that open a call (`data/call_openings.py`) at the first token
     of each turn, and of the written tokens.
Out: TokenLoss in nats. A ramp over the first steps is a schedule of the loss's weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import Batch, Source, TokenLoss


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
    batch: Batch, *, num_tokens: int = 25, ce_weight: float = 0.2, prior_weight: float = 1.0
) -> EarlyCallWeights:
    """Weights of the first `num_tokens` tokens of turns with a call, and of the first token of every turn.

    Text that the student wrote is left out.
    """
    kept = batch.response_source != Source.STUDENT
    early = batch.turn_has_call & kept & (batch.index_in_turn >= 0) & (batch.index_in_turn < num_tokens)
    first = batch.turn_first
    return EarlyCallWeights(first, batch.turn_has_call[first], kept[first].float() * prior_weight, early.float() * ce_weight)


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
