"""When a refinement should have ended: one rule for training targets, for generation's cap and for evaluation.

In:  judge scores of the loops of B refinements [B, K], how many loops each has and may have.
Out: probability of halting after each loop [B, K] (NaN: unknown), and where that number comes from.

With k loops done (k from 1), a judge score s, and a change of the score over the last `delta_window` loops:

    k = cap                     halt, whatever the scores
    s < judge_threshold         go on: the judge has a veto
    |change| < delta_threshold  halt: good enough and settled. A score that still falls is not settled
    otherwise                   go on, unless the curriculum halts: once 3/4 (stage 1) or 1/2 (stage 2) of the cap is done

A refinement that was never judged has the curriculum alone; without one it has no targets but at its cap. A score that is
missing among others leaves its loop (and what is compared with it) unknown: neither halt nor continue.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

from raykd.sample_config import HaltConfig
from raykd.types import CAWS_TIERS

_STAGE_SHARE = np.array([np.inf, 0.75, 0.5])  # by stage: share of the cap from which the curriculum halts
_EPSILON = 1e-9  # scores are decimal fractions: 0.85 - 0.8 is 0.05, not less


class HaltSource(enum.IntEnum):
    """Which rule gave a target; counted for monitoring."""

    NONE = 0  # no loop there, or unknown
    CAP = 1
    CURRICULUM = 2
    JUDGE = 3  # the score is too low, or still changes: go on
    DELTA = 4  # good enough and settled


class HaltTargets(NamedTuple):
    """Targets of B refinements of at most K loops."""

    halt: np.ndarray  # float32 [B, K] probability of halting after the loop; NaN: no target
    source: np.ndarray  # int8 [B, K] HaltSource


def loop_caps(tier: np.ndarray, max_loops: np.ndarray) -> np.ndarray:
    """Loops [B] that a refinement may have: the tier's, or its own limit where that is lower.

    Args:
        tier: int [B] CAWS tier, 1 to 3; 0: none.
        max_loops: int [B], at least 1.
    """
    allowed = np.array([np.iinfo(np.int64).max, *(CAWS_TIERS[tier].max_loops for tier in (1, 2, 3))])
    return np.minimum(allowed[np.asarray(tier)], max_loops)


def halt_targets(
    scores: np.ndarray,
    num_loops: np.ndarray,
    tier: np.ndarray,
    max_loops: np.ndarray,
    config: HaltConfig,
    *,
    stage: np.ndarray | None = None,
) -> HaltTargets:
    """Halting probabilities after every loop. The rule stands above; ours, after section 5 of the first implementation's.

    With `soft_targets` both thresholds become logistic curves of width `soft_width`, and a target is
    P(good enough) * max(P(settled), curriculum): the rule above is its limit.

    Args:
        scores: float [B, K] judge score of each loop in [0, 1]; NaN: not judged.
        num_loops: int [B] loops that there are; columns from there on are empty.
        tier, max_loops: int [B], see `loop_caps`.
        stage: int [B] curriculum stage, -1: none; None: config.curriculum_stage for all.
    """
    scores = np.asarray(scores, dtype=np.float64)
    done = np.arange(1, scores.shape[1] + 1)
    exists = done <= np.asarray(num_loops)[:, None]
    scores = np.where(exists, scores, np.nan)
    cap = loop_caps(tier, max_loops)[:, None]
    if stage is None:
        stage = np.full(len(scores), -1 if config.curriculum_stage is None else config.curriculum_stage)
    stage = np.asarray(stage)[:, None]
    stage_share = _STAGE_SHARE[np.maximum(stage, 0)]
    curriculum = done >= np.maximum(1, np.floor(stage_share * cap))  # of 3 loops, 3/4 are 2

    good = _step(scores - config.judge_threshold + _EPSILON, config)
    settled = _step(config.delta_threshold - _change(scores, config) - _EPSILON, config)
    by_judge = np.where(good == 0.0, 0.0, good * np.where(curriculum, 1.0, settled))  # NaN only where it matters
    judged = ~np.isnan(scores).all(axis=1, keepdims=True)
    halt = np.where(judged, by_judge, np.where(stage >= 0, curriculum, np.nan))
    halt = np.where(exists, np.where(done >= cap, 1.0, halt), np.nan)
    source = np.select(
        [np.isnan(halt), done >= cap, ~judged, (good >= 0.5) & (settled >= 0.5), (good >= 0.5) & curriculum],
        [HaltSource.NONE, HaltSource.CAP, HaltSource.CURRICULUM, HaltSource.DELTA, HaltSource.CURRICULUM],
        default=HaltSource.JUDGE,
    )
    return HaltTargets(halt.astype(np.float32), source.astype(np.int8))


def _step(margin: np.ndarray, config: HaltConfig) -> np.ndarray:
    """1 where the margin is above 0, else 0; softly so where asked; NaN stays."""
    if config.soft_targets:
        return 0.5 + 0.5 * np.tanh(margin / (2 * config.soft_width))
    return np.where(np.isnan(margin), np.nan, margin > 0)


def _change(scores: np.ndarray, config: HaltConfig) -> np.ndarray:
    """How far [B, K] the score moved over the last `delta_window` loops, up or down; infinitely where they have not been."""
    window = config.delta_window
    change = np.full(scores.shape, np.inf)
    before, now = scores[:, :-window], scores[:, window:]
    change[:, window:] = np.abs(now - before)
    if config.delta_relative:
        change[:, window:] /= np.maximum(np.abs(before), _EPSILON)
    return change
