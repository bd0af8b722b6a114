"""The course of the learning rate and of the losses' numbers, as pure functions of time: nothing to save or restore.

In:  the step (and the supervised tokens trained on before it), TrainConfig or LossConfig.
Out: the learning rate of that step; LossConfig with the values of that step.
"""

from __future__ import annotations

import math

from raykd.config import TrainConfig
from raykd.loss_config import LossConfig, Schedule


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


def scheduled(config: LossConfig, step: int, tokens: int) -> LossConfig:
    """`config` with every number of `config.schedules` as it is in optimizer step `step` (the first is 0).

    `tokens` are the supervised tokens of all steps before it, over all ranks, so that every rank has the same numbers.
    """
    if not config.schedules:
        return config
    times = {"step": step, "tokens": tokens}
    values = {name: scheduled_value(schedule, times[schedule.by]) for name, schedule in config.schedules.items()}
    return config.model_copy(update=values)


def scheduled_value(schedule: Schedule, time: int) -> float:
    """The number at `time`, in the steps or tokens that `schedule.by` names.

    linear and cosine are at `start` at time 0 and at `end` from time `over` on; a stage ends before its `until`.
    """
    if schedule.kind == "staged":
        return next((value for until, value in schedule.stages if time < until), schedule.stages[-1][1])
    assert schedule.start is not None, "a schedule without stages has a start"
    if schedule.kind == "constant":
        return schedule.start
    assert schedule.end is not None, f"a {schedule.kind} schedule has an end"
    assert schedule.over is not None, f"a {schedule.kind} schedule has a duration"
    progress = min(time / schedule.over, 1.0)
    share = progress if schedule.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return schedule.start + (schedule.end - schedule.start) * share
