"""The loss of a micro-batch: every active part on one sweep through the LM head.

In:  Batch, the student's hidden states, the head's weight, LossConfig, and the token counts of the whole optimizer step.
Out: LossReport.

The one shift is here: token t is predicted by the hidden state at t-1. The one division too: each part is divided by its
count over the whole step (all micro-batches and ranks), which `loss_counts` gives before any forward pass, so that the sum
of the totals is the loss of the step however it was split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raykd.config import LossConfig
from raykd.losses import cross_entropy
from raykd.losses.head import HeadRows, head_loss
from raykd.losses.kd import sparse_kd_loss
from raykd.losses.reduction import divide, masked_sum
from raykd.types import ARGUMENT_MARKS, Batch, LossReport, Mark, Source, StudentOutput, TokenLoss

_METRICS = (
    "tool_name_accuracy",
    "json_argument_accuracy",
    "response_accuracy",
    "response_nll",
    "teacher_agreement",
    "teacher_kl",
    "teacher_topk_mass",
    "student_topk_mass",
)


def loss_counts(batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Count (float32 scalar) of each active loss in this micro-batch, from the batch alone: no forward pass needed.

    Summed over the micro-batches and ranks of an optimizer step, they are the `counts` of `combine`.
    """
    return {name: weight.sum() for name, weight in _token_weights(batch, config).items()}


def combine(
    batch: Batch,
    output: StudentOutput,
    head_weight: Tensor,
    config: LossConfig,
    counts: Mapping[str, Tensor],
    *,
    head_bias: Tensor | None = None,
    num_valid_ids: int | None = None,
    chunk_rows: int | None = None,
) -> LossReport:
    """All active losses of a micro-batch, in nats, ready for backward. Under `torch.no_grad` it evaluates only.

    Args:
        head_weight: [V, H] of the LM head; `head_bias` [V] if it has one.
        counts: per active loss, the count of the whole optimizer step.
        num_valid_ids: size of the vocabulary where the head has padding rows.
        chunk_rows: rows of logits that exist at once; None chooses by device.

    Metrics, each (sum, count) over response tokens: tool_name_accuracy, json_argument_accuracy, response_accuracy (the
    student's most likely token is the written one; ties count), response_nll (of the written tokens), teacher_agreement
    (the most likely tokens are the same), teacher_kl (forward KL with tail bucket, whatever the losses), teacher_topk_mass
    and student_topk_mass (on the teacher's K ids).
    """
    hidden = output.hidden.flatten(0, 1).index_select(0, batch.response_index - 1)
    labels = batch.response_ids
    # Columns 0..K-1 are the teacher's ids, column K is the written token, which may be one of them.
    ids = torch.cat([batch.topk_ids, labels[:, None]], dim=1)
    support = torch.nn.functional.pad(batch.topk_logprobs > -torch.inf, (0, 1), value=False)
    weights = _token_weights(batch, config)
    metric_weights = _metric_weights(batch)

    def rows_loss(head: HeadRows) -> tuple[Tensor, Tensor]:
        parts = _parts(head, batch, config, weights)
        total = torch.stack([config.weights[name] * divide(part.sum, counts[name]) for name, part in parts.items()])
        with torch.no_grad():
            metrics = _metric_values(head, batch, metric_weights)
            sums = [part.sum for part in parts.values()] + [metrics[name].sum for name in _METRICS]
        return total.sum(), torch.stack(sums).detach()

    total, sums = head_loss(
        hidden, head_weight, ids, support, rows_loss,
        bias=head_bias, chunk_rows=chunk_rows, num_valid_ids=num_valid_ids,
    )  # fmt: skip
    all_weights = weights | metric_weights
    losses = {
        name: TokenLoss(sum=value, count=all_weights[name].sum())
        for name, value in zip((*weights, *_METRICS), sums.unbind(), strict=True)
    }
    return LossReport(
        total=total,
        parts={name: losses[name] for name in weights},
        metrics={name: losses[name] for name in _METRICS},
    )


def _token_weights(batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Weight [N] of every response token in every active loss, by loss name."""
    marks, source = batch.response_marks, batch.response_source
    weights = {
        "kd": batch.has_teacher.float(),
        "ce_teacher": (
            cross_entropy.ce_teacher_weight(source)
            if config.ce_teacher_target == "sampled"
            else cross_entropy.ce_teacher_argmax_weight(source, batch.has_teacher)
        ),
        "ce_truth": cross_entropy.ce_truth_weight(source),
        "tool_name": cross_entropy.tool_name_weight(marks, source),
        "json_argument": cross_entropy.json_argument_weight(
            marks,
            source,
            structure_weight=config.json_structure_weight,
            key_weight=config.json_key_weight,
            value_weight=config.json_value_weight,
        ),
        "integration_copy": cross_entropy.integration_copy_weight(marks, source),
    }
    return {name: weights[name] for name in config.weights}


def _parts(head: HeadRows, batch: Batch, config: LossConfig, weights: Mapping[str, Tensor]) -> dict[str, TokenLoss]:
    """The active losses on the rows of one chunk."""
    label_logprobs = head.logprobs[:, -1]
    parts = {}
    for name, token_weight in weights.items():
        weight = token_weight[head.rows]
        if name == "kd":
            parts[name] = sparse_kd_loss(
                head.logprobs[:, :-1],
                head.log_tail,
                batch.topk_logprobs[head.rows],
                batch.log_tail[head.rows],
                weight,
                divergence=config.kd_divergence,
                beta=config.kd_beta,
                support=config.kd_support,
                temperature=config.kd_temperature,
            )
        elif name == "ce_teacher" and config.ce_teacher_target == "argmax":
            parts[name] = masked_sum(-_at_teacher_argmax(head, batch), weight)
        else:
            parts[name] = masked_sum(-label_logprobs, weight)
    return parts


def _metric_weights(batch: Batch) -> dict[str, Tensor]:
    """Weight [N] of every response token in every metric. Tokens the student wrote are no targets."""
    marks, has_teacher = batch.response_marks, batch.has_teacher.float()
    target = (batch.response_source != Source.STUDENT).float()
    return {
        "tool_name_accuracy": target * ((marks & int(Mark.TOOL_NAME)) != 0),
        "json_argument_accuracy": target * ((marks & int(ARGUMENT_MARKS)) != 0),
        "response_accuracy": target,
        "response_nll": target,
        "teacher_agreement": has_teacher,
        "teacher_kl": has_teacher,
        "teacher_topk_mass": has_teacher,
        "student_topk_mass": has_teacher,
    }


def _metric_values(head: HeadRows, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, TokenLoss]:
    label_logprobs = head.logprobs[:, -1]
    teacher_logprobs, teacher_tail = batch.topk_logprobs[head.rows], batch.log_tail[head.rows]
    is_label = (label_logprobs >= head.top_logprob).float()
    values = {
        "tool_name_accuracy": is_label,
        "json_argument_accuracy": is_label,
        "response_accuracy": is_label,
        "response_nll": -label_logprobs,
        "teacher_agreement": (_at_teacher_argmax(head, batch) >= head.top_logprob).float(),
        "teacher_topk_mass": teacher_logprobs.exp().sum(dim=1),
        "student_topk_mass": -head.log_tail.expm1(),
    }
    metrics = {name: masked_sum(value, weights[name][head.rows]) for name, value in values.items()}
    metrics["teacher_kl"] = sparse_kd_loss(
        head.logprobs[:, :-1], head.log_tail, teacher_logprobs, teacher_tail, weights["teacher_kl"][head.rows]
    )
    return metrics


def _at_teacher_argmax(head: HeadRows, batch: Batch) -> Tensor:
    """Student log-probability [c] of the teacher's most likely id; of the written token in a batch without a teacher."""
    if batch.topk_ids.shape[1] == 0:
        return head.logprobs[:, -1]
    best = batch.topk_logprobs[head.rows].argmax(dim=1, keepdim=True)
    return head.logprobs.gather(1, best)[:, 0]
