"""Sums between two log entries, and the entry they make.

In:  LossReports (tensors on the device) and numbers of the rows (host). Out: metrics by name, as in metrics.jsonl.

Nothing is brought to the host before an entry is due: one transfer then, and one message between the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from raykd.training.ranks import Ranks
from raykd.types import LossReport

Sums = dict[str, Tensor]


def add_report(sums: Sums, report: LossReport) -> None:
    """Add the loss of a micro-batch to `sums`, on its device: total, and sum and count of every part and metric."""
    _add(sums, "total", report.total.detach())
    for kind, losses in (("loss", report.parts), ("metric", report.metrics)):
        for name, loss in losses.items():
            _add(sums, f"{kind}/{name}", loss.sum)
            _add(sums, f"{kind}_count/{name}", loss.count)


def _add(sums: Sums, name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


class Meters:
    """What the steps since the last log entry amount to, on this rank."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self._start = time.perf_counter()
        self._sums: Sums = {}
        self._numbers: dict[str, float] = {}

    def add_losses(self, sums: Sums) -> None:
        """Take in the losses of a step that was made (not of one that was skipped)."""
        self.steps += 1
        for name, value in sums.items():
            _add(self._sums, name, value)

    def add_numbers(self, numbers: Mapping[str, Tensor]) -> None:
        """Take in what a step's rows amount to over all ranks (tensors of the host)."""
        for name, value in numbers.items():
            self._numbers[name] = self._numbers.get(name, 0.0) + value.item()

    def read(self, ranks: Ranks, weights: Mapping[str, float]) -> dict[str, float]:
        """Metrics over all ranks since the last `clear`. Collective."""
        seconds = time.perf_counter() - self._start
        sums = {name: value.item() for name, value in ranks.sum(to_host(self._sums)).items()} | self._numbers
        steps = max(self.steps, 1)
        entry = mean_losses(sums, weights, steps)
        if "grad_norm" in sums:
            entry["grad_norm"] = sums["grad_norm"] / steps
        entry["speed/student_tokens_per_s"] = sums.get("tokens", 0.0) / seconds
        entry["speed/teacher_tokens_per_s"] = sums.get("teacher_tokens", 0.0) / seconds
        # Ranks wait for the teacher at the same time: their mean is the time of the run.
        entry["wait/teacher_s"] = sums.get("wait/teacher_s", 0.0) / ranks.world_size / steps
        entry["wait/trainer_s"] = sums.get("wait/trainer_s", 0.0) / steps
        entry["seconds"] = seconds / steps
        if num_rollouts := sums.get("rollouts", 0.0):
            entry["reward"] = sums["reward"] / num_rollouts
            entry["rollout_length"] = sums["rollout_tokens"] / num_rollouts
        return entry


def to_host(sums: Sums) -> dict[str, float]:
    """Bring many scalars over in one transfer."""
    if not sums:
        return {}
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))


def mean_losses(sums: Mapping[str, float], weights: Mapping[str, float], steps: int) -> dict[str, float]:
    """loss/total per step; every part's mean in nats, its count and its share of the total; the mean of every metric.

    A part or metric without a single token has no mean and is left out; its count says 0.
    """
    entry: dict[str, float] = {}
    if "total" in sums:
        entry["loss/total"] = sums["total"] / steps
    for name in weights:
        count = sums.get(f"loss_count/{name}", 0.0)
        entry[f"count/{name}"] = count
        if count > 0:
            entry[f"loss/{name}"] = sums[f"loss/{name}"] / count
    total = sum(weight * entry.get(f"loss/{name}", 0.0) for name, weight in weights.items())
    for name, weight in weights.items():
        if total > 0 and f"loss/{name}" in entry:
            entry[f"share/{name}"] = weight * entry[f"loss/{name}"] / total
    for key, value in sums.items():
        name = key.removeprefix("metric/")
        if name != key and (count := sums[f"metric_count/{name}"]) > 0:
            entry[_metric_key(name)] = value / count
    return entry


def _metric_key(name: str) -> str:
    """`tool_name_accuracy` -> `accuracy/tool_name`; others keep their name."""
    what = name.removesuffix("_accuracy")
    return name if what == name else f"accuracy/{what}"
