"""What validation says of the heads: do their probabilities rank rightly, and do they mean what they say.

In:  what the halt and the self-evaluation head give while the student walks over batches, and the targets in these.
Out: metrics by name, over all ranks. What the data cannot tell (no target, one class only, a constant score) is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from raykd.student.calibration import accuracy, brier, correlation, expected_calibration_error, roc_auc
from raykd.student.model import Student
from raykd.training.ranks import Ranks
from raykd.types import Batch, StudentOutput


@dataclass(frozen=True)
class HeadReadings:
    """Probabilities that the heads gave, one tensor per forward pass, on the student's device; empty without the head."""

    halt: list[Tensor] = field(default_factory=list)  # float32 [D] of halting at each decision point
    quality: list[Tensor] = field(default_factory=list)  # float32 [B] estimate of each response's quality


@contextlib.contextmanager
def read_heads(student: Student) -> Iterator[HeadReadings]:
    """Keep what the heads give in every forward pass within the block."""
    readings = HeadReadings()

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: StudentOutput) -> None:
        if output.halt_logits is not None:
            readings.halt.append(output.halt_logits.detach().float().softmax(dim=-1)[:, 1])
        if output.quality_logits is not None:
            readings.quality.append(output.quality_logits.detach().float().sigmoid())

    handle = student.register_forward_hook(keep)
    try:
        yield readings
    finally:
        handle.remove()


def head_metrics(
    readings: HeadReadings, batches: Sequence[Batch], halt_probability: float, ranks: Ranks
) -> dict[str, float]:
    """Metrics of the heads over the batches of all ranks; on ranks other than 0 none. Collective.

    Args:
        batches: those that were read, on the host and in that order.
        halt_probability: from where on the halt head halts (`halt.halt_probability`).
    """
    gathered = ranks.gather(
        (
            _with_targets(readings.halt, [batch.halt_targets for batch in batches]),
            _with_targets(readings.quality, [batch.quality for batch in batches]),
        )
    )
    if not gathered:
        return {}
    halt, quality = (np.concatenate(parts, axis=1) for parts in zip(*gathered, strict=True))
    metrics: dict[str, float] = {}
    if not np.isnan(halt[0]).any():  # else validation/loss/halt is no number either, and says so
        metrics["halt_auc"] = roc_auc(*halt)
        metrics["halt_ece"] = expected_calibration_error(*halt)
        metrics["halt_brier"] = brier(*halt)
        metrics["halt_accuracy"] = accuracy(*halt, threshold=halt_probability)
    if not np.isnan(quality[0]).any():
        metrics["self_evaluation_correlation"] = correlation(*quality)
        metrics["self_evaluation_ece"] = expected_calibration_error(*quality)
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _with_targets(probabilities: list[Tensor], targets: list[Tensor]) -> np.ndarray:
    """Probabilities and targets on the host, float32 [2, number of them], in one transfer; [2, 0] without the head."""
    if not probabilities:
        return np.empty((2, 0), np.float32)
    return torch.stack([torch.cat(probabilities).cpu(), torch.cat(targets)]).numpy()
