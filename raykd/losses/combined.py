"""Distillation on plain tensors, for training loops of one's own: dense logits in, one scalar out.

In:  the student's logits, labels, what is known of the teacher (logits or top-k), masks of tool names, arguments, copies.
Out: each loss that is on, as a mean over its tokens, and their weighted total, ready for backward.

The numbers are those of `losses/combine.py`, which raykd's own loop uses because it never forms the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from raykd.losses.cross_entropy import ce_teacher_weight, ce_truth_weight
from raykd.losses.kd import Divergence, Support, dense_kd_loss, sparse_kd_loss
from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import Source, TokenLoss

IGNORE = -100
"""Label of a token that is not supervised."""

_BY_MASK = ("tool_name", "json_argument", "integration_copy")
_OF_LOGITS = ("kd", "ce_teacher", "ce_truth", *_BY_MASK)


def combined_kd_loss(
    student_logits: Tensor,
    labels: Tensor,
    weights: Mapping[str, float],
    *,
    source: Tensor | Source = Source.TEACHER,
    masks: Mapping[str, Tensor] | None = None,
    teacher_logits: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    log_tail: Tensor | None = None,
    others: Mapping[str, TokenLoss] | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    support: Support = "topk_tail",
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The weighted sum of some losses, under "total" (scalar with graph), and each of them under its name (detached).

    Each is a mean over its own tokens, in nats, and exactly 0 where it has none. Column t of all tensors of tokens (labels,
    masks, topk_ids, topk_logprobs, log_tail) describes token t; logits are as models give them: column t predicts t+1.

    Args:
        student_logits: [B, T, V]. With `teacher_logits` both are compared over the whole vocabulary.
        labels: int64 [B, T], the token ids; -100 on tokens that are not supervised (prompts, tool results, padding, slots).
        weights: by name: kd, ce_teacher, ce_truth, tool_name, json_argument, integration_copy, and those of `others`.
            A weight of 0 or less switches a loss off.
        source: Source of each sequence [B], or of all. ce_teacher looks at TEACHER, ce_truth at GOLD, the losses on masks
            at both; on text of the STUDENT there is kd and nothing else.
        masks: [B, T] bool, or float weights, by name: the tokens of tool_name, json_argument and integration_copy; also
            `kd`, where only some tokens have teacher logits.
        teacher_logits: [B, T, V]; -inf where an id does not exist.
        topk_ids, topk_logprobs: [B, T, K] instead, log-probabilities over the vocabulary at temperature 1; -inf marks a
            missing entry, and a token without any has no kd.
        log_tail: [B, T], log of the teacher's mass outside the K. None: what is missing to 1.
        others: further losses as `raykd.losses` computes them, such as `halt_head_loss`.
        divergence, beta, support, temperature: see `sparse_kd_loss` and `dense_kd_loss`.

    Raises:
        ValueError: kd without teacher data, a loss on a mask without the mask, an unknown name, no loss at all, shapes that
            do not fit, and a total that is not finite (looking at it makes the host wait for the device).
    """
    active = {name: weight for name, weight in weights.items() if weight > 0}
    masks, others = masks or {}, others or {}
    _check(active, student_logits, labels, masks, others)
    rows = _Rows(labels[:, 1:] != IGNORE)
    student = rows.of_logits(student_logits).to(torch.promote_types(student_logits.dtype, torch.float32))
    label_logprobs = student.log_softmax(dim=1).gather(1, rows.of_tokens(labels)[:, None])[:, 0]
    author = torch.as_tensor(source, device=labels.device)
    author = rows.of_tokens((author[:, None] if author.ndim else author).expand(labels.shape))
    token_weights = {"ce_teacher": ce_teacher_weight(author), "ce_truth": ce_truth_weight(author)}
    token_weights |= {name: rows.of_tokens(masks[name]) * (author != Source.STUDENT) for name in _BY_MASK if name in masks}
    parts = {name: others[name] for name in active if name in others}
    parts |= {name: masked_sum(-label_logprobs, token_weights[name]) for name in active.keys() & token_weights.keys()}
    if "kd" in active:
        counted = rows.of_tokens(masks.get("kd", torch.ones_like(labels))).float()
        options = {"divergence": divergence, "beta": beta, "temperature": temperature}
        if teacher_logits is not None:
            parts["kd"] = dense_kd_loss(student, rows.of_logits(teacher_logits), counted, **options)
        elif topk_ids is not None and topk_logprobs is not None:
            tail = None if log_tail is None else rows.of_tokens(log_tail)
            scores = rows.of_tokens(topk_ids), rows.of_tokens(topk_logprobs), tail
            parts["kd"] = _topk_kd(student, *scores, counted, support=support, **options)
        else:
            raise ValueError(
                f"weights['kd']={active['kd']} but there is no teacher: found neither teacher_logits nor topk_ids with "
                "topk_logprobs; give one of them, or set the weight to 0"
            )
    return _total({name: parts[name].mean() for name in active}, active)


class _Rows(NamedTuple):
    """The N supervised tokens of a batch, and the logits that predict them: the one shift."""

    kept: Tensor  # bool [B, T-1]

    def of_tokens(self, values: Tensor) -> Tensor:
        """[B, T, ...] about tokens -> [N, ...]."""
        return values[:, 1:][self.kept]

    def of_logits(self, logits: Tensor) -> Tensor:
        """[B, T, V] -> [N, V]."""
        return logits[:, :-1][self.kept]


def _topk_kd(
    student: Tensor, ids: Tensor, logprobs: Tensor, log_tail: Tensor | None, weight: Tensor, *, support: Support, **options
) -> TokenLoss:
    """Divergence at the teacher's K ids [N, K], of student logits [N, V]."""
    present = logprobs > -torch.inf
    weight = weight * present.any(dim=1)
    log_q = student.log_softmax(dim=1)
    inside = torch.zeros(log_q.shape, dtype=torch.int32, device=ids.device).scatter_add_(1, ids, present.int()) > 0
    student_tail = log_q.masked_fill(inside, -torch.inf).logsumexp(dim=1)
    if log_tail is None:
        log_tail = log1mexp(logprobs.float().logsumexp(dim=1)) if ids.shape[1] else logprobs.new_zeros(len(ids))
    return sparse_kd_loss(log_q.gather(1, ids), student_tail, logprobs, log_tail, weight, support=support, **options)


def _check(
    active: Mapping[str, float],
    student_logits: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor],
    others: Mapping[str, TokenLoss],
) -> None:
    if not active:
        raise ValueError("every weight is 0 or less: set at least one above 0")
    unknown = sorted(active.keys() - {*_OF_LOGITS, *others})
    if unknown:
        raise ValueError(
            f"weights has {unknown[0]!r}; expected {', '.join(_OF_LOGITS)}, or the name of a loss given in `others`"
        )
    if student_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"student_logits are {list(student_logits.shape)}, labels {list(labels.shape)}; expected the same B, T"
        )
    for name in _BY_MASK:
        if name in active and name not in masks and name not in others:
            raise ValueError(f"weights[{name!r}]={active[name]} without masks[{name!r}]: which tokens is it about?")
    for name, mask in masks.items():
        if mask.shape != labels.shape:
            raise ValueError(f"masks[{name!r}] is {list(mask.shape)}; expected {list(labels.shape)}, the shape of labels")


def _total(means: Mapping[str, Tensor], active: Mapping[str, float]) -> dict[str, Tensor]:
    total = torch.stack([active[name] * mean for name, mean in means.items()]).sum()
    if not torch.isfinite(total):
        values = ", ".join(f"{name}={mean.item():g}" for name, mean in means.items())
        raise ValueError(f"the total is {total.item():g}; expected a finite number, look for the cause in {values}")
    return {"total": total} | {name: mean.detach() for name, mean in means.items()}
