"""The student as the run began, frozen: what preferences between two responses, and self_kd, compare with.

In:  the frozen student (deterministic in config and seed, so that a resumed run makes the same), the batches of a step on
     the host. Out: these batches, with the log-probability of every response that is in a pair.

A response counts in a preference where the log-probability is known, so that the tokens of a step can only be counted
behind this: the numbers of all micro-batches come to the host in one transfer. Batches without pairs cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raykd.config import Config
from raykd.losses.code_mode import sequence_logprobs
from raykd.losses.head import head_logprobs
from raykd.losses.sweep import sequence_of_token
from raykd.student.model import Student
from raykd.types import Batch


def needs_reference(config: Config) -> bool:
    """Whether a loss compares with the student as the run began: then every worker holds a second, frozen one."""
    if config.simulates("step"):
        return False
    return has_pairs(config) or "self_kd" in config.loss.weights


def has_pairs(config: Config) -> bool:
    """Whether pairs of responses may be compared."""
    return "code_mode_preference" in config.loss.weights and bool(config.data.offline)


@torch.no_grad()
def with_reference(
    reference: Student,
    batches: Sequence[Batch],
    autocast: contextlib.AbstractContextManager[object],
    num_passes: Callable[[int], int] = lambda own: own,
) -> list[Batch]:
    """The batches with `reference_logprob` of all sequences in pairs. `autocast`: the precision of the training pass.

    `num_passes`: forward passes that are to be made, of those that are needed here: more where others need them.
    """
    paired = [index for index, batch in enumerate(batches) if batch.pair.any()]
    num_idle = num_passes(len(paired)) - len(paired)
    with autocast:
        logprobs = [_pair_logprobs(reference, batches[index]) for index in paired]
        for _ in range(num_idle):
            reference(torch.zeros(1, 1, dtype=torch.int64, device=reference.head_weight.device))
    if not paired:
        return list(batches)
    known = dict(zip(paired, torch.cat(logprobs).cpu().split([len(part) for part in logprobs]), strict=True))
    filled = []
    for index, batch in enumerate(batches):
        if index in known:
            column = torch.full(batch.pair.shape, torch.nan).masked_scatter(batch.pair != 0, known[index])
            batch = replace(batch, reference_logprob=column)
        filled.append(batch)
    return filled


def _pair_logprobs(reference: Student, batch: Batch) -> Tensor:
    """Log-probability of the response of each sequence in a pair, in order, on the device of the reference."""
    device, width = reference.head_weight.device, batch.input_ids.shape[1]
    in_pair = batch.pair != 0
    rows = sequence_of_token(batch)
    counted = in_pair[rows]
    rows_of_pairs = (in_pair.cumsum(0) - 1)[rows[counted]]  # among the sequences in pairs: the others are left out
    before = rows_of_pairs * width + batch.response_index[counted] % width - 1
    input_ids = batch.input_ids[in_pair]
    hidden = reference(input_ids.to(device), latent_width=reference.latent_width(input_ids)).hidden
    labels = batch.response_ids[counted][:, None].to(device)
    logprobs, _ = head_logprobs(
        hidden.flatten(0, 1).index_select(0, before.to(device)),
        reference.head_weight,
        labels,
        torch.zeros_like(labels, dtype=torch.bool),
        bias=reference.head_bias,
        num_valid_ids=reference.num_valid_ids,
    )
    everyone = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    return sequence_logprobs(logprobs[:, 0], rows_of_pairs.to(device), everyone)
