"""The loss of a micro-batch: every active part, most of them on one sweep through the LM head.

In:  Batch, StudentOutput, the head's weight, LossConfig, a LossContext, and the counts of the whole optimizer step.
Out: LossReport.

The one shift is here: token t is predicted by the hidden state at t-1. The one division too: each part is divided by its
count over the whole step (all micro-batches and ranks), which `loss_counts` gives before any forward pass, so that the sum
of the totals is the loss of the step however it was split.

Parts that are sums over tokens run in the sweep (`sweep.py`). Parts that need wide sets of ids at few tokens, all tokens of
a sequence at once, or no head at all, follow on their own rows (`beside.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raykd.loss_config import LossConfig
from raykd.losses.beside import beside_counts, beside_sums
from raykd.losses.code_mode import eligible_share
from raykd.losses.context import Head, LossContext
from raykd.losses.head import HeadRows, head_loss
from raykd.losses.reduction import divide
from raykd.losses.sweep import (
    metric_values,
    metric_weights,
    sequence_of_token,
    sweep_columns,
    sweep_counts,
    sweep_parts,
    sweep_weights,
)
from raykd.types import Batch, LossReport, StudentOutput, TokenLoss


def loss_counts(batch: Batch, config: LossConfig, context: LossContext = LossContext()) -> dict[str, Tensor]:  # noqa: B008 (frozen)
    """Count (float32 scalar) of each active loss in this micro-batch, from the batch alone: no forward pass needed.

    Summed over the micro-batches and ranks of an optimizer step, they are the `counts` of `combine`.
    """
    return _counts(batch, config, sweep_weights(batch, config, context))


def _counts(batch: Batch, config: LossConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    counts = sweep_counts(batch, weights) | beside_counts(batch, config)
    return {name: counts[name] for name in config.terms}


def _graph_only(rows: HeadRows) -> Tensor:
    """0 with the graph of the rows; the tail of a whole vocabulary is -inf."""
    return rows.log_tail.masked_fill(rows.log_tail == -torch.inf, 0.0).sum() * 0.0


def combine(
    batch: Batch,
    output: StudentOutput,
    head: Head,
    config: LossConfig,
    counts: Mapping[str, Tensor],
    context: LossContext = LossContext(),  # noqa: B008 (frozen)
    *,
    chunk_rows: int | None = None,
) -> LossReport:
    """All active losses of a micro-batch, ready for backward. Under `torch.no_grad` it evaluates only.

    Args:
        head: of the student.
        counts: per active loss, the count of the whole optimizer step.
        context: what losses need besides batch and config; the default serves those that need nothing.
        chunk_rows: rows of logits that exist at once; None chooses by device.

    Metrics: see `metric_weights`; with code_mode_preference also the share of eligible sequences.
    """
    hidden = output.hidden.flatten(0, 1).index_select(0, batch.response_index - 1)
    ids, support = sweep_columns(batch, config, context)
    weights, of_metrics = sweep_weights(batch, config, context), metric_weights(batch, config)
    terms = config.terms

    def rows_loss(rows: HeadRows) -> tuple[Tensor, Tensor]:
        parts = sweep_parts(rows, batch, config, context, weights)
        weighted = [terms[name] * divide(part.sum, counts[name]) for name, part in parts.items()]
        total = torch.stack(weighted).sum() if weighted else _graph_only(rows)
        with torch.no_grad():
            metrics = metric_values(rows, batch, of_metrics)
            sums = [part.sum for part in parts.values()] + [metrics[name].sum for name in of_metrics]
        return total, torch.stack(sums).detach()

    total, swept = head_loss(
        hidden, head.weight, ids, support, rows_loss, bias=head.bias, chunk_rows=chunk_rows, num_valid_ids=head.num_valid_ids
    )
    sums = dict(zip((*weights, *(f"metric/{name}" for name in of_metrics)), swept.unbind(), strict=True))
    for name, value in beside_sums(batch, output, hidden, head, config, context).items():
        total = total + terms[name] * divide(value, counts[name])
        sums[name] = value.detach()
    own_counts = _counts(batch, config, weights)
    metrics = {name: TokenLoss(sums[f"metric/{name}"], weight.sum()) for name, weight in of_metrics.items()}
    if "code_mode_preference" in config.weights:
        author, rows = batch.response_source, sequence_of_token(batch)
        metrics["code_mode_eligible"] = eligible_share(batch.response_marks, author, rows, len(batch.uid))
    parts = {name: TokenLoss(sums[name], own_counts[name]) for name in config.terms}
    return LossReport(total=total, parts=parts, metrics=metrics)
