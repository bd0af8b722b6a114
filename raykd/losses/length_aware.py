"""When to stop: the student's own length as a differentiable number, and the teacher's stop as a target.

In:  log-probability of EOS at each of the N response tokens; where the teacher stopped, or how long it was.
Out: TokenLoss in nats (stops) and relative excess (rollouts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from raykd.losses.reduction import log1mexp, masked_sum
from raykd.losses.scored import sequence_starts
from raykd.types import Source, TokenLoss


def stop_weight(response_ids: Tensor, source: Tensor, eos_id: int) -> Tensor:
    """Weight [N]: 1 on the end-of-turn tokens of teacher and recorded text."""
    return ((response_ids == eos_id) & (source != Source.STUDENT)).float()


def excess_weight(target_length: Tensor) -> Tensor:
    """Weight [B]: 1 on rollouts with a target length; complete ones have none (completeness excuses length)."""
    return (target_length > 0).float()  # False for NaN


def expected_length(eos_logprob: Tensor, sequence_of_token: Tensor, num_sequences: int) -> Tensor:
    """Expected number of response tokens [B], the EOS included, along a sampled response (ours; discrete-time survival).

    With the hazard h_t = q_t(EOS), E[min(L, T)] = sum over t = 1..T of the product over s < t of (1 - h_s): the hazards are
    those of the tokens that were sampled, so a response that was cut off counts no further than its T tokens.

    Args:
        eos_logprob: [N] student log-probability of EOS at each token, nats; tokens of a sequence are neighbours, in order.
        sequence_of_token: [N] in [0, num_sequences).
    """
    survived = log1mexp(eos_logprob).double()  # the sums run on over all sequences: float32 would lose the later ones
    before = survived.cumsum(0) - survived
    alive = (before - before[sequence_starts(sequence_of_token)]).exp().to(eos_logprob.dtype)
    return alive.new_zeros(num_sequences).index_add(0, sequence_of_token, alive)


def length_aware_kd_loss(
    eos_logprob: Tensor,
    is_stop: Tensor,
    sequence_of_token: Tensor,
    target_length: Tensor,
    *,
    hinge: float = 0.15,
    slope: float = 1.0,
) -> TokenLoss:
    """Stop where the teacher stopped, and on rollouts do not run longer than it (ours).

    On teacher and recorded text: -log q(EOS) at each stop. That is the cross-entropy of EOS and, being -log(1 - q(not EOS)),
    also the unlikelihood of every other continuation. On rollouts: slope * relu((E[L] - target) / target - hinge).

    Args:
        eos_logprob: [N] student log-probability of EOS at each token, nats; tokens of a sequence are neighbours, in order.
        is_stop: [N] `stop_weight`.
        sequence_of_token: [N] row of the token's sequence, in [0, B).
        target_length: [B] response tokens of the teacher for a rollout's prompt; NaN for rows that are no rollouts, and for
            those that hold all that was asked for: never penalised.

    The count is stops + penalised rollouts. `is_stop` is 0 on rollouts, so a sequence is one or the other.
    """
    stops = masked_sum(-eos_logprob, is_stop)
    weight = excess_weight(target_length)
    # Tokens that are on no counted rollout must not be looked at.
    of_rollout = weight[sequence_of_token] > 0
    lengths = expected_length(eos_logprob.masked_fill(~of_rollout, -1.0), sequence_of_token, len(target_length))
    target = target_length.masked_fill(weight == 0, 1.0).to(lengths.dtype)
    excess = masked_sum(slope * torch.relu(lengths / target - 1.0 - hinge), weight)
    return TokenLoss(sum=stops.sum + excess.sum, count=stops.count + excess.count)
