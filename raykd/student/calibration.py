"""How far the heads can be trusted: do their probabilities rank rightly, do they mean what they say, what do they cost.

In:  probabilities and targets as NumPy arrays. Out: numbers; NaN where the data cannot tell. A target of NaN is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def roc_auc(probability: np.ndarray, target: np.ndarray) -> float:
    """Probability that a positive is ranked above a negative, ties counting half (Mann-Whitney).

    Args:
        probability: [D]; only its order matters.
        target: [D] in [0, 1]; positive from 0.5 on.

    NaN without positives or without negatives.
    """
    probability, target = _known(probability, target)
    positive = target >= 0.5
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, group, size = np.unique(probability, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[group]  # 1-based, ties share the mean of their ranks
    return float((rank[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def brier(probability: np.ndarray, target: np.ndarray) -> float:
    """Mean squared difference (Brier, 1950) between probability [D] and target [D] in [0, 1]."""
    probability, target = _known(probability, target)
    return float(((probability - target) ** 2).mean()) if len(target) else float("nan")


def accuracy(probability: np.ndarray, target: np.ndarray, *, threshold: float = 0.5) -> float:
    """Share of points where probability [D] reaches `threshold` just where target [D] reaches 0.5."""
    probability, target = _known(probability, target)
    return float(((probability >= threshold) == (target >= 0.5)).mean()) if len(target) else float("nan")


def expected_calibration_error(probability: np.ndarray, target: np.ndarray, *, num_bins: int = 10) -> float:
    """Mean distance between what was said and what came true, over bins of equal width (Naeini et al., 2015).

    Args:
        probability: [D] in [0, 1].
        target: [D] in [0, 1].
    """
    probability, target = _known(probability, target)
    if not len(target):
        return float("nan")
    bins = np.minimum((probability * num_bins).astype(np.int64), num_bins - 1)
    gap = np.bincount(bins, probability - target, minlength=num_bins)
    return float(np.abs(gap).sum() / len(target))


def correlation(score: np.ndarray, target: np.ndarray) -> float:
    """Pearson's r between a head's score [B] and the quality [B]; NaN where either is constant."""
    score, target = _known(score, target)
    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(target) == 0:
        return float("nan")
    return float(np.corrcoef(score, target)[0, 1])


class HaltingCost(NamedTuple):
    """What halting by the head costs and saves, against halting where the targets say; means over refinements."""

    loops: float  # that the head lets run
    oracle_loops: float  # up to the first target that halts
    quality_lost: float  # score of the oracle's draft less that of the head's; above 0: halted too early (or on a bad draft)


def halting_cost(
    halt_probability: np.ndarray, scores: np.ndarray, targets: np.ndarray, num_loops: np.ndarray, *, threshold: float = 0.5
) -> HaltingCost:
    """Compare the head's halting with the rule's on recorded refinements. For a tier of its own, pass its rows.

    Args:
        halt_probability: [B, K] of the head after each loop.
        scores: [B, K] judge scores; NaN: not judged.
        targets: [B, K] of data/halt_targets.py `halt_targets`; NaN does not halt.
        num_loops: int [B] recorded loops, at least 1: neither can halt later.
        threshold: `halt.halt_probability`.
    """
    if not len(num_loops):
        return HaltingCost(*[float("nan")] * 3)
    by_head = _first(halt_probability >= threshold, num_loops)
    oracle = _first(targets >= 0.5, num_loops)
    rows = np.arange(len(num_loops))
    lost = scores[rows, oracle] - scores[rows, by_head]
    known = ~np.isnan(lost)
    return HaltingCost(
        loops=float((by_head + 1).mean()),
        oracle_loops=float((oracle + 1).mean()),
        quality_lost=float(lost[known].mean()) if known.any() else float("nan"),
    )


def _first(halts: np.ndarray, num_loops: np.ndarray) -> np.ndarray:
    """Index [B] of the first loop that halts, or of the last recorded one."""
    last = np.asarray(num_loops) - 1
    halts = halts | (np.arange(halts.shape[1]) >= last[:, None])
    return halts.argmax(axis=1)


def _known(values: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(target)
    return np.asarray(values, np.float64)[known], np.asarray(target, np.float64)[known]
