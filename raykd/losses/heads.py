"""Losses of the small heads: when to stop refining, and how good the response is.

In:  outputs of the heads (student/heads.py) at decision points [D] and at the ends of responses [B], and their targets.
Out: TokenLoss in nats (squared error: in probability squared); counts from the targets alone, before any forward pass.

A target of NaN is unknown: the point contributes exactly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from raykd.losses.reduction import masked_sum
from raykd.types import TokenLoss


def halt_head_weight(targets: Tensor, class_weights: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """Weight [D] of each decision point: the weights of its classes in the shares of its target; 0 where it is unknown."""
    proceed, halt = class_weights
    return (targets * halt + (1.0 - targets) * proceed).nan_to_num(nan=0.0)


def halt_head_loss(
    halt_logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Sequence[float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Cross-entropy of (continue, halt) with soft targets, class weights and label smoothing.

    On hard targets the mean is that of `torch.nn.functional.cross_entropy` with the same weights and smoothing.

    Args:
        halt_logits: [D, 2] for (continue, halt).
        targets: [D] probability of halting; NaN: unknown.
        class_weights: of (continue, halt), such as `inverse_frequency` gives.
        label_smoothing: share of every target that is spread evenly over both classes.
    """
    known = ~targets.isnan()
    logprobs = torch.log_softmax(halt_logits.masked_fill(~known[:, None], 0.0).to(_float(halt_logits)), dim=-1)
    halt = targets.to(logprobs.dtype).masked_fill(~known, 0.0) * (1.0 - label_smoothing) + label_smoothing / 2
    values = -(class_weights[0] * (1.0 - halt) * logprobs[:, 0] + class_weights[1] * halt * logprobs[:, 1])
    return TokenLoss(masked_sum(values, known).sum, halt_head_weight(targets, class_weights).float().sum())


def halt_class_counts(targets: Tensor) -> Tensor:
    """Mass [2] of the known targets on (continue, halt): what `running_frequency` takes, added up over the whole step."""
    known = targets[~targets.isnan()].float()
    return torch.stack([(1.0 - known).sum(), known.sum()])


def running_frequency(frequency: Sequence[float], counts: Sequence[float], decay: float = 0.99) -> list[float]:
    """Exponential mean of the shares of (continue, halt), moved on by one step; unchanged where it has no targets."""
    total = sum(counts)
    return [
        decay * old + (1.0 - decay) * count / total if total else old for old, count in zip(frequency, counts, strict=True)
    ]


def inverse_frequency(frequency: Sequence[float], limit: float = 10.0) -> tuple[float, float]:
    """Class weights 1 / (2 * share) of (continue, halt): 1 where they are balanced, at most `limit` for a rare class."""
    proceed, halt = (min(limit, 0.5 / share) if share > 0 else limit for share in frequency)
    return proceed, halt


def num_refined(sequence: Tensor) -> Tensor:
    """Number of sequences with a decision point: the count of `expected_loops`. `sequence` [D] as there."""
    return (sequence[1:] != sequence[:-1]).float().sum() + float(len(sequence) > 0)


def expected_loops(halt_logits: Tensor, sequence: Tensor) -> TokenLoss:
    """Expected number of refinement loops, per sequence: sum_k prod_{j<k} (1 - p_halt,j), the ponder cost (Graves, 2016).

    Args:
        halt_logits: [D, 2] for (continue, halt), the loops of a sequence in order.
        sequence: [D] which sequence each point is of (decision_index // T).

    The sum is in loops, the count in sequences. All pairs of points are looked at, [D, D]: D is small, and nothing is
    divided or subtracted, so that a certain halt (p = 1) does no harm.
    """
    log_proceed = torch.log_softmax(halt_logits.to(_float(halt_logits)), dim=-1)[:, 0]
    later, earlier = sequence[:, None], sequence[None, :]
    before = (later == earlier).tril(-1)  # [D, D] the column is an earlier loop of the row's sequence
    reached = torch.where(before, log_proceed[None, :], 0.0).sum(dim=1).exp()
    return TokenLoss(reached.sum(), num_refined(sequence))


def self_evaluation_weight(quality: Tensor) -> Tensor:
    """Weight [B]: 1 on sequences with a quality score."""
    return (~quality.isnan()).float()


def self_evaluation_loss(quality_logits: Tensor, quality: Tensor, *, kind: Literal["bce", "mse"] = "bce") -> TokenLoss:
    """The student's own estimate of its response against the score that the response got.

    Args:
        quality_logits: [B] logit of the quality, read at the end of the response.
        quality: [B] score in [0, 1] of this very text; NaN: none.
        kind: bce: binary cross-entropy, nats; mse: squared error of the probability.
    """
    unknown = quality.isnan()
    logits = quality_logits.masked_fill(unknown, 0.0).to(_float(quality_logits))
    target = quality.masked_fill(unknown, 0.0).to(logits.dtype)
    if kind == "bce":
        values = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        values = (logits.sigmoid() - target) ** 2
    return masked_sum(values, ~unknown)


def _float(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
