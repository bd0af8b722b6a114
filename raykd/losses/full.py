"""Divergence over the whole vocabulary from the teacher's last hidden state, without either side's [N, V] logits.

In:  hidden states of student and teacher before each token, both LM heads, the teacher's final norm.
Out: TokenLoss in nats: that of `kd.dense_kd_loss` on the logits, chunk by chunk, its gradient taken on the way.

The teacher ships its state (H values a token) instead of its distribution; norm and head are applied here, next to the
student's. Four GEMMs in all: both logits, and the two of the student's gradient. The teacher gets none.
Source: ours; the chunks are those of `head.head_loss`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raykd.losses.head import ChunkedHead, HeadGradients, choose_chunk_rows, match_autocast
from raykd.losses.kd import Divergence, dense_kd_loss
from raykd.types import Batch, TokenLoss

_CHUNK_SHARE = 4
"""The divergence keeps several [chunk, V] at once: chunks of so much fewer rows than in `head_loss`."""


def full_kd_states(batch: Batch) -> Tensor:
    """The teacher's state [N, H] before each response token, of its last shipped layer; [N, 0] in a batch without states.

    Where there is none it is another token's, which `full_kd_weight` leaves out.
    """
    if not len(batch.state_index):
        return batch.teacher_hidden.new_empty(len(batch.response_index), 0)
    return batch.teacher_hidden[-1].index_select(0, _state_row(batch))


def full_kd_weight(batch: Batch) -> Tensor:
    """Weight [N], float32: 1 on tokens that the teacher scored and has a state before."""
    if not len(batch.state_index):
        return torch.zeros_like(batch.has_teacher, dtype=torch.float32)
    has_state = batch.state_index[_state_row(batch)] == batch.response_index - 1
    return (batch.has_teacher & has_state).float()


def _state_row(batch: Batch) -> Tensor:
    """Which of the M states [N] stands before each response token, if one does."""
    return torch.searchsorted(batch.state_index, batch.response_index - 1).clamp(max=len(batch.state_index) - 1)


def full_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_norm: nn.Module,
    teacher_weight: Tensor,
    weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    num_valid_ids: int | None = None,
    chunk_rows: int | None = None,
) -> TokenLoss:
    """Divergence of the two next-token distributions over all ids, multiplied by temperature squared.

    Args:
        student_hidden: [N, H], the input of the student's LM head.
        student_weight: [V, H]; `student_bias` [V] if it has one.
        teacher_hidden: [N, H_teacher] before the teacher's final norm, any float type; [N, 0] if no row has a state.
        teacher_norm: the teacher's final norm.
        teacher_weight: [V_teacher, H_teacher]; `teacher_bias` [V_teacher] if it has one. In its type the logits are made.
        weight: [N] per token; rows of weight 0 are not looked at, also inf and NaN.
        num_valid_ids: ids from here on are padding of the heads. None: all that both heads have.
        chunk_rows: rows of logits that exist at once; None chooses by device.

    Returns:
        The sum can be differentiated once: its gradients are made on the way and handed over, not copied.
    """
    unused = (weight == 0)[:, None]
    hidden = match_autocast(student_hidden.masked_fill(unused, 0.0))  # before any arithmetic: a masked NaN stays one
    if not torch.is_grad_enabled():  # a Function cannot tell: inside, gradients are always off
        hidden, student_weight = hidden.detach(), student_weight.detach()
        student_bias = None if student_bias is None else student_bias.detach()
    num_ids = min(len(student_weight), len(teacher_weight), num_valid_ids or len(student_weight))
    rows = chunk_rows or max(1, choose_chunk_rows(None, hidden, student_weight) // _CHUNK_SHARE)
    with torch.autocast(hidden.device.type, enabled=False):
        with torch.no_grad():
            if not teacher_hidden.shape[1]:
                teacher_hidden = teacher_weight.new_zeros(len(hidden), teacher_weight.shape[1])
            states = teacher_norm(teacher_hidden.to(teacher_weight.dtype).masked_fill(unused, 0.0))
            teacher = ChunkedHead(states.to(teacher_weight.dtype), teacher_weight, teacher_bias, rows, num_ids)

        def chunk_loss(student_logits: Tensor, teacher_logits: Tensor, rows: slice) -> Tensor:
            student, target = student_logits[:, :num_ids], teacher_logits[:, :num_ids].to(student_logits.dtype)
            options = {"divergence": divergence, "beta": beta, "temperature": temperature}
            return dense_kd_loss(student, target, weight[rows], **options).sum

        total = _FullLoss.apply(hidden, student_weight, student_bias, teacher, chunk_loss, rows, num_ids)
    return TokenLoss(sum=total, count=weight.detach().float().sum())


ChunkLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(student logits [c, V], teacher logits [c, V_teacher], the rows they are of) -> sum over the rows."""


class _FullLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher: ChunkedHead, chunk_loss: ChunkLoss, chunk_rows, num_ids):  # pyright: ignore[reportIncompatibleMethodOverride]
        head = ChunkedHead(hidden, weight, bias, chunk_rows, num_ids)
        needs_gradient = any(ctx.needs_input_grad)
        gradients = HeadGradients(head, *ctx.needs_input_grad[:3])
        losses = []
        for (rows, logits), (_, teacher_logits) in zip(head.chunks(), teacher.chunks(), strict=True):
            with torch.set_grad_enabled(needs_gradient):
                logits = logits.detach().requires_grad_(needs_gradient)
                loss = chunk_loss(logits, teacher_logits, rows)
            losses.append(loss.detach())
            if needs_gradient:
                gradients.add(rows, torch.autograd.grad(loss, logits)[0])
        ctx.gradients = gradients.result()
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.gradients is not None, "full_kd_loss was differentiated a second time; its gradients were handed over"
        # Dropping our reference lets autograd keep dW as weight.grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None
