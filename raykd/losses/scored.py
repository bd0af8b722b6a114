"""Losses that follow a score or a rule rather than a target: latent-span rules, claims, rewards.

In:  log-probabilities of the N response tokens (or of a few constant ids there), and what the batch knows of the tokens.
Out: TokenLoss in nats.

What can be written on the token distribution is a loss here; what only a whole text shows (`data/text_scores.py`) is a
reward and reaches the weights by the policy gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import Mark, Source, TokenLoss


def caws_terms(
    response_ids: Tensor, sequence_of_token: Tensor, *, bot_id: int, eot_id: int, max_spans: int | Tensor
) -> Tensor:
    """Which of <bot>, <eot> and EOS must not be written at each token: bool [N, 3] in that order.

    <bot> once the sequence has opened `max_spans` spans before the token; <eot> outside a span; EOS inside one. A <bot>
    inside a span opens none (`<bot><bot><eot>` is one span). Slots of a span need not be among the tokens.

    Args:
        response_ids: [N] written ids; tokens of a sequence are neighbours, in order.
        sequence_of_token: [N] number of the token's sequence; any numbers that differ between neighbouring sequences.
        max_spans: latent spans that a sequence may have; a tensor [B] is indexed by `sequence_of_token`.
    """
    index = torch.arange(len(response_ids), device=response_ids.device)
    is_bot, is_eot = response_ids == bot_id, response_ids == eot_id
    start = sequence_starts(sequence_of_token)
    last_bot, last_eot = (_last_before(is_sentinel, index) for is_sentinel in (is_bot, is_eot))
    inside = (last_bot >= start) & (last_bot > last_eot)
    opened = (is_bot & ~inside).long()
    before = opened.cumsum(0) - opened
    used = before - before[start]
    limit = max_spans[sequence_of_token] if isinstance(max_spans, Tensor) else max_spans
    return torch.stack([used >= limit, ~inside, inside], dim=1)


def caws_compliance_loss(sentinel_logprobs: Tensor, terms: Tensor) -> TokenLoss:
    """Unlikelihood -log(1 - q) of the sentinels that the CAWS rules forbid (ours, after Welleck et al., 2020).

    Args:
        sentinel_logprobs: [N, 3] student log-probabilities of <bot>, <eot> and EOS at each token, nats.
        terms: [N, 3] of `caws_terms`. Every token has one or two; the count is that of tokens with any.
    """
    forbidden = masked_sum(-log1mexp(sentinel_logprobs.masked_fill(~terms, -1.0)), terms)
    return TokenLoss(sum=forbidden.sum, count=terms.any(dim=1).float().sum())


def claim_extraction_weight(marks: Tensor, source: Tensor) -> Tensor:
    """Weight [N]: 1 on tokens that overlap a checkable claim, except where the student wrote them."""
    return (((marks & int(Mark.CLAIM)) != 0) & (source != Source.STUDENT)).float()


def claim_extraction_loss(ce: Tensor, kl: Tensor, weight: Tensor, *, ce_share: float) -> TokenLoss:
    """Cross-entropy and divergence once more on the tokens of claims: share * CE + (1 - share) * KL (ours).

    Args:
        ce: [N] -log q of the written token, nats.
        kl: [N] divergence from the teacher at each token, nats; 0 where there is no teacher.
        weight: [N], 1 on claim tokens or the claim's confidence; values of tokens with weight 0 are not looked at.
    """
    parts = [masked_sum(values, weight) for values in (ce, kl)]
    sums = [share * part.sum for share, part in zip((ce_share, 1.0 - ce_share), parts, strict=True) if share]
    return TokenLoss(sum=torch.stack(sums).sum(), count=parts[0].count)


def policy_gradient_weight(advantage: Tensor) -> Tensor:
    """Weight [N]: 1 on tokens sampled from the student, 0 where the advantage is NaN."""
    return (~advantage.isnan()).float()


def policy_gradient_loss(
    logprobs: Tensor, advantage: Tensor, old_logprobs: Tensor | None = None, *, clip: float = 0.2
) -> TokenLoss:
    """-A log q on sampled tokens (Williams, 1992), or PPO's clipped ratio where samples are stale (Schulman et al., 2017).

    At equal weights both have the same gradient, that of the expected reward (per token).

    Args:
        logprobs: [N] student log-probability of the written token, nats.
        advantage: [N] of the token's sequence; NaN where it was not sampled from the student.
        old_logprobs: [N] the same under the weights that sampled (NaN where the advantage is); None: the weights of now.
        clip: the ratio's gradient ends where it leaves [1 - clip, 1 + clip] in the advantage's direction.
    """
    weight = policy_gradient_weight(advantage)
    advantage = advantage.nan_to_num(nan=0.0).to(logprobs.dtype)
    if old_logprobs is None:
        return masked_sum(-advantage * logprobs.masked_fill(weight == 0, 0.0), weight)
    ratio = (logprobs - old_logprobs).masked_fill(weight == 0, 0.0).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    return masked_sum(-gain, weight)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Reward of each sample less the mean of the prompt's other samples, [P, n] -> [P, n] (Kool et al., 2019: RLOO).

    Raises ValueError for fewer than two samples, which leave no other.
    """
    samples = rewards.shape[-1]
    if samples < 2:
        raise ValueError(f"{samples} sample per prompt found, expected at least 2: the others' mean is the baseline")
    return (rewards - rewards.mean(dim=-1, keepdim=True)) * (samples / (samples - 1))


def sequence_starts(sequence_of_token: Tensor) -> Tensor:
    """Index [N] of the first token of every token's sequence."""
    index = torch.arange(len(sequence_of_token), device=sequence_of_token.device)
    first = torch.ones_like(sequence_of_token, dtype=torch.bool)
    first[1:] = sequence_of_token[1:] != sequence_of_token[:-1]
    return torch.where(first, index, 0).cummax(0).values if len(index) else index


def _last_before(flag: Tensor, index: Tensor) -> Tensor:
    """Index [N] of the last True strictly before each place; -1 where there is none."""
    if not len(index):
        return index
    last = torch.where(flag, index, -1).cummax(0).values
    return torch.nn.functional.pad(last[:-1], (1, 0), value=-1)
