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


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0: of log q(v) the log of the probability that v is not written; `-log1mexp` is unlikelihood.

    Exact to rounding on the whole range (two branches, Mächler 2012); gradient -1 / expm1(-x). The largest x is one rounding
    step below 0, so that value and gradient stay finite where a probability has rounded to 1; at -inf both are 0.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    small = log_p < -0.6931471805599453
    # Each branch sees a harmless value where the other one is taken: a NaN gradient times 0 would be NaN.
    far = torch.where(small, log_p, -1.0)
    near = torch.where(small, -0.5, log_p)
    return torch.where(small, torch.log1p(-far.exp()), torch.log(-torch.expm1(near)))
