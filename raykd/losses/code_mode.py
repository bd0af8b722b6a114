"""Code that calls tools rather than direct calls, on samples where that pays.

In:  log-probabilities of the N written tokens, their marks, and which sequences are two answers to one prompt.
Out: TokenLoss in nats; metrics as (sum, count).

Which samples are eligible was decided with the data (`code_mode_eligible`): others carry no CODE_MODE or DIRECT_TOOL mark.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import Mark, Source, TokenLoss


class CodeModePreferenceLoss(nn.Module):
    """Likelihood of code and unlikelihood of direct calls per token; preference between the two sequences of a pair.

    Tokens: -positive * log q on CODE_MODE tokens, -negative * log(1 - q) on DIRECT_TOOL tokens (Welleck et al., 2020).
    Pairs: -log sigmoid(beta * margin), margin = (S - S_ref)(preferred) - (S - S_ref)(other), S = log-probability of the
    response (DPO, Rafailov et al., 2023). A sequence whose pair is complete counts in the preference only. The count is that
    of weighted tokens and of pairs.
    """

    def __init__(self, *, positive_weight: float = 1.0, negative_weight: float = 1.0, beta: float = 0.1):
        super().__init__()
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight
        self.beta = beta

    def forward(
        self,
        target_logprobs: Tensor,
        marks: Tensor,
        sequence_of_token: Tensor,
        pair: Tensor,
        reference_logprob: Tensor,
    ) -> TokenLoss:
        """Loss of a micro-batch, in nats. Both sequences of a pair must be in it.

        Args:
            target_logprobs: [N] student log-probability of each written response token.
            marks: [N] bits of Mark.
            sequence_of_token: [N] row of the token's sequence, in [0, B).
            pair: [B] the same |pair| > 0 on two rows: > 0 is preferred to < 0; 0: none.
            reference_logprob: [B] of the response under the frozen reference student; NaN: none, and so no preference.
        """
        weights = self.weights(marks, sequence_of_token, pair, reference_logprob)
        code = masked_sum(-target_logprobs, weights[0])
        direct = masked_sum(-log1mexp(target_logprobs.masked_fill(weights[1] == 0, -1.0)), weights[1])
        matches = _matches(pair, reference_logprob)
        in_pair = (matches | matches.T).any(dim=1)
        response = sequence_logprobs(target_logprobs, sequence_of_token, in_pair)
        gain = response - reference_logprob.masked_fill(~in_pair, 0.0).to(response.dtype)
        margin = (gain[:, None] - gain[None, :]) * self.beta
        preference = masked_sum(-nn.functional.logsigmoid(margin), matches)
        parts = (code, direct, preference)
        return TokenLoss(sum=torch.stack([p.sum for p in parts]).sum(), count=torch.stack([p.count for p in parts]).sum())

    def weights(
        self, marks: Tensor, sequence_of_token: Tensor, pair: Tensor, reference_logprob: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights [N] of the tokens in likelihood and unlikelihood. Arguments as in `forward`."""
        matches = _matches(pair, reference_logprob)
        alone = ~(matches | matches.T).any(dim=1)[sequence_of_token]
        code, direct = ((((marks & int(mark)) != 0) & alone).float() for mark in (Mark.CODE_MODE, Mark.DIRECT_TOOL))
        return code * self.positive_weight, direct * self.negative_weight

    def num_pairs(self, pair: Tensor, reference_logprob: Tensor) -> Tensor:
        """Complete pairs [B] of the batch: the count of the preference. Arguments as in `forward`."""
        return _matches(pair, reference_logprob).float().sum()


def sequence_logprobs(target_logprobs: Tensor, sequence_of_token: Tensor, of_sequence: Tensor) -> Tensor:
    """Log-probability [B] of each response where `of_sequence` [B] is set, 0 elsewhere, from that of its tokens [N]."""
    counted = target_logprobs.masked_fill(~of_sequence[sequence_of_token], 0.0)
    return counted.new_zeros(len(of_sequence)).index_add(0, sequence_of_token, counted)


def code_mode_metric_weights(marks: Tensor) -> dict[str, Tensor]:
    """Weights [N] of the mean log-probability of the tokens of code, and of direct calls."""
    return {
        "code_mode_logprob": ((marks & int(Mark.CODE_MODE)) != 0).float(),
        "direct_tool_logprob": ((marks & int(Mark.DIRECT_TOOL)) != 0).float(),
    }


def eligible_share(marks: Tensor, source: Tensor, sequence_of_token: Tensor, num_sequences: int) -> TokenLoss:
    """How many sequences are eligible, of all whose text is to be followed: rejected halves and rollouts are left out.

    Args:
        marks, source: [N] bits of Mark, and Source, of each response token.
        sequence_of_token: [N] row of the token's sequence, in [0, num_sequences).
    """
    followed = source != Source.STUDENT
    marked = ((marks & int(Mark.CODE_MODE | Mark.DIRECT_TOOL)) != 0) & followed
    found = torch.zeros(2, num_sequences, device=marks.device)
    found = found.index_add(1, sequence_of_token, torch.stack([marked, followed]).float()).clamp(max=1.0)
    return TokenLoss(sum=found[0].sum(), count=found[1].sum())


def _matches(pair: Tensor, reference_logprob: Tensor) -> Tensor:
    """[B, B] True at (preferred, other) of each pair that is here as a whole, with both references."""
    known = ~reference_logprob.isnan()
    preferred = (pair > 0) & known
    return preferred[:, None] & known[None, :] & (pair[:, None] == -pair[None, :])
