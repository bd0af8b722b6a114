"""Losses on sets of ids at chosen tokens: the right tool among those offered, any continuation of a copy, wrong numbers.

In:  log-probabilities of the ids of each set [S, W] and of the written token [S], what each set is for.
Out: TokenLoss in nats; the count is the number of sets of the kind, known before any forward pass.

Sets on text that the student itself wrote count for nothing. Source: ours; unlikelihood after Welleck et al. (2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raykd.losses.head import head_logprobs
from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import SetKind, Source, TokenLoss


class SetLogprobs(NamedTuple):
    """What the student gives to the ids of S sets, nats."""

    sets: Tensor  # [S, W] of the ids; anything where not present
    present: Tensor  # [S, W] bool: an id of the set, at its first occurrence
    written: Tensor  # [S] of the written token


def set_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    set_ids: Tensor,
    written_ids: Tensor,
    *,
    bias: Tensor | None = None,
    num_valid_ids: int | None = None,
    chunk_rows: int | None = None,
) -> SetLogprobs:
    """Log-probabilities of sets of ids [S, W] (filled with -1) and of the written tokens [S].

    hidden [S, H] are the states before those tokens, head_weight [V, H]; the rest as in `head_logprobs`.
    """
    ids = torch.cat([set_ids.clamp(min=0), written_ids[:, None]], dim=1)
    logprobs, _ = head_logprobs(
        hidden,
        head_weight,
        ids,
        torch.zeros_like(ids, dtype=torch.bool),
        bias=bias,
        num_valid_ids=num_valid_ids,
        chunk_rows=chunk_rows,
    )
    return SetLogprobs(logprobs[:, :-1], distinct(set_ids), logprobs[:, -1])


def distinct(set_ids: Tensor) -> Tensor:
    """Which entries [S, W] are ids (not the filling -1) at their first occurrence in the row."""
    ordered, order = set_ids.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(first).scatter_(1, order, first & (ordered >= 0))


def id_set_weight(kind: Tensor, source: Tensor, wanted: SetKind) -> Tensor:
    """Weight [S]: 1 on sets of a kind, from the kind and the Source of the sequence of each."""
    return ((kind == wanted) & (source != Source.STUDENT)).float()


def tool_choice_loss(
    sets: Tensor, present: Tensor, written: Tensor, weight: Tensor, *, temperature: float = 1.0
) -> TokenLoss:
    """-log softmax of the written branch among the branches of all offered tools: a choice of tools, nothing else.

    Args:
        sets, present, written: see `SetLogprobs`; the written token is one of the set.
        weight: [S] from `id_set_weight(..., SetKind.TOOL_CHOICE)`, times the trust in the row's tool names.
        temperature: of the softmax.
    """
    present, written = _safe(present, weight), written.masked_fill(weight == 0, 0.0)
    return masked_sum(_logsumexp(sets / temperature, present) - written / temperature, weight)


def copy_mass_loss(sets: Tensor, present: Tensor, weight: Tensor) -> TokenLoss:
    """-log of the mass on all ids that go on with the copy. Arguments as in `tool_choice_loss`; `SetKind.COPY`."""
    return masked_sum(-_logsumexp(sets, _safe(present, weight)), weight)


def number_contradiction_loss(sets: Tensor, present: Tensor, weight: Tensor) -> TokenLoss:
    """Unlikelihood of every id that writes another number: -sum of log(1 - q). `SetKind.CONTRADICTION`."""
    return masked_sum(-log1mexp(sets.masked_fill(~_safe(present, weight), -torch.inf)).sum(dim=1), weight)


def _safe(present: Tensor, weight: Tensor) -> Tensor:
    """Of sets that do not count, nothing is present."""
    return present & (weight > 0)[:, None]


def _logsumexp(values: Tensor, present: Tensor) -> Tensor:
    """Over the present entries [S, W]; of an empty set 0, without a gradient."""
    if values.shape[1] == 0:
        return values.sum(dim=1)
    return values.masked_fill(~present, -torch.inf).logsumexp(dim=1).masked_fill(~present.any(dim=1), 0.0)
