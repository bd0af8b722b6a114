"""How per-token values become a loss: sums and counts, never means.

In:  values and weights per token [N].
Out: TokenLoss (sum, count), which the training loop divides once, by the count of the whole optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raykd.types import TokenLoss


def masked_sum(values: Tensor, weight: Tensor) -> TokenLoss:
    """Weighted sum of per-token values and the sum of the weights.

    A token of weight 0 contributes exactly 0 to value and gradient, whatever its value (also inf and NaN). With nothing
    selected the sum is 0 and keeps its graph, so that every rank has a gradient to reduce.

    Args:
        values: [N], nats (or any other unit) per token.
        weight: [N], bool or float >= 0.
    """
    weight = weight.to(values.dtype)
    return TokenLoss(sum=(values.masked_fill(weight == 0, 0.0) * weight).sum(), count=weight.detach().float().sum())


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and total itself (which is 0) where the count is 0."""
    return total / torch.where(count > 0, count, torch.ones_like(count))
