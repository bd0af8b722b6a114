"""The probability mass that the student puts on what a tool's JSON Schema allows next.

In:  hidden states of the positions before argument tokens, the head, packed masks of the legal ids.
Out: TokenLoss: -log of the legal mass, summed. The logits exist for one chunk of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

from raykd.losses.head import ChunkedHead, HeadGradients, choose_chunk_rows, match_autocast
from raykd.types import Source, TokenLoss


def json_grammar_weight(source: Tensor) -> Tensor:
    """Weight [G] of argument tokens with known alternatives, from the Source of their sequences: 0 on the student's own."""
    return (source != Source.STUDENT).float()


def json_grammar_loss(
    hidden: Tensor,
    head_weight: Tensor,
    mask_index: Tensor,
    masks: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    num_valid_ids: int | None = None,
    chunk_rows: int | None = None,
) -> TokenLoss:
    """-log sum of q(v) over the legal ids v, nats: 0 where no mass is on an illegal one. Source: ours.

    Value and gradient are taken from the ratio of illegal to legal mass, and so are exact where the legal mass is nearly 1.
    The gradient is taken in the forward pass; the loss can be differentiated once.

    Args:
        hidden: [G, H] states at the position before each argument token: the input of the head.
        head_weight: [V, H].
        mask_index: [G] row of `masks` of each.
        masks: [U, W] int32: bit i%32 of word i//32 says that id i is legal. Ids beyond 32*W are not.
        weight: [G] from `json_grammar_weight`. A row of weight 0 contributes exactly 0 whatever its logits.
        bias, num_valid_ids, chunk_rows: as in `head_logprobs`.
    """
    hidden = match_autocast(hidden)
    weight = weight.detach()
    if not torch.is_grad_enabled():
        hidden, head_weight, bias = hidden.detach(), head_weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        rows = choose_chunk_rows(chunk_rows, hidden, head_weight)
        total = _GrammarLoss.apply(hidden, head_weight, bias, mask_index, masks, weight, rows, num_valid_ids)
    return TokenLoss(sum=total, count=weight.float().sum())


class _GrammarLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, bias, mask_index, masks, weight, chunk_rows, num_valid_ids):  # pyright: ignore[reportIncompatibleMethodOverride]
        head = ChunkedHead(hidden, head_weight, bias, chunk_rows, num_valid_ids)
        gradients = HeadGradients(head, *ctx.needs_input_grad[:3])
        total = hidden.new_zeros((), dtype=head.logits_dtype)
        if len(mask_index):
            for rows, logits in head.chunks():
                legal = _unpack(masks[mask_index[rows]], logits.shape[1])
                total += _illegal_mass_(logits, legal, weight[rows].to(logits.dtype))
                if any(ctx.needs_input_grad):
                    gradients.add(rows, logits)
        ctx.gradients = gradients.result()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.gradients is not None, "json_grammar_loss was differentiated a second time; its gradients are gone"
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(grad_total) for g in gradients), None, None, None, None, None


def _unpack(words: Tensor, size: int) -> Tensor:
    """Bits of words [c, W] as bool [c, size]."""
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    bits = bits.flatten(1)[:, :size].bool()
    return pad(bits, (0, size - bits.shape[1]))


def _illegal_mass_(logits: Tensor, legal: Tensor, weight: Tensor) -> Tensor:
    """Loss of a chunk, a scalar; its gradient overwrites the logits [c, V].

    With d = log(illegal mass / legal mass) the loss is log(1 + e^d), its gradient sigmoid(d) * (softmax of the illegal
    logits - softmax of the legal ones).
    """
    lowest = torch.finfo(logits.dtype).min  # instead of -inf: -inf - -inf would be NaN at padded ids
    log_legal = logits.masked_fill(~legal, -torch.inf).logsumexp(dim=1).clamp(min=lowest)
    log_illegal = logits.masked_fill(legal, -torch.inf).logsumexp(dim=1).clamp(min=lowest)
    log_ratio = (log_illegal - log_legal).masked_fill(weight == 0, -torch.inf)
    scale = weight * log_ratio.sigmoid()
    logits.sub_(torch.where(legal, log_legal[:, None], log_illegal[:, None])).exp_()
    logits.mul_(torch.where(legal, -scale[:, None], scale[:, None]))
    logits.masked_fill_((weight == 0)[:, None], 0.0)  # whatever their states are
    return (softplus(log_ratio).masked_fill(weight == 0, 0.0) * weight).sum()
