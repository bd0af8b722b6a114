"""How sure the teacher is, and kd weighted by it: most of the gradient where the teacher hesitates, some everywhere.

In:  the teacher's top-k log-probabilities and tail; LossConfig; the entropies of the first steps.
Out: entropy and weight per token; `EntropyCalibration`, the state that finds the range in which the weight rises.

Entropies of instruction-tuned models on their own text lie far below 1 nat, so a range taken from thin air would weigh
every token the same. It is measured: the 10th and the 90th percentile over the first steps. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raykd.loss_config import LossConfig
from raykd.types import Batch

_NUM_BINS = 128
_LEAST, _MOST = 1e-6, 16.0  # nats; bins of equal width in the logarithm: 14 % each
_PERCENTILES = (0.1, 0.9)


def teacher_entropy(topk_logprobs: Tensor, log_tail: Tensor) -> Tensor:
    """Entropy [N] in nats of the teacher's K ids [N, K] and its tail [N] as one more category.

    A lower bound of the entropy over the vocabulary: the truth is higher by at most exp(log_tail) * log(V - K). Entries of
    -inf count nothing; tokens without any teacher scores have entropy 0.
    """
    logprobs = torch.cat([topk_logprobs, log_tail[:, None]], dim=1)
    surprise = (-logprobs).masked_fill(logprobs == -torch.inf, 0.0)
    return (logprobs.exp() * surprise).sum(dim=1).clamp(min=0.0)


def entropy_weight(entropy: Tensor, low: float, high: float, floor: float) -> Tensor:
    """Weight [N] of tokens by the teacher's entropy [N]: `floor` up to `low`, 1 from `high` on, linear between (nats).

    A range without extent (all entropies alike) tells no tokens apart: the weight is 1.
    """
    if not low < high:
        return torch.ones_like(entropy)
    return floor + (1.0 - floor) * ((entropy - low) / (high - low)).clamp(0.0, 1.0)


def kd_weight(batch: Batch, config: LossConfig) -> Tensor:
    """Weight [N] of every response token in kd: 0 without teacher scores, else 1 or, with kd_entropy=token, by entropy.

    Without a range (`EntropyCalibration.applied` fills it in once it is known) the weight is 1.
    """
    weight = batch.has_teacher.float()
    if config.kd_entropy != "token" or config.kd_entropy_range is None:
        return weight
    entropy = teacher_entropy(batch.topk_logprobs, batch.log_tail)
    return weight * entropy_weight(entropy, *config.kd_entropy_range, config.kd_entropy_floor).float()


@dataclass(frozen=True)
class EntropyCalibration:
    """What is known of the teacher's entropies: a fixed histogram of the first steps, and a running mean.

    Every step: `measure` on each rank, sum over the ranks, `updated`; all ranks then hold the same state. It is part of the
    checkpoint: `dataclasses.asdict` makes JSON of it, and `EntropyCalibration(**...)` takes that back.
    """

    steps: int = 0  # steps that had teacher scores
    histogram: tuple[float, ...] = (0.0,) * _NUM_BINS  # tokens
    mean: float = 0.0  # running mean, nats

    def __post_init__(self) -> None:
        object.__setattr__(self, "histogram", tuple(self.histogram))  # JSON has lists

    def measure(self, batches: Iterable[Batch], config: LossConfig) -> dict[str, float]:
        """Sums over the tokens that the teacher scored in this rank's share of a step, by name; host tensors.

        The names are the same on every rank, also on one without batches. No names with kd_entropy=off.
        """
        if config.kd_entropy == "off":
            return {}
        scored = [teacher_entropy(b.topk_logprobs, b.log_tail)[b.has_teacher].double() for b in batches]
        entropy = torch.cat([torch.zeros(0, dtype=torch.float64), *scored])
        sums = {"entropy/sum": float(entropy.sum()), "entropy/count": float(len(entropy))}
        if self._is_calibrating(config):
            counts = torch.bincount(_bin(entropy), minlength=_NUM_BINS).tolist()
            sums |= {f"entropy/bin_{index:03d}": float(count) for index, count in enumerate(counts)}
        return sums

    def updated(self, sums: Mapping[str, Tensor | float], config: LossConfig) -> EntropyCalibration:
        """The state after a step whose `measure`, summed over all ranks, is `sums` (other names in it are ignored)."""
        if config.kd_entropy == "off" or not float(sums["entropy/count"]):
            return self
        now = float(sums["entropy/sum"]) / float(sums["entropy/count"])
        histogram = self.histogram
        if self._is_calibrating(config):
            histogram = tuple(have + float(sums[f"entropy/bin_{i:03d}"]) for i, have in enumerate(histogram))
        mean = config.kd_entropy_decay * self.mean + (1 - config.kd_entropy_decay) * now if self.steps else now
        return EntropyCalibration(self.steps + 1, histogram, mean)

    def range(self, config: LossConfig) -> tuple[float, float] | None:
        """Entropies between which the weight rises, nats: as configured, or as measured; None while measuring."""
        if config.kd_entropy_range is not None:
            return config.kd_entropy_range
        if self._is_calibrating(config):
            return None
        low, high = (_quantile(self.histogram, share) for share in _PERCENTILES)
        return low, high

    def applied(self, config: LossConfig) -> LossConfig:
        """The run's `config` as the losses of the next step need it; `measure` and `updated` take either of the two.

        The range is filled in once it is known; run: the weight kd is multiplied by the weight of the running mean.
        """
        known = self.range(config)
        if config.kd_entropy == "off" or known is None:
            return config
        update: dict[str, object] = {"kd_entropy_range": known}
        if config.kd_entropy == "run" and self.steps:
            mean = torch.tensor([self.mean], dtype=torch.float64)
            update["kd"] = config.kd * entropy_weight(mean, *known, config.kd_entropy_floor).item()
        return config.model_copy(update=update)

    def _is_calibrating(self, config: LossConfig) -> bool:
        return config.kd_entropy_range is None and self.steps < config.kd_entropy_calibration_steps


def _bin(entropy: Tensor) -> Tensor:
    """Bin of every entropy; the outermost take what is beyond."""
    place = (entropy.clamp(_LEAST, _MOST) / _LEAST).log() / math.log(_MOST / _LEAST)
    return (place * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)


def _quantile(histogram: tuple[float, ...], share: float) -> float:
    """Entropy below which that share of the tokens lies, nats; interpolated within its bin."""
    wanted, below = share * sum(histogram), 0.0
    for index, count in enumerate(histogram):
        if count and below + count >= wanted:
            position = (index + (wanted - below) / count) / _NUM_BINS
            return _LEAST * (_MOST / _LEAST) ** position
        below += count
    return 0.0
