"""The course of the learning rate, as a pure function of the step: nothing to save, nothing to restore.

In: the step, the number of steps, TrainConfig. Out: the learning rate of that step.
"""

from __future__ import annotations

import math

from raykd.config import TrainConfig


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of a run of `num_steps`.

    Linear warm-up over `warmup_steps` (step 0 already moves: peak / warmup_steps), then cosine or linear descent that
    reaches `min_learning_rate_fraction` of the peak in the last step, or constant. Later steps, which uneven tails can add,
    keep that value.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = min((step - warmup) / max(num_steps - 1 - warmup, 1), 1.0)
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = config.min_learning_rate_fraction
    return peak * (floor + (1.0 - floor) * share)
